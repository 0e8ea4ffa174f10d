// Tensor-core, ldmatrix and cp.async semantics for the executor; the same functions as in the nvcc
// half of device.cuh.
#pragma once
#include "simt_cuda.h"

namespace simt {

// d += a * b for one 16 x 8 tile whose K extent is kSteps * 8 registers of two values (or 4 of one
// for tf32). value(bits, which) turns the `which`-th value packed into a register into a float.
template <int kPerRegister, class Value>
inline void mma_16x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site,
                     Value value) {
  constexpr int kHalf =
      4 * kPerRegister;  // K extent that one register of each of the four lanes of a group covers
  constexpr int kDepth = 2 * kHalf;
  struct Payload {
    uint32_t a[4], b[2];
  };
  const Payload mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const unsigned self = lane(), group = self >> 2, column = (self & 3) * 2;
  warp_collective(
      0xffffffffu, mine, site, false,
      [&](Collective& c) {
        float left[16][kDepth], right[kDepth][8];
        for (unsigned l = 0; l < 32; l++) {
          const Payload p = peek<Payload>(c, l);
          const unsigned g = l >> 2, k0 = (l & 3) * kPerRegister;
          for (int half = 0; half < 2; half++)
            for (int which = 0; which < kPerRegister; which++) {
              left[g][k0 + which + half * kHalf] = value(p.a[2 * half], which);
              left[g + 8][k0 + which + half * kHalf] = value(p.a[2 * half + 1], which);
              right[k0 + which + half * kHalf][g] = value(p.b[half], which);
            }
        }
        // Vectors of GCC: eight columns at once whatever the optimizer thinks of the loop.
        typedef float Columns __attribute__((vector_size(32), aligned(4)));
        for (int r = 0; r < 16; r++) {
          Columns sum = {};
          for (int k = 0; k < kDepth; k++)
            sum += left[r][k] * *reinterpret_cast<const Columns*>(right[k]);
          *reinterpret_cast<Columns*>(c.out[r]) = sum;
        }
      },
      [&](Collective& c) {
        d[0] += c.out[group][column];
        d[1] += c.out[group][column + 1];
        d[2] += c.out[group + 8][column];
        d[3] += c.out[group + 8][column + 1];
        return 0;
      });
}

// Each lane reads the 16-byte row at its own address, outside Quiet, so that the race detector sees
// the read.
template <bool kTransposed>
inline void ldmatrix(uint32_t (&r)[4], const void* address, Site site) {
  struct Row {
    uint16_t value[8];
  };
  if (reinterpret_cast<uintptr_t>(address) & 15)
    fail("simt: " + site.text() + " needs a 16-byte aligned address.");
  Row mine;
  const uint16_t* source = static_cast<const uint16_t*>(address);
  for (int i = 0; i < 8; i++) mine.value[i] = source[i];
  const unsigned self = lane();
  warp_collective(
      0xffffffffu, mine, site, false, [](auto&) {},
      [&](Collective& c) {
        for (unsigned i = 0; i < 4; i++) {
          uint32_t pair = 0;
          for (unsigned e = 0; e < 2; e++) {
            const unsigned row = kTransposed ? 2 * (self & 3) + e : self >> 2,
                           col = kTransposed ? self >> 2 : 2 * (self & 3) + e;
            pair |= uint32_t(peek<Row>(c, 8 * i + row).value[col]) << (16 * e);
          }
          r[i] = pair;
        }
        return 0;
      });
}

// The destination turns to poison at once and gets its data at the wait: reading without waiting,
// or overwriting what another thread still reads, gives wrong numbers, and both writes are visible
// to the race detector.
inline void async_copy(void* to, const void* from, uint32_t bytes, uint32_t valid_bytes,
                       Site site) {
  if (reinterpret_cast<uintptr_t>(to) % bytes ||
      (valid_bytes && reinterpret_cast<uintptr_t>(from) % bytes))
    fail("simt: " + site.text() + " needs addresses aligned to its " + std::to_string(bytes) +
         " bytes.");
  std::memset(to, kPoison, bytes);
  Quiet quiet;
  counts.async_bytes += valid_bytes;
  fiber->copies.push_back({to, from, bytes, valid_bytes, fiber->copy_group});
}

inline void async_commit() {
  Quiet quiet;
  fiber->copy_group++;
}

inline void async_wait(uint64_t groups_left) {
  std::vector<AsyncCopy> ready;
  {
    Quiet quiet;
    Fiber& self = *fiber;
    auto pending = std::stable_partition(
        self.copies.begin(), self.copies.end(),
        [&](const AsyncCopy& c) { return c.group + groups_left < self.copy_group; });
    ready.assign(self.copies.begin(), pending);
    self.copies.erase(self.copies.begin(), pending);
  }
  for (const AsyncCopy& c : ready) {
    if (c.valid_bytes) std::memcpy(c.to, c.from, c.valid_bytes);
    std::memset(static_cast<char*>(c.to) + c.valid_bytes, 0, c.bytes - c.valid_bytes);
  }
}

}  // namespace simt
