#include "ops/cross_entropy.h"

#include <ATen/ops/cross_entropy_loss.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/operands.h"

namespace fastnn {

at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target,
                         const LossOptions& options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::cross_entropy", "")
                             .typed<decltype(as_cross_entropy<cross_entropy>)>();
  return op.call(input, target, options.weight, options.ignore_index,
                 reduction_name(options.reduction), options.label_smoothing, options.dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cross_entropy_forward(
    const at::Tensor& input, const at::Tensor& target, const LossOptions& options, bool keep) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::cross_entropy_forward", "")
                             .typed<decltype(as_cross_entropy_forward<cross_entropy_forward>)>();
  return op.call(input, target, options.weight, options.ignore_index,
                 reduction_name(options.reduction), options.label_smoothing, keep, options.dtype);
}

at::Tensor cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& kept,
                                  const at::Tensor& target, const std::optional<at::Tensor>& lse,
                                  const at::Tensor& total_weight, const LossOptions& options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::cross_entropy_backward", "")
                             .typed<decltype(as_cross_entropy_backward<cross_entropy_backward>)>();
  return op.call(grad_output, kept, target, options.weight, lse, total_weight, options.ignore_index,
                 reduction_name(options.reduction), options.label_smoothing);
}

void cross_entropy_backward_(const at::Tensor& grad_output, const at::Tensor& kept,
                             const at::Tensor& target, const std::optional<at::Tensor>& lse,
                             const at::Tensor& total_weight, const LossOptions& options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::cross_entropy_backward_", "")
                             .typed<decltype(as_cross_entropy_backward<cross_entropy_backward_>)>();
  op.call(grad_output, kept, target, options.weight, lse, total_weight, options.ignore_index,
          reduction_name(options.reduction), options.label_smoothing);
}

bool keeps_gradient(const at::Tensor& logits) {
  return logits.scalar_type() == accumulate_dtype(logits);
}

bool has_class_probabilities(const at::Tensor& input, const at::Tensor& target) {
  return input.sym_sizes() == target.sym_sizes();
}

bool can_fuse_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                            const LossOptions& options) {
  const auto& weight = options.weight;
  if (!has_kernels(input) || input.dim() < 1 || !is_on_device_of(input, target) ||
      !is_on_device_of(input, weight)) {
    return false;
  }
  if (!has_dtype_for(input, options)) return false;
  // Probabilities or weights of another dtype would promote the result's.
  return !has_class_probabilities(input, target) ||
         (target.scalar_type() == input.scalar_type() &&
          (!weight || weight->scalar_type() == options.dtype_of_loss(input)));
}

void check_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                         const LossOptions& options, std::string_view op) {
  TORCH_CHECK_VALUE(input.dim() >= 1, op, ": Expected input of 1 or more dimensions (got 0)");
  check_dtype_of_loss(op, input, options);
  if (!has_class_probabilities(input, target)) {
    check_class_indices(op, input, target, options);
    return;
  }
  check_same_device(op, input, "target", target);
  TORCH_CHECK(at::isFloatingType(target.scalar_type()), op,
              ": Expected floating point type for target with class probabilities, got ",
              target.scalar_type());
  check_same_dtype(op, input, "target", target);
  TORCH_CHECK(options.ignore_index < 0, op,
              ": ignore_index is not supported for floating point target, got ",
              options.ignore_index);
  check_class_weight(op, input, options);
}

void check_cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& kept,
                                  const at::Tensor& target, const std::optional<at::Tensor>& lse,
                                  const at::Tensor& total_weight, const LossOptions& options) {
  constexpr auto op = "cross_entropy_backward";
  check_grad_dtype(op, grad_output, kept, options);
  check_cross_entropy(kept, target, options);
  check_loss_backward(op, grad_output, kept, total_weight, options);
  if (keeps_gradient(kept)) return;
  TORCH_CHECK(lse, op, ": expected lse with logits of dtype ", kept.scalar_type(),
              ", but got None");
  check_same_device(op, kept, "lse", *lse);
  check_sizes(op, "lse", *lse, lse_sizes(kept));
  TORCH_CHECK(lse->scalar_type() == accumulate_dtype(kept), op, ": expected lse to have dtype ",
              accumulate_dtype(kept), ", but got ", lse->scalar_type());
}

CrossEntropyOperands::CrossEntropyOperands(const at::Tensor& input, const at::Tensor& target_,
                                           const LossOptions& o)
    : classes_last(has_classes_last(input)),
      logits(arranged(input, classes_last)),
      options{contiguous(o.weight), o.ignore_index, o.reduction, o.label_smoothing, o.dtype},
      layout(layout_around(logits.sizes(), classes_last ? logits.dim() - 1 : class_dim(input))),
      probabilities(has_class_probabilities(input, target_)) {
  target = probabilities ? arranged(target_, classes_last) : contiguous_indices(target_);
}

at::DimVector lse_sizes(const at::Tensor& input) {
  at::DimVector sizes = per_row_sizes(input);
  sizes.insert(sizes.begin(), 2);
  return sizes;
}

at::Tensor cross_entropy_composite(const at::Tensor& input, const at::Tensor& target,
                                   const LossOptions& options) {
  check_loss_devices("cross_entropy", input, target, options.weight);
  const at::Tensor t = has_class_probabilities(input, target) ? target : as_long(target);
  return at::cross_entropy_loss(options.cast(input), options.cast(t), options.cast_weight(),
                                options.reduction, options.ignore_index, options.label_smoothing);
}

namespace {

at::Tensor cross_entropy_default(const at::Tensor& input, const at::Tensor& target,
                                 const LossOptions& options) {
  if (!can_fuse_cross_entropy(input, target, options)) {
    return cross_entropy_composite(input, target, options);
  }
  return std::get<0>(cross_entropy_forward(input, target, options, /*keep=*/false));
}

}  // namespace

LossOptions cross_entropy_options(const std::optional<at::Tensor>& weight, int64_t ignore_index,
                                  std::string_view reduction, double label_smoothing,
                                  std::optional<at::ScalarType> dtype, std::string_view op) {
  // NaN raises too.
  TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op,
              ": label_smoothing must be between 0.0 and 1.0. Got: ", label_smoothing);
  return {weight, ignore_index, parse_reduction(reduction), label_smoothing, dtype};
}

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int ignore_index=-100, "
      "str reduction='mean', float label_smoothing=0.0, ScalarType? dtype=None) -> Tensor");
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
      "str reduction, float label_smoothing, bool keep, ScalarType? dtype=None) "
      "-> (Tensor loss, Tensor kept, Tensor lse, Tensor total_weight)");
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor kept, Tensor target, Tensor? weight, "
      "Tensor? lse, Tensor total_weight, int ignore_index, str reduction, float label_smoothing) "
      "-> Tensor");
  m.def(
      "cross_entropy_backward_(Tensor grad_output, Tensor(a!) kept, Tensor target, "
      "Tensor? weight, Tensor? lse, Tensor total_weight, int ignore_index, str reduction, "
      "float label_smoothing) -> ()");
}

// For every device; those without kernels fall back to torch.
TORCH_LIBRARY_IMPL(fastnn, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy", as_cross_entropy<cross_entropy_default>);
}
TORCH_LIBRARY_IMPL(fastnn, CompositeImplicitAutogradNestedTensor, m) {
  m.impl("cross_entropy", as_cross_entropy<cross_entropy_composite>);
}

}  // namespace fastnn
