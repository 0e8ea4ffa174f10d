// latent_rollout on a GPU: one block per tile of rows, all steps in one launch, no atomics, so
// results repeat bitwise.
#include "gru.cuh"
#include "hamiltonian.cuh"
#include "mlp.cuh"
#include "readout.cuh"

namespace jk::rollout {
namespace {

const char* const kTooWide =
    "latent_rollout: hidden must be narrow enough for the shared memory of a block.";

unsigned tiles_of(int64_t rows) { return unsigned((rows + kTile - 1) / kTile); }

// What a launch needs of shared memory: bytes of its tiles, and the matrices that its blocks read.
struct Needs {
  size_t tiles;
  Extent matrices[2];
};

template <class T, class Params>
const char* start(void (*kernel)(const Params, const Placement), const Params& p,
                  const Needs& needs, unsigned steps, void* stream) {
  const size_t limit = most_dynamic_shared();
  const Placement placement = place<T>(needs.tiles, needs.matrices, limit);
  if (placement.bytes > limit) return kTooWide;
  if (const char* error = allow_dynamic_shared(kernel, placement.bytes)) return error;
  JK_LAUNCH(kernel, dim3(tiles_of(p.rows), steps), dim3(kThreads), placement.bytes, stream, p,
            placement);
  return launch_error();
}

// Launches the instance of a kernel for p.operand; needs(number) says what it needs for operands of
// the type of that number.
template <class Params, class NeedsOf, class Kernel = void (*)(const Params, const Placement)>
const char* launch(const Params& p, Kernel of_float, Kernel of_bfloat, Kernel of_half,
                   const NeedsOf& needs, unsigned steps, void* stream) {
  if (p.rows == 0) return nullptr;
  if (p.operand == JK_BFLOAT16)
    return start<bfloat16>(of_bfloat, p, needs(bfloat16{}), steps, stream);
  if (p.operand == JK_FLOAT16) return start<float16>(of_half, p, needs(float16{}), steps, stream);
  return start<float>(of_float, p, needs(0.f), steps, stream);
}

}  // namespace
}  // namespace jk::rollout

using namespace jk::rollout;

// A test that needs fewer types compiles fewer.
#ifndef JK_INSTANCES
#define JK_INSTANCES(name) name<float>, name<jk::bfloat16>, name<jk::float16>
#endif

JK_EXPORT const char* jk_latent_rollout_cuda_mlp_fwd(const jk_rollout_mlp_params* p, void* stream) {
  const auto needs = [&](auto number) -> Needs {
    return {mlp_fwd_tiles<decltype(number)>(p->hidden),
            {{p->hidden, p->hidden, 1, p->horizon - 1}, {}}};
  };
  return launch(*p, JK_INSTANCES(latent_rollout_mlp_fwd_kernel), needs, 1, stream);
}

JK_EXPORT const char* jk_latent_rollout_cuda_mlp_bwd(const jk_rollout_mlp_params* p, void* stream) {
  const auto needs = [&](auto number) -> Needs {
    return {mlp_bwd_tiles<decltype(number)>(p->hidden),
            {{p->hidden, p->hidden, 1, p->horizon - 1}, {}}};
  };
  return launch(*p, JK_INSTANCES(latent_rollout_mlp_bwd_kernel), needs, 1, stream);
}

JK_EXPORT const char* jk_latent_rollout_cuda_hamiltonian_fwd(const jk_rollout_hamiltonian_params* p,
                                                             void* stream) {
  const auto needs = [&](auto number) -> Needs {
    return {
        hamiltonian_tiles<decltype(number)>(p->hidden, p->middle),
        {{p->middle, p->hidden, 1, 4 * p->horizon}, {p->hidden, p->hidden, 1, 2 * p->horizon - 1}}};
  };
  return launch(*p, JK_INSTANCES(latent_rollout_hamiltonian_fwd_kernel), needs, 1, stream);
}

JK_EXPORT const char* jk_latent_rollout_cuda_hamiltonian_bwd(
    const jk_rollout_hamiltonian_step_params* p, void* stream) {
  const auto needs = [&](auto number) -> Needs {
    return {hamiltonian_tiles<decltype(number)>(p->hidden, p->middle),
            {{p->middle, p->hidden, 1, 4}, {p->hidden, p->hidden, 1, p->time_step != 0.f}}};
  };
  return launch(*p, JK_INSTANCES(latent_rollout_hamiltonian_bwd_kernel), needs, 1, stream);
}

JK_EXPORT const char* jk_latent_rollout_cuda_readout(const jk_rollout_readout_params* p,
                                                     void* stream) {
  const auto needs = [&](auto number) -> Needs {
    return {readout_tiles<decltype(number)>(p->hidden), {{p->channels, p->hidden, 1, 1}, {}}};
  };
  return launch(*p, JK_INSTANCES(latent_rollout_readout_kernel), needs, unsigned(p->steps), stream);
}

JK_EXPORT const char* jk_latent_rollout_cuda_readout_gradient(const jk_rollout_readout_params* p,
                                                              void* stream) {
  if (p->steps != 1)
    return "latent_rollout: the gradient of errors must be asked for one step at a time.";
  return jk_latent_rollout_cuda_readout(p, stream);
}

JK_EXPORT int64_t jk_latent_rollout_cuda_gru_tiles(int64_t rows) { return tiles_of(rows); }

JK_EXPORT const char* jk_latent_rollout_cuda_gru_fwd(const jk_rollout_gru_params* p, void* stream) {
  const auto needs = [&](auto number) -> Needs {
    return {gru_fwd_tiles<decltype(number)>(p->channels),
            {{p->channels, p->channels, 3, p->horizon}, {p->channels, p->actions, 3, p->horizon}}};
  };
  return launch(*p, JK_INSTANCES(latent_rollout_gru_fwd_kernel), needs, 1, stream);
}

JK_EXPORT const char* jk_latent_rollout_cuda_gru_bwd(const jk_rollout_gru_params* p, void* stream) {
  const auto needs = [&](auto number) -> Needs {
    return {gru_bwd_tiles<decltype(number)>(p->channels),
            {{p->channels, p->channels, 3, p->horizon}, {}}};
  };
  return launch(*p, JK_INSTANCES(latent_rollout_gru_bwd_kernel), needs, 1, stream);
}
