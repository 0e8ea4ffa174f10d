// latent_rollout on a CPU: chooses the instruction set, packs weights once per call, cuts rows into
// tiles and hands them to the caller's threads. A tile computes the same bits wherever and whenever
// it runs, so results do not depend on the thread count.
#include <stdlib.h>

#include <algorithm>
#include <initializer_list>
#include <new>
#include <vector>

#include "../../cpu/dispatch.h"
#include "../../cpu/tiles.h"
#include "kernels.h"

namespace jk::rollout {
namespace {

// Scratch of one thread, kept between calls: fresh pages would cost as much as a short call.
float* scratch_of(int64_t floats) {
  static thread_local std::vector<float> memory;
  if ((int64_t)memory.size() < floats) memory.assign((size_t)floats, 0.f);
  return memory.data();
}

constexpr KernelsOf<Kernels> kKernels[] = {
    kernels<JK_ISA_PORTABLE>,
    JK_X86(kernels<JK_ISA_AVX2>, kernels<JK_ISA_AVX512>, kernels<JK_ISA_AVX512_BF16>)};

template <class Body>
void run_parallel(jk_parallel_for parallel_for, int64_t count, const Body& body) {
  parallel_for(
      count, 1,
      [](int64_t begin, int64_t end, void* context) { (*(const Body*)context)(begin, end); },
      (void*)&body);
}

int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Weights packed for the kernels of one call.
class Packer {
 public:
  Packer(const Kernels& kernels, jk_parallel_for parallel_for)
      : kernels_(kernels), parallel_for_(parallel_for) {}
  Packer(const Packer&) = delete;
  Packer& operator=(const Packer&) = delete;
  ~Packer() {
    for (float* block : blocks_) free(block);
  }

  const Kernels& kernels() const { return kernels_; }
  // Room for a packed matrix, on cache-line boundaries.
  float* reserve(int64_t floats) {
    const size_t bytes = ((size_t)(floats > 0 ? floats : 1) * sizeof(float) + 63) / 64 * 64;
    float* block = (float*)aligned_alloc(64, bytes);
    if (block == nullptr) throw std::bad_alloc();
    blocks_.push_back(block);
    return block;
  }
  void pack(const void* data, int64_t row_stride, int64_t column_stride, int64_t depth,
            int64_t columns, float* to) const {
    const int64_t width = kernels_.columns_of_panel;
    run_parallel(parallel_for_, (columns + width - 1) / width, [&](int64_t begin, int64_t end) {
      kernels_.pack(data, row_stride, column_stride, depth, columns, begin, end, to);
    });
  }
  const float* operator()(const void* data, int64_t row_stride, int64_t column_stride,
                          int64_t depth, int64_t columns) {
    float* to = reserve(kernels_.packed_size(depth, columns));
    pack(data, row_stride, column_stride, depth, columns, to);
    return to;
  }

 private:
  const Kernels& kernels_;
  jk_parallel_for parallel_for_;
  std::vector<float*> blocks_;
};

template <class Params>
Packed pack_hamiltonian(Packer& pack, const Params& p) {
  const int64_t h = p.hidden, m = p.middle;
  return {{pack(p.weight, 1, h, h, m), pack(p.weight, h, 1, m, h), pack(p.coupling, 1, h, h, h),
           pack(p.coupling, h, 1, h, h)}};
}

Packed pack_readout(Packer& pack, const jk_rollout_readout_params& p) {
  return {{pack(p.weight, p.weight_row_stride, p.weight_column_stride, p.hidden, p.channels)}};
}

// The three gates side by side, each padded to whole panels: transposed [depth, 3 wide] for
// forward, stacked [3 wide, ...] for backward.
Packed pack_gru(Packer& pack, const jk_rollout_gru_params& p, bool backward) {
  const Kernels& kernels = pack.kernels();
  const int64_t d = p.channels, wide = kernels.packed_size(1, d), bytes = kernels.number_bytes;
  Packed packed{};
  if (!backward) {
    const void* weights[] = {p.weight_input, p.weight_state};
    const int64_t depths[] = {p.actions, d};
    for (int which = 0; which < 2; ++which) {
      const int64_t depth = depths[which], size = kernels.packed_size(depth, d);
      float* to = pack.reserve(3 * size);
      for (int gate = 0; gate < 3; ++gate)
        pack.pack((const char*)weights[which] + gate * d * depth * bytes, 1, depth, depth, d,
                  to + gate * size);
      packed.matrix[which] = to;
    }
    return packed;
  }
  const auto stacked = [&](const void* data, int64_t columns, std::initializer_list<int> order) {
    std::vector<char> rows((size_t)(3 * wide * columns * bytes), 0);
    int64_t place = 0;
    for (int gate : order) {
      const char* from = (const char*)data + gate * d * columns * bytes;
      std::copy(from, from + d * columns * bytes, rows.begin() + place++ * wide * columns * bytes);
    }
    return pack(rows.data(), columns, 1, 3 * wide, columns);
  };
  packed.matrix[2] = stacked(p.weight_state, d, {0, 1, 2});
  packed.matrix[3] = stacked(p.weight_input, p.actions, {2, 0, 1});
  return packed;
}

// One call: finds the kernels for the instruction set and the dtype of the matrices, has the
// matrices packed, and runs tile(kernels, packed, first row, rows, number of the tile) over every
// tile. Returns NULL, or why there are no kernels.
template <class Params, class Pack, class Tile>
const char* run(const Params& p, int isa, jk_parallel_for parallel_for, const Pack& pack,
                const Tile& tile) {
  if (const char* wrong = choose_isa("latent_rollout", isa)) return wrong;
  const Kernels* kernels = best_kernels(kKernels, isa, p.operand);
  if (kernels == nullptr)
    return "latent_rollout: operand must be float32, or bfloat16 on AVX512_BF16.";
  Packer packer(*kernels, parallel_for);
  const Packed packed = pack(packer);
  run_parallel(parallel_for, tiles_of(p.rows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kTileRows;
      tile(*kernels, packed, first, std::min(kTileRows, p.rows - first), i);
    }
  });
  return nullptr;
}

const char* mlp(const jk_rollout_mlp_params& p, int isa, jk_parallel_for parallel_for,
                bool backward) {
  const auto pack = [&](Packer& packed) -> Packed {
    if (p.horizon == 1) return {};
    return {
        {packed(p.coupling, backward ? p.hidden : 1, backward ? 1 : p.hidden, p.hidden, p.hidden)}};
  };
  return run(p, isa, parallel_for, pack,
             [&](const Kernels& k, const Packed& packed, int64_t first, int64_t rows, int64_t) {
               (backward ? k.mlp_backward : k.mlp_forward)(p, packed, first, rows,
                                                           scratch_of(k.mlp_scratch(p)));
             });
}

}  // namespace
}  // namespace jk::rollout

using namespace jk::rollout;

JK_EXPORT const char* jk_latent_rollout_cpu_mlp_fwd(const jk_rollout_mlp_params* p, int isa,
                                                    jk_parallel_for parallel_for) {
  return mlp(*p, isa, parallel_for, false);
}

JK_EXPORT const char* jk_latent_rollout_cpu_mlp_bwd(const jk_rollout_mlp_params* p, int isa,
                                                    jk_parallel_for parallel_for) {
  return mlp(*p, isa, parallel_for, true);
}

JK_EXPORT const char* jk_latent_rollout_cpu_hamiltonian_fwd(const jk_rollout_hamiltonian_params* p,
                                                            int isa, jk_parallel_for parallel_for) {
  return run(
      *p, isa, parallel_for, [&](Packer& packer) { return pack_hamiltonian(packer, *p); },
      [&](const Kernels& k, const Packed& packed, int64_t first, int64_t rows, int64_t) {
        k.hamiltonian_forward(*p, packed, first, rows,
                              scratch_of(k.hamiltonian_scratch(p->hidden, p->middle)));
      });
}

JK_EXPORT const char* jk_latent_rollout_cpu_hamiltonian_bwd(
    const jk_rollout_hamiltonian_step_params* p, int isa, jk_parallel_for parallel_for) {
  return run(
      *p, isa, parallel_for, [&](Packer& packer) { return pack_hamiltonian(packer, *p); },
      [&](const Kernels& k, const Packed& packed, int64_t first, int64_t rows, int64_t) {
        k.hamiltonian_backward(*p, packed, first, rows,
                               scratch_of(k.hamiltonian_scratch(p->hidden, p->middle)));
      });
}

JK_EXPORT const char* jk_latent_rollout_cpu_readout(const jk_rollout_readout_params* p, int isa,
                                                    jk_parallel_for parallel_for) {
  return run(
      *p, isa, parallel_for, [&](Packer& packer) { return pack_readout(packer, *p); },
      [&](const Kernels& k, const Packed& packed, int64_t first, int64_t rows, int64_t) {
        k.readout(*p, packed, first, rows, scratch_of(k.readout_scratch(*p)));
      });
}

JK_EXPORT const char* jk_latent_rollout_cpu_readout_gradient(const jk_rollout_readout_params* p,
                                                             int isa,
                                                             jk_parallel_for parallel_for) {
  if (p->signs == nullptr) return jk_latent_rollout_cpu_readout(p, isa, parallel_for);
  return run(
      *p, isa, parallel_for, [](Packer&) { return Packed{}; },
      [&](const Kernels& k, const Packed&, int64_t first, int64_t rows, int64_t) {
        k.gradient_from_signs(*p, first, rows);
      });
}

JK_EXPORT int64_t jk_latent_rollout_cpu_gru_tiles(int64_t rows) { return tiles_of(rows); }

JK_EXPORT const char* jk_latent_rollout_cpu_gru_fwd(const jk_rollout_gru_params* p, int isa,
                                                    jk_parallel_for parallel_for) {
  return run(
      *p, isa, parallel_for, [&](Packer& packer) { return pack_gru(packer, *p, false); },
      [&](const Kernels& k, const Packed& packed, int64_t first, int64_t rows, int64_t) {
        k.gru_forward(*p, packed, first, rows, scratch_of(k.gru_scratch(*p)));
      });
}

JK_EXPORT const char* jk_latent_rollout_cpu_gru_bwd(const jk_rollout_gru_params* p, int isa,
                                                    jk_parallel_for parallel_for) {
  return run(
      *p, isa, parallel_for, [&](Packer& packer) { return pack_gru(packer, *p, true); },
      [&](const Kernels& k, const Packed& packed, int64_t first, int64_t rows, int64_t tile) {
        k.gru_backward(*p, packed, first, rows, tile, scratch_of(k.gru_scratch(*p)));
      });
}
