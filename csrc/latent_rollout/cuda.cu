// latent_rollout on a GPU: one block per tile of rows, all steps in one launch, no atomics, so results repeat bitwise.
#include "cuda_gru.cuh"
#include "cuda_readout.cuh"

namespace {

constexpr size_t kMostShared = 99 * 1024;  // of a block on every supported architecture

const char* const kTooWide = "latent_rollout: hidden must be narrow enough for the shared memory of a block.";

unsigned tiles_of(int64_t rows) { return unsigned((rows + kTile - 1) / kTile); }

template <class Params>
const char* start(void (*kernel)(const Params), const Params& p, size_t bytes, unsigned steps, void* stream) {
  if (bytes > kMostShared) return kTooWide;
  if (const char* error = jk::allow_dynamic_shared(kernel, bytes)) return error;
  JK_LAUNCH(kernel, dim3(tiles_of(p.rows), steps), dim3(kThreads), bytes, stream, p);
  return jk::launch_error();
}

// Launches the instance of a kernel for p.operand, with room for `floats` numbers for each row of a tile.
template <class Params, class Kernel = void (*)(const Params)>
const char* launch(const Params& p, Kernel of_float, Kernel of_bfloat, Kernel of_half, int64_t floats, unsigned steps, void* stream) {
  if (p.rows == 0) return nullptr;
  if (p.operand == JK_BFLOAT16) return start(of_bfloat, p, shared_bytes<jk::bfloat16>(floats), steps, stream);
  if (p.operand == JK_FLOAT16) return start(of_half, p, shared_bytes<jk::float16>(floats), steps, stream);
  return start(of_float, p, shared_bytes<float>(floats), steps, stream);
}

}  // namespace

#define JK_INSTANCES(name) name<float>, name<jk::bfloat16>, name<jk::float16>

JK_EXPORT const char* jk_latent_rollout_cuda_mlp_fwd(const jk_rollout_mlp_params* p, void* stream) {
  return launch(*p, JK_INSTANCES(latent_rollout_mlp_fwd_kernel), 2 * p->hidden, 1, stream);
}

JK_EXPORT const char* jk_latent_rollout_cuda_mlp_bwd(const jk_rollout_mlp_params* p, void* stream) {
  return launch(*p, JK_INSTANCES(latent_rollout_mlp_bwd_kernel), 3 * p->hidden, 1, stream);
}

JK_EXPORT const char* jk_latent_rollout_cuda_hamiltonian_fwd(const jk_rollout_hamiltonian_params* p, void* stream) {
  return launch(*p, JK_INSTANCES(latent_rollout_hamiltonian_fwd_kernel), 2 * p->hidden + p->middle, 1, stream);
}

JK_EXPORT const char* jk_latent_rollout_cuda_hamiltonian_bwd(const jk_rollout_hamiltonian_step_params* p, void* stream) {
  return launch(*p, JK_INSTANCES(latent_rollout_hamiltonian_bwd_kernel), 2 * p->hidden + p->middle, 1, stream);
}

JK_EXPORT const char* jk_latent_rollout_cuda_readout(const jk_rollout_readout_params* p, void* stream) {
  return launch(*p, JK_INSTANCES(latent_rollout_readout_kernel), kColumns, unsigned(p->steps), stream);
}

JK_EXPORT const char* jk_latent_rollout_cuda_readout_gradient(const jk_rollout_readout_params* p, void* stream) {
  if (p->steps != 1) return "latent_rollout: the gradient of errors must be asked for one step at a time.";
  return jk_latent_rollout_cuda_readout(p, stream);
}

JK_EXPORT int64_t jk_latent_rollout_cuda_gru_tiles(int64_t rows) { return tiles_of(rows); }

JK_EXPORT const char* jk_latent_rollout_cuda_gru_fwd(const jk_rollout_gru_params* p, void* stream) {
  return launch(*p, JK_INSTANCES(latent_rollout_gru_fwd_kernel), 2 * p->channels + 2, 1, stream);
}

JK_EXPORT const char* jk_latent_rollout_cuda_gru_bwd(const jk_rollout_gru_params* p, void* stream) {
  return launch(*p, JK_INSTANCES(latent_rollout_gru_bwd_kernel), 2 * p->channels + 4 + (2 * p->channels + kTile - 1) / kTile, 1, stream);
}
