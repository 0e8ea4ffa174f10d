#include "motion.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace jk_host {
namespace {

constexpr double kScoreFloor = 1e-6;

// The cells of one axis: pixel range they touch, and for each of the cells + 1 edges the pixel it
// cuts and the share before the cut.
struct Axis {
  int64_t first, size;
  std::vector<int64_t> whole;
  std::vector<double> share;

  Axis(double start, double extent, int64_t cells, int64_t pixels) {
    first = static_cast<int64_t>(std::floor(start));
    size = std::min(static_cast<int64_t>(std::ceil(start + extent)), pixels) - first;
    const double shift = start - static_cast<double>(first);
    for (int64_t i = 0; i <= cells; ++i) {
      double edge = shift + static_cast<double>(i) * extent / static_cast<double>(cells);
      edge = std::min(edge, static_cast<double>(size));
      whole.push_back(std::min(static_cast<int64_t>(std::floor(edge)), size - 1));
      share.push_back(edge - static_cast<double>(whole.back()));
    }
  }
  int64_t edges() const { return static_cast<int64_t>(whole.size()); }
};

// Integral of one row of |x_f - x_{f-1}|, summed over channels, in each cell: the values up to each
// edge, then differences of them.
template <typename Sum, typename Before, typename At>
void cells_of_row(const Axis& axis, std::vector<double>& at_edge, double* out,
                  const Before& sum_until, const At& value_at) {
  Sum running = 0;
  int64_t x = 0;
  for (int64_t i = 0; i < axis.edges(); ++i) {
    running = sum_until(running, x, axis.whole[i]);
    x = axis.whole[i];
    at_edge[i] = static_cast<double>(running) + axis.share[i] * static_cast<double>(value_at(x));
  }
  for (int64_t i = 0; i + 1 < axis.edges(); ++i) out[i] = at_edge[i + 1] - at_edge[i];
}

// [F, H, W, 3] bytes. Integers add exactly in any order, so the compiler may vectorise the sums.
struct ByteClip {
  const uint8_t* data;
  int64_t frames, height, width;
  std::vector<uint8_t> change = {};

  void cells(int64_t frame, int64_t y, const Axis& axis, std::vector<double>& at_edge,
             double* out) {
    const uint8_t* now = data + ((frame * height + y) * width + axis.first) * 3;
    const uint8_t* before = now - height * width * 3;
    change.resize(3 * axis.size);
    uint8_t* changed = change.data();
    for (int64_t i = 0; i < 3 * axis.size; ++i)
      changed[i] = now[i] > before[i] ? now[i] - before[i] : before[i] - now[i];
    const auto sum_until = [changed](int64_t running, int64_t x, int64_t end) {
      uint32_t sum = 0;
      for (int64_t i = 3 * x; i < 3 * end; ++i) sum += changed[i];
      return running + sum;
    };
    const auto value_at = [changed](int64_t x) {
      return int{changed[3 * x]} + changed[3 * x + 1] + changed[3 * x + 2];
    };
    cells_of_row<int64_t>(axis, at_edge, out, sum_until, value_at);
  }
};

// [3, F, H, W] floats. Sums run strictly from left to right, as a cumulative sum in NumPy does.
template <typename Real>
struct RealClip {
  const Real* data;
  int64_t frames, height, width;

  void cells(int64_t frame, int64_t y, const Axis& axis, std::vector<double>& at_edge,
             double* out) {
    const int64_t channel = frames * height * width;
    const Real* now = data + (frame * height + y) * width + axis.first;
    const Real* before = now - height * width;
    const auto change = [&](int64_t i) {
      return std::fabs(static_cast<double>(now[i]) - static_cast<double>(before[i]));
    };
    const auto value_at = [&](int64_t x) {
      return (change(x) + change(x + channel)) + change(x + 2 * channel);
    };
    const auto sum_until = [&](double running, int64_t x, int64_t end) {
      for (; x < end; ++x) running += value_at(x);
      return running;
    };
    cells_of_row<double>(axis, at_edge, out, sum_until, value_at);
  }
};

// The same down the rows or along time, for `stride` columns at once: values is [axis.size,
// stride], out is [cells, stride].
void cells_of_rows(const double* values, const Axis& axis, int64_t stride,
                   std::vector<double>& at_edge, double* out) {
  std::vector<double> running(stride, 0.0);
  at_edge.resize(axis.edges() * stride);
  int64_t y = 0;
  for (int64_t i = 0; i < axis.edges(); ++i) {
    for (; y < axis.whole[i]; ++y) {
      for (int64_t k = 0; k < stride; ++k) running[k] += values[y * stride + k];
    }
    const double* cut = values + axis.whole[i] * stride;
    for (int64_t k = 0; k < stride; ++k)
      at_edge[i * stride + k] = running[k] + axis.share[i] * cut[k];
  }
  for (int64_t i = 0; i + 1 < axis.edges(); ++i) {
    for (int64_t k = 0; k < stride; ++k)
      out[i * stride + k] = at_edge[(i + 1) * stride + k] - at_edge[i * stride + k];
  }
}

template <typename Clip>
void motion_of(Clip clip, const Box& box, bool flip, const Grid& grid, double* out) {
  if (clip.frames < 2) {
    std::fill(out, out + grid.tokens(), 0.0);
    return;
  }
  const Axis across(box.left, box.width, grid.w, clip.width),
      down(box.top, box.height, grid.h, clip.height);
  const Axis along(0.0, static_cast<double>(clip.frames), grid.t, clip.frames);
  const int64_t plane = grid.h * grid.w;
  std::vector<double> edge_row(across.edges()), edge_rows, rows(down.size * grid.w),
      planes(clip.frames * plane);
  for (int64_t f = 1; f < clip.frames; ++f) {
    for (int64_t y = 0; y < down.size; ++y) {
      clip.cells(f, down.first + y, across, edge_row, rows.data() + y * grid.w);
    }
    cells_of_rows(rows.data(), down, grid.w, edge_rows, planes.data() + f * plane);
  }
  std::copy(planes.begin() + plane, planes.begin() + 2 * plane, planes.begin());
  cells_of_rows(planes.data(), along, plane, edge_rows, out);
  const double volume = (static_cast<double>(clip.frames) / static_cast<double>(grid.t)) *
                        (box.height / static_cast<double>(grid.h)) *
                        (box.width / static_cast<double>(grid.w)) * 3.0;
  for (int64_t i = 0; i < grid.tokens(); ++i) out[i] /= volume;
  if (flip) {
    for (int64_t i = 0; i < grid.t * grid.h; ++i)
      std::reverse(out + i * grid.w, out + (i + 1) * grid.w);
  }
}

}  // namespace

void area_motion(const uint8_t* clip, int64_t frames, int64_t height, int64_t width, const Box& box,
                 bool flip, const Grid& grid, double* out) {
  motion_of(ByteClip{clip, frames, height, width}, box, flip, grid, out);
}

void area_motion(const float* clip, int64_t frames, int64_t height, int64_t width, const Box& box,
                 bool flip, const Grid& grid, double* out) {
  motion_of(RealClip<float>{clip, frames, height, width}, box, flip, grid, out);
}

void area_motion(const double* clip, int64_t frames, int64_t height, int64_t width, const Box& box,
                 bool flip, const Grid& grid, double* out) {
  motion_of(RealClip<double>{clip, frames, height, width}, box, flip, grid, out);
}

std::vector<double> volume_table(const double* map, const Grid& grid) {
  const int64_t row = grid.w + 1, plane = (grid.h + 1) * row;
  std::vector<double> table((grid.t + 1) * plane, 0.0);
  // One axis after the other (x, y, t), as three cumulative sums in NumPy would.
  for (int64_t t = 0; t < grid.t; ++t) {
    for (int64_t y = 0; y < grid.h; ++y) {
      const double* source = map + (t * grid.h + y) * grid.w;
      double* target = table.data() + (t + 1) * plane + (y + 1) * row + 1;
      double running = 0.0;
      for (int64_t x = 0; x < grid.w; ++x)
        target[x] = running = x == 0 ? source[0] : running + source[x];
      if (y > 0) {
        for (int64_t x = 0; x < grid.w; ++x) target[x] += target[x - row];
      }
    }
    if (t > 0) {
      double* target = table.data() + (t + 1) * plane;
      for (int64_t i = 0; i < plane; ++i) target[i] += target[i - plane];
    }
  }
  return table;
}

void block_scores(const std::vector<double>& table, const Grid& grid,
                  const std::array<int64_t, 3>& block, std::vector<double>& scores) {
  const int64_t row = grid.w + 1, plane = (grid.h + 1) * row;
  const auto [t, h, w] = block;
  const double size = static_cast<double>(t * h * w);
  scores.resize((grid.t - t + 1) * (grid.h - h + 1) * (grid.w - w + 1));
  double* out = scores.data();
  for (int64_t z = 0; z + t <= grid.t; ++z) {
    for (int64_t y = 0; y + h <= grid.h; ++y) {
      const double* early = table.data() + z * plane + y * row;
      const double* late = early + t * plane;
      for (int64_t x = 0; x + w <= grid.w; ++x) {
        double sum = late[x + h * row + w] - early[x + h * row + w];
        sum -= late[x + w];
        sum += early[x + w];
        sum -= late[x + h * row];
        sum += early[x + h * row];
        sum += late[x];
        sum -= early[x];
        *out++ = sum / size;
      }
    }
  }
}

void origin_weights(std::vector<double>& scores, double strength) {
  const bool whole = strength <= 64.0 && strength == std::floor(strength);
  for (double& score : scores) {
    const double base = std::max(score, kScoreFloor);
    if (whole) {
      double power = 1.0;
      for (int i = 0; i < static_cast<int>(strength); ++i) power *= base;
      score = power;
    } else {
      score = std::pow(base, strength);
    }
  }
}

}  // namespace jk_host
