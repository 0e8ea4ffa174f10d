// What one thread does of an adamw_ema step, built once for every instruction set.
#include "kernels.h"

#include <math.h>

#include "../../ema_update/cpu/block.h"
#include "../../ema_update/cpu/list.h"

#pragma GCC push_options
// Lanes as a template argument drops an alignment attribute that the loads and stores here do not
// rely on.
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC optimize("fp-contract=off")

namespace jk::adamw {
namespace {

using namespace jk::ema;

// A register of floats, with the operators of the compiler's vector extension. The vectoriser does
// not manage sqrtf, which may set errno.
#if defined(__AVX2__)
typedef __m256 Lanes;
inline Lanes load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Lanes x) { _mm256_storeu_ps(p, x); }
inline Lanes square_root(Lanes x) { return _mm256_sqrt_ps(x); }
inline Lanes every(float x) { return _mm256_set1_ps(x); }
#elif defined(__SSE2__)
typedef __m128 Lanes;
inline Lanes load(const float* p) { return _mm_loadu_ps(p); }
inline void store(float* p, Lanes x) { _mm_storeu_ps(p, x); }
inline Lanes square_root(Lanes x) { return _mm_sqrt_ps(x); }
inline Lanes every(float x) { return _mm_set1_ps(x); }
#else
typedef float Lanes;
inline Lanes load(const float* p) { return *p; }
inline void store(float* p, Lanes x) { *p = x; }
inline Lanes every(float x) { return x; }
#endif
inline float square_root(float x) { return sqrtf(x); }

constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);

// Elements of one block of a parameter and its moments, in float32.
struct AdamwBlock {
  float *param, *exp_avg, *exp_avg_sq;
  const float* grad;
};

// The hyperparameters of `Step`, each in every lane of T.
template <class T>
struct AdamwCoefficients {
  T decay, grad_factor, take1, beta2, take2, size, inverse_sqrt2, eps;
};

template <class T>
inline void adamw_elements(T& param, T grad, T& exp_avg, T& exp_avg_sq,
                           const AdamwCoefficients<T>& c) {
  grad = grad * c.grad_factor;
  exp_avg = exp_avg + c.take1 * (grad - exp_avg);
  exp_avg_sq = c.beta2 * exp_avg_sq + c.take2 * (grad * grad);
  param =
      param * c.decay - c.size * (exp_avg / (square_root(exp_avg_sq) * c.inverse_sqrt2 + c.eps));
}

inline void adamw(const AdamwBlock& block, int64_t n, const Step& s) {
  const AdamwCoefficients<Lanes> c{every(s.decay),         every(s.grad_factor), every(s.take1),
                                   every(s.beta2),         every(s.take2),       every(s.size),
                                   every(s.inverse_sqrt2), every(s.eps)};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Lanes param = load(block.param + i), exp_avg = load(block.exp_avg + i),
          exp_avg_sq = load(block.exp_avg_sq + i);
    adamw_elements(param, load(block.grad + i), exp_avg, exp_avg_sq, c);
    store(block.param + i, param);
    store(block.exp_avg + i, exp_avg);
    store(block.exp_avg_sq + i, exp_avg_sq);
  }
  const AdamwCoefficients<float> one{s.decay, s.grad_factor, s.take1,         s.beta2,
                                     s.take2, s.size,        s.inverse_sqrt2, s.eps};
  for (; i < n; i++)
    adamw_elements(block.param[i], block.grad[i], block.exp_avg[i], block.exp_avg_sq[i], one);
}

// The elements to work on: the array itself where it is float32, else a widened copy that the
// caller narrows back.
inline float* working(void* data, int32_t dtype, int64_t first, int64_t n, float* buffer) {
  return const_cast<float*>(widen(data, dtype, first, n, buffer));
}

inline void adamw_ema_block(const jk_adamw_tensor& t, const Step& scalars, int64_t first, int64_t n,
                            const jk_adamw_ema_params& p, EmaWeights w) {
  alignas(64) float param[kBlock], grad[kBlock], exp_avg[kBlock], exp_avg_sq[kBlock];
  const AdamwBlock block{working(t.param, t.param_dtype, first, n, param),
                         working(t.exp_avg, t.state_dtype, first, n, exp_avg),
                         working(t.exp_avg_sq, t.state_dtype, first, n, exp_avg_sq),
                         widen(t.grad, t.grad_dtype, first, n, grad)};
  adamw(block, n, scalars);
  if (t.state_dtype != JK_FLOAT32) {
    narrow(t.exp_avg, t.state_dtype, first, n, exp_avg);
    narrow(t.exp_avg_sq, t.state_dtype, first, n, exp_avg_sq);
  }
  const float* source = block.param;
  if (t.param_dtype != JK_FLOAT32) {
    narrow(t.param, t.param_dtype, first, n, param);
    // The teacher follows the parameter as stored.
    source = widen(t.param, t.param_dtype, first, n, param);
  }
  if (t.ema.target != nullptr)
    average_block(t.ema, first, n, source, w, p.rounding,
                  random_key((uint64_t)p.seed, (uint64_t)t.ema.index));
}

}  // namespace

template <>
void step<JK_KERNEL_ISA>(int64_t begin, int64_t end, void* context) {
  const Job& job = *(const Job*)context;
  const jk_adamw_ema_params& p = *job.params;
  const EmaWeights w = ema_weights(p.momentum);
  for_each_block(job.ends, p.num_tensors, begin, end, kBlock,
                 [&](int64_t tensor, int64_t first, int64_t n) {
                   adamw_ema_block(p.tensors[tensor], job.steps[tensor], first, n, p, w);
                 });
}

}  // namespace jk::adamw

#pragma GCC pop_options
