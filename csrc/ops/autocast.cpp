// The dtype that each operator runs in under torch.autocast: torch's own lists. linear is cast
// down, and so are linear_relu and mlp; the losses to float32, and on CUDA log_softmax too, which
// on the CPU keeps the dtype that it gets. Where their kernels read narrow logits as they are, no
// copy is made of them. linear_cross_entropy's product is cast down and its loss up.
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/cross_entropy.h"
#include "ops/linear.h"
#include "ops/linear_cross_entropy.h"
#include "ops/log_softmax.h"
#include "ops/mlp.h"
#include "ops/nll_loss.h"
#include "ops/operands.h"

namespace fastnn {
namespace {

using at::autocast::CastPolicy;

// Registers `function`, which calls the operator through the dispatcher again, below autocast.
template <CastPolicy policy, c10::DeviceType device, auto* function>
constexpr auto* kAutocast =
    &at::autocast::WrapFunction<policy, device, std::remove_pointer_t<decltype(function)>,
                                std::remove_pointer_t<decltype(function)>, function>::type::call;

// The parts of WrapFunction, for functions that take lists or cast some tensors up, others down.
template <c10::DeviceType device>
struct BelowAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(device))};
};

template <c10::DeviceType device>
auto down(const auto& tensor) {
  return at::autocast::cached_cast(at::autocast::get_lower_precision_fp_from_device_type(device),
                                   tensor, device);
}

template <c10::DeviceType device>
auto up(const auto& tensor) {
  return at::autocast::cached_cast(at::kFloat, tensor, device);
}

// Casts the lists.
template <c10::DeviceType device>
at::Tensor mlp_under_autocast(const at::Tensor& input, at::TensorList weights,
                              const OptionalTensors& biases, const Flags& relu) {
  const BelowAutocast<device> below_autocast;
  std::vector<at::Tensor> cast_weights;
  OptionalTensors cast_biases;
  for (const at::Tensor& weight : weights) cast_weights.push_back(down<device>(weight));
  for (size_t i = 0; i < biases.size(); ++i) {
    const std::optional<at::Tensor> bias = biases.get(i);
    cast_biases.push_back(bias ? std::optional(down<device>(*bias)) : std::nullopt);
  }
  return mlp(down<device>(input), cast_weights, cast_biases, relu);
}

template <c10::DeviceType device>
at::Tensor linear_cross_entropy_autocast(const LinearHead& head, const at::Tensor& target,
                                         const LinearLossOptions& options) {
  const BelowAutocast<device> below_autocast;
  LinearLossOptions casted = options;
  casted.weight = up<device>(options.weight);
  if (!casted.dtype) casted.dtype = at::kFloat;
  return linear_cross_entropy(
      {down<device>(head.input), down<device>(head.weight), down<device>(head.bias)},
      up<device>(target), casted);
}

// Whether the kernels read the logits as they are: they would be narrower than float32, and so
// would class probabilities.
bool are_read_narrow(const at::Tensor& logits, const at::Tensor& target) {
  return has_kernels(logits) && accumulate_dtype(logits) != logits.scalar_type() &&
         (!at::isFloatingType(target.scalar_type()) ||
          target.scalar_type() == logits.scalar_type());
}

// Whether a float32 copy costs less than it saves: on a CPU, the backward over narrow logits
// computes each exponential again, which takes longer than a copy of logits that fit a cache.
bool is_copy_faster(const at::Tensor& logits) {
  constexpr int64_t kElementsInCache = 1 << 20;
  return logits.is_cpu() && at::GradMode::is_enabled() && logits.requires_grad() &&
         !logits.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
         logits.numel() <= kElementsInCache;
}

bool is_cross_entropy_read_narrow(const at::Tensor& logits, const at::Tensor& target) {
  return are_read_narrow(logits, target) && !is_copy_faster(logits);
}

template <c10::DeviceType device, auto* loss, auto* is_read_narrow>
at::Tensor loss_autocast(const at::Tensor& input, const at::Tensor& target,
                         const LossOptions& options) {
  const BelowAutocast<device> below_autocast;
  LossOptions wide = options;
  wide.weight = up<device>(options.weight);
  if (!is_read_narrow(input, target)) return loss(up<device>(input), up<device>(target), wide);
  wide.dtype = at::kFloat;
  return loss(input, target, wide);
}

template <c10::DeviceType device>
void register_common(torch::Library& m) {
  m.impl("linear", kAutocast<CastPolicy::lower_precision_fp, device, &linear>);
  m.impl("linear_relu", kAutocast<CastPolicy::lower_precision_fp, device, &linear_relu>);
  m.impl("mlp", mlp_under_autocast<device>);
  m.impl("linear_cross_entropy", as_linear_cross_entropy<linear_cross_entropy_autocast<device>>);
  m.impl("nll_loss", as_nll_loss<loss_autocast<device, &nll_loss, &are_read_narrow>>);
  constexpr auto* cross_entropy_autocast =
      &loss_autocast<device, &cross_entropy, &is_cross_entropy_read_narrow>;
  m.impl("cross_entropy", as_cross_entropy<cross_entropy_autocast>);
}

// The dtype asked for outranks autocast's, as in torch.
template <c10::DeviceType device>
at::Tensor log_softmax_autocast(const at::Tensor& input, int64_t dim,
                                std::optional<at::ScalarType> dtype) {
  const BelowAutocast<device> below_autocast;
  if (dtype) return fastnn::log_softmax(input, dim, dtype);
  if (can_fuse_log_softmax(input, at::kFloat)) return fastnn::log_softmax(input, dim, at::kFloat);
  return fastnn::log_softmax(up<device>(input), dim);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, AutocastCPU, m) {
  register_common<c10::kCPU>(m);
}

TORCH_LIBRARY_IMPL(fastnn, AutocastCUDA, m) {
  register_common<c10::kCUDA>(m);
  m.impl("log_softmax", log_softmax_autocast<c10::kCUDA>);
}

}  // namespace fastnn
