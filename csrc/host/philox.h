// Philox4x32-10 counter-based random numbers (Salmon, Moraes, Dror, Shaw, SC 2011).
// jepa/counter_rng.py does the same in NumPy and states how (seed, step, sample, stream, index)
// fill the counter and the key.
#pragma once
#include <array>
#include <cstdint>

namespace jk_host {

using Words = std::array<uint32_t, 4>;

inline Words philox4x32(Words counter, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * counter[0], p1 = 0xCD9E8D57ull * counter[2];
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ k0, static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// 53 random bits in [0, 1): exact in a double, so that NumPy and C++ agree on every bit.
inline double unit(uint32_t high, uint32_t low) {
  return static_cast<double>((static_cast<uint64_t>(high >> 5) << 26) | (low >> 6)) * 0x1p-53;
}

// The numbers of one (seed, step, sample, stream); number i sits in Philox block i / 2.
struct Uniforms {
  uint64_t seed;
  uint32_t sample;
  uint64_t step;
  uint32_t stream;

  // Numbers 2*block and 2*block + 1.
  void pair(uint32_t block, double* out) const {
    const Words words = philox4x32({block, sample, static_cast<uint32_t>(step),
                                    stream + (static_cast<uint32_t>(step >> 32) << 16)},
                                   seed);
    out[0] = unit(words[0], words[1]);
    out[1] = unit(words[2], words[3]);
  }
};

}  // namespace jk_host
