#include "masks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "philox.h"

namespace jk_host {
namespace {

using Triple = std::array<int64_t, 3>;

constexpr int64_t kDrawsPerBlock = 4;
constexpr uint32_t kSharedSample = 0xFFFFFFFFu;

Triple block_size(const MaskRequest& request, const Uniforms& numbers) {
  double draws[4], shares[3];
  numbers.pair(0, draws);
  numbers.pair(1, draws + 2);
  for (int i = 0; i < 3; ++i)
    shares[i] =
        request.scales[2 * i] + draws[i] * (request.scales[2 * i + 1] - request.scales[2 * i]);
  const Grid& grid = request.grid;
  const double area = static_cast<double>(
      std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(grid.h * grid.w) * shares[1])));
  const int64_t t = static_cast<int64_t>(static_cast<double>(grid.t) * shares[0]);
  const int64_t h = static_cast<int64_t>(std::floor(std::sqrt(area * shares[2]) + 0.5));
  const int64_t w = static_cast<int64_t>(std::floor(std::sqrt(area / shares[2]) + 0.5));
  return {std::clamp<int64_t>(t, 1, grid.t), std::clamp<int64_t>(h, 1, grid.h),
          std::clamp<int64_t>(w, 1, grid.w)};
}

// Draws origins: uniform when there are no cumulative weights.
struct Origins {
  Triple count;
  std::vector<double> cumulative;
  double random_rate;

  Triple draw(const double* numbers) const {
    if (cumulative.empty()) {
      Triple origin;
      for (int i = 0; i < 3; ++i)
        origin[i] = static_cast<int64_t>(numbers[i] * static_cast<double>(count[i]));
      return origin;
    }
    const int64_t size = static_cast<int64_t>(cumulative.size());
    int64_t index;
    if (numbers[0] < random_rate) {
      index = static_cast<int64_t>(numbers[1] * static_cast<double>(size));
    } else {
      const double target = numbers[1] * cumulative.back();
      index = std::min<int64_t>(
          std::upper_bound(cumulative.begin(), cumulative.end(), target) - cumulative.begin(),
          size - 1);
    }
    return {index / (count[1] * count[2]), index / count[2] % count[1], index % count[2]};
  }
};

void hide(const Grid& grid, const Triple& origin, const Triple& block, uint8_t* visible) {
  for (int64_t t = origin[0]; t < origin[0] + block[0]; ++t) {
    for (int64_t y = origin[1]; y < origin[1] + block[1]; ++y) {
      std::memset(visible + (t * grid.h + y) * grid.w + origin[2], 0, block[2]);
    }
  }
}

bool sample_one(const MaskRequest& request, const Origins& origins, const Triple& block,
                const Uniforms& numbers, uint8_t* visible) {
  const Grid& grid = request.grid;
  const int64_t allowed = request.context_steps * grid.h * grid.w;
  for (int64_t attempt = 0; attempt < request.max_attempts; ++attempt) {
    std::memset(visible, 1, allowed);
    std::memset(visible + allowed, 0, grid.tokens() - allowed);
    for (int64_t k = 0; k < request.num_blocks; ++k) {
      const uint32_t first =
          static_cast<uint32_t>((attempt * request.num_blocks + k) * kDrawsPerBlock / 2);
      double draws[kDrawsPerBlock];
      numbers.pair(first, draws);
      numbers.pair(first + 1, draws + 2);
      hide(grid, origins.draw(draws), block, visible);
    }
    if (std::memchr(visible, 1, allowed) != nullptr) return true;
  }
  return false;
}

}  // namespace

std::optional<Triple> sample_context(const MaskRequest& request, const int64_t* samples,
                                     int64_t batch, const double* motion_maps, uint8_t* context) {
  const Grid& grid = request.grid;
  for (int64_t b = 0; b < batch; ++b) {
    const uint32_t sample = static_cast<uint32_t>(samples[b]);
    const uint32_t size_key = request.shared_block_size ? kSharedSample : sample;
    const Triple block =
        block_size(request, {request.seed, size_key, request.step, request.size_stream});
    Origins origins{{grid.t - block[0] + 1, grid.h - block[1] + 1, grid.w - block[2] + 1},
                    {},
                    request.random_rate};
    if (motion_maps != nullptr) {
      block_scores(volume_table(motion_maps + b * grid.tokens(), grid), grid, block,
                   origins.cumulative);
      origin_weights(origins.cumulative, request.strength);
      double running = 0.0;
      for (double& weight : origins.cumulative) weight = running += weight;
    }
    const Uniforms numbers{request.seed, sample, request.step, request.origin_stream};
    if (!sample_one(request, origins, block, numbers, context + b * grid.tokens())) return block;
  }
  return std::nullopt;
}

}  // namespace jk_host
