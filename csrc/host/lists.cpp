#include "lists.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace jk_host {
namespace {

// Above every squared distance of a grid with sides up to 8192, and small enough that adding one to
// it stays within int32.
constexpr int32_t kFar = 1 << 29;

// lines[i] = min_j (lines[j] + (i - j)^2), for `count` lines that lie `stride` apart, all `stride`
// of them at once.
void min_plus(int32_t* lines, int64_t count, int64_t stride, std::vector<int32_t>& scratch) {
  scratch.assign(count * stride, std::numeric_limits<int32_t>::max());
  for (int64_t i = 0; i < count; ++i) {
    int32_t* best = scratch.data() + i * stride;
    for (int64_t j = 0; j < count; ++j) {
      const int32_t gap = static_cast<int32_t>((i - j) * (i - j));
      const int32_t* line = lines + j * stride;
      for (int64_t k = 0; k < stride; ++k) best[k] = std::min(best[k], line[k] + gap);
    }
  }
  std::copy(scratch.begin(), scratch.end(), lines);
}

// Squared distance along a row to its nearest zero, by two sweeps.
void nearest_in_row(int32_t* row, int64_t width) {
  int64_t last = -1;
  for (int64_t x = 0; x < width; ++x) {
    if (row[x] == 0) last = x;
    if (last >= 0) row[x] = static_cast<int32_t>((x - last) * (x - last));
  }
  last = -1;
  for (int64_t x = width - 1; x >= 0; --x) {
    if (row[x] == 0) last = x;
    if (last >= 0) row[x] = std::min(row[x], static_cast<int32_t>((last - x) * (last - x)));
  }
}

void squared_distances(const int64_t* targets, int64_t count, const Grid& grid,
                       std::vector<int32_t>& field, std::vector<int32_t>& scratch) {
  field.assign(grid.tokens(), kFar);
  for (int64_t i = 0; i < count; ++i) field[targets[i]] = 0;
  const int64_t plane = grid.h * grid.w;
  for (int64_t line = 0; line < grid.t * grid.h; ++line)
    nearest_in_row(field.data() + line * grid.w, grid.w);
  for (int64_t t = 0; t < grid.t; ++t) min_plus(field.data() + t * plane, grid.h, grid.w, scratch);
  min_plus(field.data(), grid.t, plane, scratch);
}

// Appends the sites of one sequence that are present at start, start+1, .. start+length-1, for
// every start below `starts`.
void append_sites(const std::vector<int64_t>& table, const Grid& grid, int64_t starts,
                  int64_t length, int64_t sequence, SiteLists& out) {
  const int64_t sites = grid.h * grid.w;
  for (int64_t start = 0; start < starts; ++start) {
    for (int64_t site = 0; site < sites; ++site) {
      const int64_t first = start * sites + site;
      int64_t k = 0;
      while (k < length && table[first + k * sites] >= 0) ++k;
      if (k < length) continue;
      for (k = 0; k < length; ++k) {
        out.rows.push_back(table[first + k * sites]);
        out.ids.push_back(first + k * sites);
      }
      out.sequence.push_back(sequence);
    }
  }
}

}  // namespace

MaskLists mask_lists(const PackedIds& context, const PackedIds& target, int64_t num_sequences,
                     const Grid& grid, int64_t horizon) {
  MaskLists lists;
  lists.distance.resize(context.cumulative[num_sequences]);
  std::vector<int32_t> field, scratch;
  std::vector<int64_t> table;
  for (int64_t s = 0; s < num_sequences; ++s) {
    squared_distances(target.ids + target.cumulative[s],
                      target.cumulative[s + 1] - target.cumulative[s], grid, field, scratch);
    table.assign(grid.tokens(), -1);
    for (int64_t row = context.cumulative[s]; row < context.cumulative[s + 1]; ++row) {
      const int64_t id = context.ids[row];
      table[id] = row;
      const double squared =
          field[id] >= kFar / 2 ? std::numeric_limits<double>::infinity() : field[id];
      lists.distance[row] = static_cast<float>(std::sqrt(std::sqrt(squared)));
    }
    append_sites(table, grid, grid.t - horizon, horizon + 1, s, lists.pairs);
    append_sites(table, grid, 1, grid.t, s, lists.columns);
  }
  return lists;
}

}  // namespace jk_host
