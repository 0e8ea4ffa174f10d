// A parallel_for for sanitized tests: uneven pieces, each in a thread of its own that nothing
// orders after another.
#include <algorithm>
#include <thread>
#include <vector>

#include "../../csrc/abi.h"

static int64_t cuts = 1, overlap = 0;

// `overlap` elements too many for each piece plant a race.
JK_EXPORT void choose_pieces(int64_t cuts_, int64_t overlap_) {
  cuts = cuts_;
  overlap = overlap_;
}

JK_EXPORT void uneven_threads(int64_t count, int64_t, jk_body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < cuts; i++) {
    const int64_t begin = count * i * i / (cuts * cuts),
                  end = count * (i + 1) * (i + 1) / (cuts * cuts);
    if (begin < end) threads.emplace_back(body, begin, std::min(end + overlap, count), context);
  }
  for (auto& thread : threads) thread.join();
}
