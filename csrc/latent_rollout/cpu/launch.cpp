// latent_rollout on a CPU: chooses the instruction set, packs weights once per call, cuts rows into
// tiles and hands them to the caller's threads. A tile computes the same bits wherever and whenever
// it runs, so results do not depend on the thread count.
#include <stdlib.h>

#include <algorithm>
#include <initializer_list>
#include <new>
#include <vector>

#include "../../cpu/dispatch.h"
#include "kernels.h"

namespace jk::rollout {
namespace {

// Scratch of one thread, kept between calls: fresh pages would cost as much as a short call.
float* scratch_of(int64_t floats) {
  static thread_local std::vector<float> memory;
  if ((int64_t)memory.size() < floats) memory.assign((size_t)floats, 0.f);
  return memory.data();
}

// Finds the kernels of an instruction set for matrices of a dtype; returns NULL, or why there are
// none.
const char* find_kernels(int isa, int64_t operand, const Kernels*& kernels) {
  if (isa == JK_ISA_AUTO) isa = best_isa();
  if (!cpu_supports(isa)) return "latent_rollout: isa must be one that this processor has.";
  const bool dot = operand == JK_BFLOAT16 && isa >= JK_ISA_AVX512_BF16;
  if (operand != JK_FLOAT32 && !dot)
    return "latent_rollout: operand must be float32, or bfloat16 on AVX512_BF16.";
  kernels = &kPortable;
#ifdef __x86_64__
  if (isa == JK_ISA_AVX2) kernels = &kAvx2;
  if (isa >= JK_ISA_AVX512) kernels = dot ? &kAvx512DotBf16 : &kAvx512;
#endif
  return nullptr;
}

template <class Body>
void run_parallel(jk_parallel_for parallel_for, int64_t count, const Body& body) {
  parallel_for(
      count, 1,
      [](int64_t begin, int64_t end, void* context) { (*(const Body*)context)(begin, end); },
      (void*)&body);
}

// Runs body(tile, first row, rows) over every tile.
template <class Body>
void over_tiles(jk_parallel_for parallel_for, int64_t rows, int64_t tile_rows, const Body& body) {
  run_parallel(parallel_for, (rows + tile_rows - 1) / tile_rows, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * tile_rows;
      body(tile, first, rows - first < tile_rows ? rows - first : tile_rows);
    }
  });
}

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

Packed pack_hamiltonian(Packer& pack, const void* weight, const void* coupling, int64_t hidden,
                        int64_t middle) {
  return {{pack(weight, 1, hidden, hidden, middle), pack(weight, hidden, 1, middle, hidden),
           pack(coupling, 1, hidden, hidden, hidden), pack(coupling, hidden, 1, hidden, hidden)}};
}

Packed pack_readout(Packer& pack, const jk_rollout_readout_params& p) {
  return {{pack(p.weight, p.weight_row_stride, p.weight_column_stride, p.hidden, p.channels),
           nullptr, nullptr, nullptr}};
}

// The three gates side by side, each padded to whole panels: transposed [depth, 3 wide] for
// forward, stacked [3 wide, ...] for backward.
Packed pack_gru(Packer& pack, const Kernels& kernels, const jk_rollout_gru_params& p,
                bool backward) {
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

}  // namespace
}  // namespace jk::rollout

using namespace jk::rollout;

JK_EXPORT const char* jk_latent_rollout_cpu_mlp_fwd(const jk_rollout_mlp_params* p, int isa,
                                                    jk_parallel_for parallel_for) {
  const Kernels* kernels;
  if (const char* missing = find_kernels(isa, p->operand, kernels)) return missing;
  Packer pack(*kernels, parallel_for);
  Packed packed{};
  if (p->horizon > 1) packed.matrix[0] = pack(p->coupling, 1, p->hidden, p->hidden, p->hidden);
  over_tiles(parallel_for, p->rows, kTileRows, [&](int64_t, int64_t first, int64_t rows) {
    kernels->mlp_forward(*p, packed, first, rows, scratch_of(kernels->mlp_scratch(*p)));
  });
  return nullptr;
}

JK_EXPORT const char* jk_latent_rollout_cpu_mlp_bwd(const jk_rollout_mlp_params* p, int isa,
                                                    jk_parallel_for parallel_for) {
  const Kernels* kernels;
  if (const char* missing = find_kernels(isa, p->operand, kernels)) return missing;
  Packer pack(*kernels, parallel_for);
  Packed packed{};
  if (p->horizon > 1) packed.matrix[0] = pack(p->coupling, p->hidden, 1, p->hidden, p->hidden);
  over_tiles(parallel_for, p->rows, kTileRows, [&](int64_t, int64_t first, int64_t rows) {
    kernels->mlp_backward(*p, packed, first, rows, scratch_of(kernels->mlp_scratch(*p)));
  });
  return nullptr;
}

JK_EXPORT const char* jk_latent_rollout_cpu_hamiltonian_fwd(const jk_rollout_hamiltonian_params* p,
                                                            int isa, jk_parallel_for parallel_for) {
  const Kernels* kernels;
  if (const char* missing = find_kernels(isa, p->operand, kernels)) return missing;
  Packer pack(*kernels, parallel_for);
  const Packed packed = pack_hamiltonian(pack, p->weight, p->coupling, p->hidden, p->middle);
  over_tiles(parallel_for, p->rows, kTileRows, [&](int64_t, int64_t first, int64_t rows) {
    kernels->hamiltonian_forward(*p, packed, first, rows,
                                 scratch_of(kernels->hamiltonian_scratch(p->hidden, p->middle)));
  });
  return nullptr;
}

JK_EXPORT const char* jk_latent_rollout_cpu_hamiltonian_bwd(
    const jk_rollout_hamiltonian_step_params* p, int isa, jk_parallel_for parallel_for) {
  const Kernels* kernels;
  if (const char* missing = find_kernels(isa, p->operand, kernels)) return missing;
  Packer pack(*kernels, parallel_for);
  const Packed packed = pack_hamiltonian(pack, p->weight, p->coupling, p->hidden, p->middle);
  over_tiles(parallel_for, p->rows, kTileRows, [&](int64_t, int64_t first, int64_t rows) {
    kernels->hamiltonian_backward(*p, packed, first, rows,
                                  scratch_of(kernels->hamiltonian_scratch(p->hidden, p->middle)));
  });
  return nullptr;
}

JK_EXPORT const char* jk_latent_rollout_cpu_readout(const jk_rollout_readout_params* p, int isa,
                                                    jk_parallel_for parallel_for) {
  const Kernels* kernels;
  if (const char* missing = find_kernels(isa, p->operand, kernels)) return missing;
  Packer pack(*kernels, parallel_for);
  const Packed packed = pack_readout(pack, *p);
  over_tiles(parallel_for, p->rows, kTileRows, [&](int64_t, int64_t first, int64_t rows) {
    kernels->readout(*p, packed, first, rows, scratch_of(kernels->readout_scratch(*p)));
  });
  return nullptr;
}

JK_EXPORT const char* jk_latent_rollout_cpu_readout_gradient(const jk_rollout_readout_params* p,
                                                             int isa,
                                                             jk_parallel_for parallel_for) {
  if (p->signs == nullptr) return jk_latent_rollout_cpu_readout(p, isa, parallel_for);
  const Kernels* kernels;
  if (const char* missing = find_kernels(isa, p->operand, kernels)) return missing;
  over_tiles(parallel_for, p->rows, kTileRows, [&](int64_t, int64_t first, int64_t rows) {
    kernels->gradient_from_signs(*p, first, rows);
  });
  return nullptr;
}

JK_EXPORT int64_t jk_latent_rollout_cpu_gru_tiles(int64_t rows) {
  return (rows + kTileRows - 1) / kTileRows;
}

JK_EXPORT const char* jk_latent_rollout_cpu_gru_fwd(const jk_rollout_gru_params* p, int isa,
                                                    jk_parallel_for parallel_for) {
  const Kernels* kernels;
  if (const char* missing = find_kernels(isa, p->operand, kernels)) return missing;
  Packer pack(*kernels, parallel_for);
  const Packed packed = pack_gru(pack, *kernels, *p, false);
  over_tiles(parallel_for, p->rows, kTileRows, [&](int64_t, int64_t first, int64_t rows) {
    kernels->gru_forward(*p, packed, first, rows, scratch_of(kernels->gru_scratch(*p)));
  });
  return nullptr;
}

JK_EXPORT const char* jk_latent_rollout_cpu_gru_bwd(const jk_rollout_gru_params* p, int isa,
                                                    jk_parallel_for parallel_for) {
  const Kernels* kernels;
  if (const char* missing = find_kernels(isa, p->operand, kernels)) return missing;
  Packer pack(*kernels, parallel_for);
  const Packed packed = pack_gru(pack, *kernels, *p, true);
  over_tiles(parallel_for, p->rows, kTileRows, [&](int64_t tile, int64_t first, int64_t rows) {
    kernels->gru_backward(*p, packed, first, rows, tile, scratch_of(kernels->gru_scratch(*p)));
  });
  return nullptr;
}
