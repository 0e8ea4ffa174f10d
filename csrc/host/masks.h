// Block-mask sampling; jepa/masks/blocks.py is the specification and gives the same masks bit for
// bit.
#pragma once
#include <array>
#include <cstdint>
#include <optional>

#include "motion.h"

namespace jk_host {

struct MaskRequest {
  Grid grid;
  int64_t num_blocks;
  // (low, high) of the share of time, the share of a frame, and height / width.
  std::array<double, 6> scales;
  int64_t context_steps;
  int64_t max_attempts;
  uint64_t seed, step;
  uint32_t size_stream, origin_stream;
  bool shared_block_size;
  double strength, random_rate;
};

// Fills context [batch, T, H, W] (1 = seen). `motion_maps` is [batch, T, H, W] or null. Returns the
// block size of the first sample whose blocks hid every token in all attempts, if there is one.
std::optional<std::array<int64_t, 3>> sample_context(const MaskRequest& request,
                                                     const int64_t* samples, int64_t batch,
                                                     const double* motion_maps, uint8_t* context);

}  // namespace jk_host
