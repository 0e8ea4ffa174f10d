// latent_rollout on torch's stable ABI: describes tensors to the C ABI of params.h. No arithmetic
// here.
#include "params.h"

#include "../binding.h"

namespace jk::rollout {
namespace {

using Optional = std::optional<Tensor>;
using Sentence = const char*;

void check(bool holds, const char* argument, const char* requirement) {
  STD_TORCH_CHECK(holds, "latent_rollout: ", argument, " must ", requirement, ".");
}

// A matrix that multiplies, of the dtype to which the product rounds.
const void* matrix(const Tensor& t, const char* argument, std::initializer_list<int64_t> shape) {
  check(t.is_contiguous(), argument, "be contiguous");
  check(t.dim() == (int64_t)shape.size(), argument,
        "have the number of dimensions that the kernel reads");
  int64_t i = 0;
  for (const int64_t size : shape)
    check(t.size(i++) == size, argument, "have the sizes that the other tensors imply");
  return t.const_data_ptr();
}

void check_float(const Tensor& t, const char* argument, std::initializer_list<int64_t> shape) {
  check(t.scalar_type() == ScalarType::Float, argument, "be float32");
  matrix(t, argument, shape);
}

int64_t operand(const Tensor& t) { return dtype_code("latent_rollout", t); }

const float* numbers(const Tensor& t) { return t.const_data_ptr<float>(); }
float* filled(Tensor& t) { return t.mutable_data_ptr<float>(); }

Tensor floats(const Tensor& like, std::vector<int64_t> shape) {
  Tensor fresh = fresh_tensor(like, shape, ScalarType::Float);
  advise_huge_pages(fresh);
  return fresh;
}

// Numbers that only go into products: on a CPU in the dtype of the operand.
Tensor operands(const Tensor& like, std::vector<int64_t> shape, int64_t operand) {
  if (!like.is_cpu() || operand == JK_FLOAT32) return floats(like, shape);
  Tensor fresh = fresh_tensor(like, shape, ScalarType::BFloat16);
  advise_huge_pages(fresh);
  return fresh;
}

// The C function of an op on the processor or, by name, on the GPU of `like`.
struct Device {
  int64_t isa;
  bool cuda;

  template <class Params>
  void run(const Params& p, Sentence (*cpu)(const Params*, int, jk_parallel_for), const char* name,
           const Tensor& like) const {
    if (!cuda) {
      check_sentence(cpu(&p, isa_code(isa), parallel_for));
      return;
    }
    run_on_gpu(name, p, like);
  }
};

Device device_of(const Tensor& t, int64_t isa) { return {isa, !t.is_cpu()}; }

std::tuple<Tensor, Tensor> mlp_fwd(const Tensor& start, const Optional& coupling,
                                   const Optional& drift, int64_t horizon, bool keep_all, bool save,
                                   int64_t isa) {
  const int64_t rows = start.size(0), hidden = start.size(1), kept = keep_all ? horizon : 1;
  check(horizon >= 1, "horizon", "be at least 1");
  check_float(start, "start", {rows, hidden});
  check((coupling.has_value() && drift.has_value()) || horizon == 1, "coupling",
        "be given for more than one step");
  if (horizon > 1) check_float(*drift, "drift", {hidden});
  Tensor sums = floats(start, {kept, rows, hidden});
  Tensor inputs =
      floats(start, save ? std::vector<int64_t>{horizon, rows, hidden} : std::vector<int64_t>{0});
  jk_rollout_mlp_params p{};
  p.rows = rows;
  p.hidden = hidden;
  p.horizon = horizon;
  p.kept = kept;
  p.start = numbers(start);
  p.coupling = horizon > 1 ? matrix(*coupling, "coupling", {hidden, hidden}) : nullptr;
  p.operand = horizon > 1 ? operand(*coupling) : int64_t(JK_FLOAT32);
  p.drift = horizon > 1 ? numbers(*drift) : nullptr;
  p.sums = filled(sums);
  p.inputs = save ? filled(inputs) : nullptr;
  device_of(start, isa)
      .run(p, jk_latent_rollout_cpu_mlp_fwd, "jk_latent_rollout_cuda_mlp_fwd", start);
  return {inputs, sums};
}

std::tuple<Tensor, Tensor> mlp_bwd(const Tensor& inputs, const Optional& coupling,
                                   const Tensor& grad_sums, int64_t isa) {
  const int64_t horizon = inputs.size(0), rows = inputs.size(1), hidden = inputs.size(2),
                kept = grad_sums.size(0);
  check_float(inputs, "inputs", {horizon, rows, hidden});
  check(kept == 1 || kept == horizon, "grad_sums", "hold one step or all");
  check_float(grad_sums, "grad_sums", {kept, rows, hidden});
  check(coupling.has_value() || horizon == 1, "coupling", "be given for more than one step");
  jk_rollout_mlp_params p{};
  p.rows = rows;
  p.hidden = hidden;
  p.horizon = horizon;
  p.kept = kept;
  p.coupling = horizon > 1 ? matrix(*coupling, "coupling", {hidden, hidden}) : nullptr;
  p.operand = horizon > 1 ? operand(*coupling) : int64_t(JK_FLOAT32);
  p.inputs = const_cast<float*>(numbers(inputs));
  p.grad_sums = numbers(grad_sums);
  Tensor grad_inputs = operands(inputs, {horizon, rows, hidden}, p.operand);
  Tensor activations = operands(inputs, {horizon - 1, rows, hidden}, p.operand);
  p.grad_inputs = grad_inputs.mutable_data_ptr();
  p.activations = activations.mutable_data_ptr();
  device_of(inputs, isa)
      .run(p, jk_latent_rollout_cpu_mlp_bwd, "jk_latent_rollout_cuda_mlp_bwd", inputs);
  return {grad_inputs, activations};
}

std::tuple<Tensor, Tensor> hamiltonian_fwd(const Tensor& start, const Tensor& weight,
                                           const Tensor& bias, const Tensor& energy,
                                           const Tensor& coupling, double time_step,
                                           int64_t horizon, bool keep_all, bool save, int64_t isa) {
  const int64_t rows = start.size(0), hidden = start.size(1), middle = weight.size(0),
                kept = keep_all ? horizon : 1;
  check(horizon >= 1, "horizon", "be at least 1");
  check_float(start, "start", {rows, hidden});
  check(weight.scalar_type() == coupling.scalar_type(), "weight", "have the dtype of coupling");
  check_float(bias, "bias", {middle});
  check_float(energy, "energy", {1, middle});
  Tensor sums = floats(start, {2, kept, rows, hidden});
  Tensor inputs = floats(
      start, save ? std::vector<int64_t>{2 * horizon, rows, hidden} : std::vector<int64_t>{0});
  jk_rollout_hamiltonian_params p{};
  p.rows = rows;
  p.hidden = hidden;
  p.middle = middle;
  p.horizon = horizon;
  p.kept = kept;
  p.time_step = (float)time_step;
  p.start = numbers(start);
  p.weight = matrix(weight, "weight", {middle, hidden});
  p.bias = numbers(bias);
  p.energy = numbers(energy);
  p.coupling = matrix(coupling, "coupling", {hidden, hidden});
  p.operand = operand(coupling);
  p.sums = filled(sums);
  p.inputs = save ? filled(inputs) : nullptr;
  device_of(start, isa)
      .run(p, jk_latent_rollout_cpu_hamiltonian_fwd, "jk_latent_rollout_cuda_hamiltonian_fwd",
           start);
  return {inputs, sums};
}

std::vector<Tensor> hamiltonian_bwd(const Tensor& input, const Tensor& weight, const Tensor& bias,
                                    const Tensor& energy, const Tensor& coupling, double time_step,
                                    bool transposed, const Tensor& following, Tensor carried,
                                    int64_t isa) {
  const int64_t rows = input.size(0), hidden = input.size(1), middle = weight.size(0);
  check_float(input, "input", {rows, hidden});
  check_float(following, "following", {rows, hidden});
  check_float(carried, "carried", {rows, hidden});
  check(weight.scalar_type() == coupling.scalar_type(), "weight", "have the dtype of coupling");
  check_float(bias, "bias", {middle});
  check_float(energy, "energy", {1, middle});
  Tensor force = floats(input, {rows, hidden});
  // Stacked as their product needs them: [pulled; grad_middle]^T [grad_returned; activation] is the
  // gradient of W2.
  Tensor left = floats(input, {2, rows, middle}), right = floats(input, {2, rows, hidden}),
         grad_energy = floats(input, {rows, middle});
  jk_rollout_hamiltonian_step_params p{};
  p.rows = rows;
  p.hidden = hidden;
  p.middle = middle;
  p.transposed = transposed;
  p.time_step = (float)time_step;
  p.weight = matrix(weight, "weight", {middle, hidden});
  p.bias = numbers(bias);
  p.energy = numbers(energy);
  p.coupling = matrix(coupling, "coupling", {hidden, hidden});
  p.operand = operand(coupling);
  p.input = numbers(input);
  p.following = numbers(following);
  p.carried = filled(carried);
  p.force = filled(force);
  p.pulled = filled(left);
  p.grad_middle = filled(left) + rows * middle;
  p.grad_returned = filled(right);
  p.activation = filled(right) + rows * hidden;
  p.grad_energy = filled(grad_energy);
  device_of(input, isa)
      .run(p, jk_latent_rollout_cpu_hamiltonian_bwd, "jk_latent_rollout_cuda_hamiltonian_bwd",
           input);
  return {force, left, right, grad_energy};
}

jk_rollout_rows table(const Tensor& t, const Optional& index, const char* argument,
                      int64_t channels) {
  check(t.size(t.dim() - 1) == channels && (channels < 2 || t.stride(t.dim() - 1) == 1), argument,
        "have the channels of out side by side");
  jk_rollout_rows rows{t.const_data_ptr(), nullptr, t.stride(t.dim() - 2),
                       dtype_code("latent_rollout", t)};
  check(!t.is_cpu() || rows.dtype == JK_FLOAT32 || rows.dtype == JK_BFLOAT16, argument,
        "be float32 or bfloat16 on a CPU");
  if (index.has_value()) {
    check(index->scalar_type() == ScalarType::Long && index->is_contiguous(), argument,
          "be indexed by contiguous int64 rows");
    rows.index = index->const_data_ptr<int64_t>();
    // On a GPU the dispatching op checks them, where it is asked to.
    const int64_t count = t.size(t.dim() - 2);
    for (int64_t i = 0; t.is_cpu() && i < index->numel(); ++i)
      STD_TORCH_CHECK(rows.index[i] >= 0 && rows.index[i] < count, "latent_rollout: ", argument,
                      "_rows must hold rows from 0 to ", count - 1, ", got ", rows.index[i], ".");
  }
  return rows;
}

jk_rollout_readout_params describe(const Tensor& sums, const Tensor& weight, const Optional& bias,
                                   const Tensor& base, const Optional& base_rows,
                                   int64_t first_step) {
  const int64_t channels = weight.size(1);
  check_float(sums, "sums", {sums.size(0), sums.size(1), weight.size(0)});
  if (bias.has_value()) check_float(*bias, "bias", {channels});
  check(base.dim() == 2, "base", "be [rows, D]");
  check(base_rows.has_value() ? base_rows->size(0) == sums.size(1) : base.size(0) == sums.size(1),
        "base", "have one row per row of sums");
  jk_rollout_readout_params p{};
  p.steps = sums.size(0);
  p.rows = sums.size(1);
  p.hidden = sums.size(2);
  p.channels = channels;
  p.first_step = first_step;
  p.sums = numbers(sums);
  p.weight = weight.const_data_ptr();
  p.operand = operand(weight);
  p.weight_row_stride = weight.stride(0);
  p.weight_column_stride = weight.stride(1);
  p.bias = bias.has_value() ? numbers(*bias) : nullptr;
  p.base = table(base, base_rows, "base", channels);
  return p;
}

void set_targets(jk_rollout_readout_params& p, const Tensor& targets, const Optional& target_rows,
                 double exponent) {
  check(targets.dim() == (target_rows.has_value() ? 2 : 3), "targets",
        "be [steps, rows, D], or a table with target_rows");
  check(target_rows.has_value() ? target_rows->numel() == p.steps * p.rows
                                : targets.size(0) == p.steps && targets.size(1) == p.rows,
        "targets", "have one row per step and row");
  p.targets = table(targets, target_rows, "target", p.channels);
  p.target_step_stride = target_rows.has_value() ? 0 : targets.stride(0);
  p.exponent = (float)exponent;
}

void readout(const Tensor& sums, const Tensor& weight, const Optional& bias, const Tensor& base,
             const Optional& base_rows, int64_t first_step, Tensor out, int64_t isa) {
  auto p = describe(sums, weight, bias, base, base_rows, first_step);
  check(out.dim() == 3 && out.size(0) == p.steps && out.size(1) == p.rows &&
            out.size(2) == p.channels && out.stride(2) == 1,
        "out", "be [steps, rows, D] with channel stride 1");
  p.out = out.mutable_data_ptr();
  p.out_step_stride = out.stride(0);
  p.out_row_stride = out.stride(1);
  p.out_dtype = dtype_code("latent_rollout", out);
  check(!out.is_cpu() || p.out_dtype == p.operand, "out", "have the dtype of weight on a CPU");
  device_of(sums, isa).run(p, jk_latent_rollout_cpu_readout, "jk_latent_rollout_cuda_readout",
                           sums);
}

std::tuple<Tensor, Tensor> errors(const Tensor& sums, const Tensor& weight, const Optional& bias,
                                  const Tensor& base, const Optional& base_rows,
                                  const Tensor& targets, const Optional& target_rows,
                                  double exponent, bool save_signs, int64_t isa) {
  auto p = describe(sums, weight, bias, base, base_rows, 1);
  set_targets(p, targets, target_rows, exponent);
  Tensor values = floats(sums, {p.steps, p.rows});
  const std::vector<int64_t> planes =
      save_signs ? std::vector<int64_t>{p.steps, p.rows, 2 * ((p.channels + 7) / 8)}
                 : std::vector<int64_t>{0};
  Tensor signs = fresh_tensor(sums, planes, ScalarType::Byte);
  p.errors = filled(values);
  p.signs = save_signs ? signs.mutable_data_ptr<uint8_t>() : nullptr;
  device_of(sums, isa).run(p, jk_latent_rollout_cpu_readout, "jk_latent_rollout_cuda_readout",
                           sums);
  return {values, signs};
}

Tensor errors_gradient(const Tensor& sums, const Tensor& weight, const Optional& bias,
                       const Tensor& base, const Optional& base_rows, const Tensor& targets,
                       const Optional& target_rows, double exponent, const Optional& signs,
                       int64_t first_step, const Tensor& grad_errors, Tensor grad_base,
                       int64_t isa) {
  auto p = describe(sums, weight, bias, base, base_rows, first_step);
  set_targets(p, targets, target_rows, exponent);
  check_float(grad_errors, "grad_errors", {p.steps, p.rows});
  check(grad_base.scalar_type() == ScalarType::Float && grad_base.size(0) == p.rows &&
            grad_base.size(1) == p.channels && grad_base.stride(1) == 1,
        "grad_base", "be float32 [rows, D] with channel stride 1");
  Tensor grad = operands(sums, {p.steps, p.rows, p.channels}, p.operand);
  p.grad_errors = numbers(grad_errors);
  p.grad = grad.mutable_data_ptr();
  p.grad_base = filled(grad_base);
  p.grad_base_stride = grad_base.stride(0);
  if (signs.has_value()) {
    check(signs->is_contiguous() && signs->numel() == p.steps * p.rows * 2 * ((p.channels + 7) / 8),
          "signs", "be what errors returned");
    p.signs = const_cast<uint8_t*>(signs->const_data_ptr<uint8_t>());
  }
  device_of(sums, isa).run(p, jk_latent_rollout_cpu_readout_gradient,
                           "jk_latent_rollout_cuda_readout_gradient", sums);
  return grad;
}

jk_rollout_gru_params describe_gru(const Tensor& start, const Tensor& actions,
                                   const std::vector<Tensor>& weights, double epsilon) {
  const int64_t horizon = actions.size(0), rows = actions.size(1), width = actions.size(2),
                channels = start.size(1);
  check(horizon >= 1, "horizon", "be at least 1");
  check(start.scalar_type() == ScalarType::Float && start.size(0) == rows &&
            (channels < 2 || start.stride(1) == 1),
        "start", "be float32 [rows, D] with channel stride 1");
  check_float(actions, "actions", {horizon, rows, width});
  check(weights.size() == 6, "weights", "be the six tensors of a GRU");
  check(weights[0].scalar_type() == weights[1].scalar_type(), "weight_input",
        "have the dtype of weight_state");
  for (int i = 2; i < 4; ++i) check_float(weights[i], "bias", {3 * channels});
  for (int i = 4; i < 6; ++i) check_float(weights[i], "norm", {channels});
  jk_rollout_gru_params p{};
  p.rows = rows;
  p.channels = channels;
  p.actions = width;
  p.horizon = horizon;
  p.epsilon = (float)epsilon;
  p.start = numbers(start);
  p.start_stride = start.stride(0);
  p.action = numbers(actions);
  p.weight_input = matrix(weights[0], "weight_input", {3 * channels, width});
  p.weight_state = matrix(weights[1], "weight_state", {3 * channels, channels});
  p.operand = operand(weights[1]);
  p.bias_input = numbers(weights[2]);
  p.bias_state = numbers(weights[3]);
  p.norm_weight = numbers(weights[4]);
  p.norm_bias = numbers(weights[5]);
  return p;
}

std::tuple<Tensor, Tensor> gru_fwd(const Tensor& start, const Tensor& actions,
                                   std::vector<Tensor> weights, double epsilon, bool keep_all,
                                   bool save, int64_t isa) {
  auto p = describe_gru(start, actions, weights, epsilon);
  p.kept = keep_all ? p.horizon : 1;
  Tensor states = floats(start, {p.kept, p.rows, p.channels});
  Tensor gates = floats(start, save ? std::vector<int64_t>{p.horizon, p.rows, 4 * p.channels}
                                    : std::vector<int64_t>{0});
  p.states = filled(states);
  p.gates = save ? filled(gates) : nullptr;
  device_of(start, isa)
      .run(p, jk_latent_rollout_cpu_gru_fwd, "jk_latent_rollout_cuda_gru_fwd", start);
  return {states, gates};
}

std::vector<Tensor> gru_bwd(const Tensor& start, const Tensor& actions, const Tensor& states,
                            const Tensor& gates, std::vector<Tensor> weights, double epsilon,
                            const Tensor& grad_states, bool every_step, int64_t isa) {
  auto p = describe_gru(start, actions, weights, epsilon);
  p.kept = p.horizon;
  check_float(states, "states", {p.horizon, p.rows, p.channels});
  check_float(gates, "gates", {p.horizon, p.rows, 4 * p.channels});
  check(grad_states.scalar_type() == ScalarType::Float && grad_states.is_contiguous(),
        "grad_states", "be contiguous float32");
  check(grad_states.numel() == (every_step ? p.horizon : 1) * p.rows * p.channels, "grad_states",
        "have one gradient per kept state");
  const int64_t tiles = start.is_cpu() ? jk_latent_rollout_cpu_gru_tiles(p.rows)
                                       : reinterpret_cast<int64_t (*)(int64_t)>(cuda_symbol(
                                             "jk_latent_rollout_cuda_gru_tiles"))(p.rows);
  const bool cpu = start.is_cpu();
  Tensor grad_gates = operands(start, {p.horizon, p.rows, (cpu ? 3 : 4) * p.channels}, p.operand);
  Tensor grad_start = floats(start, {p.rows, p.channels});
  Tensor grad_norm = floats(start, {tiles, 2, p.channels});
  Tensor grad_actions = floats(start, {cpu ? p.horizon : 0, p.rows, p.actions});
  Tensor grad_small = floats(start, {cpu ? tiles : 0, 1 + p.actions, 4 * p.channels});
  p.states = const_cast<float*>(numbers(states));
  p.gates = const_cast<float*>(numbers(gates));
  p.grad_states = numbers(grad_states);
  p.every_step = every_step;
  p.grad_gates = grad_gates.mutable_data_ptr();
  p.grad_actions = filled(grad_actions);
  p.grad_small = filled(grad_small);
  p.grad_start = filled(grad_start);
  p.grad_norm = filled(grad_norm);
  device_of(start, isa)
      .run(p, jk_latent_rollout_cpu_gru_bwd, "jk_latent_rollout_cuda_gru_bwd", start);
  return {grad_gates, grad_start, grad_norm, grad_actions, grad_small};
}

}  // namespace
}  // namespace jk::rollout

JK_LIBRARY_FRAGMENT(m) {
  m.def(
      "latent_rollout_mlp_fwd(Tensor start, Tensor? coupling, Tensor? drift, int horizon, bool "
      "keep_all, bool save, int isa) -> (Tensor, "
      "Tensor)");
  m.def(
      "latent_rollout_mlp_bwd(Tensor inputs, Tensor? coupling, Tensor grad_sums, int isa) -> "
      "(Tensor, Tensor)");
  m.def(
      "latent_rollout_hamiltonian_fwd(Tensor start, Tensor weight, Tensor bias, Tensor energy, "
      "Tensor coupling, float time_step, int "
      "horizon, "
      "bool keep_all, bool save, int isa) -> (Tensor, Tensor)");
  m.def(
      "latent_rollout_hamiltonian_bwd(Tensor input, Tensor weight, Tensor bias, Tensor energy, "
      "Tensor coupling, float time_step, "
      "bool transposed, Tensor following, Tensor(a!) carried, int isa) -> Tensor[]");
  m.def(
      "latent_rollout_readout(Tensor sums, Tensor weight, Tensor? bias, Tensor base, Tensor? "
      "base_rows, int first_step, Tensor(a!) out, "
      "int isa) "
      "-> ()");
  m.def(
      "latent_rollout_errors(Tensor sums, Tensor weight, Tensor? bias, Tensor base, Tensor? "
      "base_rows, Tensor targets, Tensor? "
      "target_rows, "
      "float exponent, bool save_signs, int isa) -> (Tensor, Tensor)");
  m.def(
      "latent_rollout_errors_gradient(Tensor sums, Tensor weight, Tensor? bias, Tensor base, "
      "Tensor? base_rows, Tensor targets, "
      "Tensor? target_rows, float exponent, Tensor? signs, int first_step, Tensor grad_errors, "
      "Tensor(a!) grad_base, int isa) -> Tensor");
  m.def(
      "latent_rollout_gru_fwd(Tensor start, Tensor actions, Tensor[] weights, float epsilon, bool "
      "keep_all, bool save, int isa) "
      "-> (Tensor, Tensor)");
  m.def(
      "latent_rollout_gru_bwd(Tensor start, Tensor actions, Tensor states, Tensor gates, Tensor[] "
      "weights, float epsilon, Tensor "
      "grad_states, "
      "bool every_step, int isa) -> Tensor[]");
}

#define JK_LATENT_ROLLOUT_KERNELS(m)                                                  \
  m.impl("latent_rollout_mlp_fwd", TORCH_BOX(&jk::rollout::mlp_fwd));                 \
  m.impl("latent_rollout_mlp_bwd", TORCH_BOX(&jk::rollout::mlp_bwd));                 \
  m.impl("latent_rollout_hamiltonian_fwd", TORCH_BOX(&jk::rollout::hamiltonian_fwd)); \
  m.impl("latent_rollout_hamiltonian_bwd", TORCH_BOX(&jk::rollout::hamiltonian_bwd)); \
  m.impl("latent_rollout_readout", TORCH_BOX(&jk::rollout::readout));                 \
  m.impl("latent_rollout_errors", TORCH_BOX(&jk::rollout::errors));                   \
  m.impl("latent_rollout_errors_gradient", TORCH_BOX(&jk::rollout::errors_gradient)); \
  m.impl("latent_rollout_gru_fwd", TORCH_BOX(&jk::rollout::gru_fwd));                 \
  m.impl("latent_rollout_gru_bwd", TORCH_BOX(&jk::rollout::gru_bwd))

JK_LIBRARY_IMPL(CPU, m) { JK_LATENT_ROLLOUT_KERNELS(m); }
JK_LIBRARY_IMPL(CUDA, m) { JK_LATENT_ROLLOUT_KERNELS(m); }
