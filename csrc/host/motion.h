// Motion maps of clips on the token grid and block scores from a summed-volume table.
// jepa/masks/motion.py does the same in NumPy, to the bit: every running sum here adds in the order
// written there, in doubles.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

namespace jk_host {

struct Grid {
  int64_t t, h, w;
  int64_t tokens() const { return t * h * w; }
};

struct Box {
  double top, left, height, width;
};

// Mean over the exact area of each cell of sum_c |x_f - x_{f-1}| / 3; frame 0 takes the change of
// frame 1; `out` is [T, H, W]. uint8 clips are [F, H, W, 3], float ones [3, F, H, W], both
// contiguous.
void area_motion(const uint8_t* clip, int64_t frames, int64_t height, int64_t width, const Box& box,
                 bool flip, const Grid& grid, double* out);
void area_motion(const float* clip, int64_t frames, int64_t height, int64_t width, const Box& box,
                 bool flip, const Grid& grid, double* out);
void area_motion(const double* clip, int64_t frames, int64_t height, int64_t width, const Box& box,
                 bool flip, const Grid& grid, double* out);

// Summed-volume table of a [T, H, W] map, with a border of zeros: [T+1, H+1, W+1].
std::vector<double> volume_table(const double* map, const Grid& grid);

// Mean of the map in a block (t, h, w) at every origin, row-major over (t, y, x).
void block_scores(const std::vector<double>& table, const Grid& grid,
                  const std::array<int64_t, 3>& block, std::vector<double>& scores);

// max(score, 1e-6)^strength in place.
void origin_weights(std::vector<double>& scores, double strength);

}  // namespace jk_host
