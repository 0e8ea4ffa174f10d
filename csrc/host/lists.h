// Index lists of a packed mask batch: distances to the nearest target, temporal pairs, full
// columns. jepa/lattice.py does the same in NumPy.
#pragma once
#include <cstdint>
#include <vector>

#include "motion.h"

namespace jk_host {

struct PackedIds {
  const int64_t* ids;
  const int32_t* cumulative;  // num_sequences + 1
};

// Rows into the packed context, token ids, and the sequence of each entry; `width` columns a row.
struct SiteLists {
  std::vector<int64_t> rows, ids, sequence;
};

struct MaskLists {
  std::vector<float>
      distance;  // sqrt of the Euclidean distance of each context token; infinite without targets
  SiteLists pairs, columns;
};

MaskLists mask_lists(const PackedIds& context, const PackedIds& target, int64_t num_sequences,
                     const Grid& grid, int64_t horizon);

}  // namespace jk_host
