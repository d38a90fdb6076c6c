#include "ops/cross_entropy.h"

#include <ATen/ops/cross_entropy_loss.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/operands.h"

namespace fastnn {

at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target,
                         const std::optional<at::Tensor>& weight, int64_t ignore_index,
                         std::string_view reduction, double label_smoothing) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::cross_entropy", "")
                             .typed<decltype(cross_entropy)>();
  return op.call(input, target, weight, ignore_index, reduction, label_smoothing);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cross_entropy_forward(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    int64_t ignore_index, std::string_view reduction, double label_smoothing, bool keep) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::cross_entropy_forward", "")
                             .typed<decltype(cross_entropy_forward)>();
  return op.call(input, target, weight, ignore_index, reduction, label_smoothing, keep);
}

at::Tensor cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& kept,
                                  const at::Tensor& target, const std::optional<at::Tensor>& weight,
                                  const std::optional<at::Tensor>& lse,
                                  const at::Tensor& total_weight, int64_t ignore_index,
                                  std::string_view reduction, double label_smoothing) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::cross_entropy_backward", "")
                             .typed<decltype(cross_entropy_backward)>();
  return op.call(grad_output, kept, target, weight, lse, total_weight, ignore_index, reduction,
                 label_smoothing);
}

void cross_entropy_backward_(const at::Tensor& grad_output, const at::Tensor& kept,
                             const at::Tensor& target, const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& lse, const at::Tensor& total_weight,
                             int64_t ignore_index, std::string_view reduction,
                             double label_smoothing) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::cross_entropy_backward_", "")
                             .typed<decltype(cross_entropy_backward_)>();
  op.call(grad_output, kept, target, weight, lse, total_weight, ignore_index, reduction,
          label_smoothing);
}

bool keeps_gradient(const at::Tensor& logits) {
  return logits.scalar_type() == accumulate_dtype(logits);
}

bool has_class_probabilities(const at::Tensor& input, const at::Tensor& target) {
  return input.sym_sizes() == target.sym_sizes();
}

bool cross_entropy_is_fusable(const at::Tensor& input, const at::Tensor& target,
                              const std::optional<at::Tensor>& weight, double label_smoothing) {
  check_same_device("cross_entropy", input, "target", target);
  if (weight) check_same_device("cross_entropy", input, "weight", *weight);
  check_label_smoothing(label_smoothing);
  if (!has_kernels(input) || input.dim() < 1) return false;
  // Probabilities or weights of another dtype promote the result's.
  return !has_class_probabilities(input, target) ||
         (target.scalar_type() == input.scalar_type() &&
          (!weight || weight->scalar_type() == input.scalar_type()));
}

void check_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                         const std::optional<at::Tensor>& weight, int64_t ignore_index,
                         double label_smoothing) {
  constexpr auto op = "cross_entropy";
  TORCH_CHECK_VALUE(input.dim() >= 1, op, ": Expected input of 1 or more dimensions (got 0)");
  check_label_smoothing(label_smoothing);
  if (!has_class_probabilities(input, target)) {
    check_class_indices(op, input, target, weight);
    return;
  }
  check_same_device(op, input, "target", target);
  TORCH_CHECK(at::isFloatingType(target.scalar_type()), op,
              ": Expected floating point type for target with class probabilities, got ",
              target.scalar_type());
  check_same_dtype(op, input, "target", target);
  TORCH_CHECK(ignore_index < 0, op,
              ": ignore_index is not supported for floating point target, got ", ignore_index);
  check_class_weight(op, input, weight);
}

void check_cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& kept,
                                  const std::optional<at::Tensor>& lse,
                                  const at::Tensor& total_weight,
                                  at::Reduction::Reduction reduction) {
  constexpr auto op = "cross_entropy_backward";
  check_loss_backward(op, grad_output, kept, total_weight, reduction);
  if (keeps_gradient(kept)) return;
  TORCH_CHECK(lse, op, ": expected lse with logits of dtype ", kept.scalar_type(),
              ", but got None");
  check_same_device(op, kept, "lse", *lse);
  check_sizes(op, "lse", *lse, lse_sizes(kept));
  TORCH_CHECK(lse->scalar_type() == accumulate_dtype(kept), op, ": expected lse to have dtype ",
              accumulate_dtype(kept), ", but got ", lse->scalar_type());
}

CrossEntropyOperands::CrossEntropyOperands(const at::Tensor& input, const at::Tensor& target_,
                                           const std::optional<at::Tensor>& w, int64_t ignore_index,
                                           double label_smoothing)
    : classes_last(has_classes_last(input)),
      logits(arranged(input, classes_last)),
      weight(contiguous(w)),
      layout(layout_around(logits.sizes(), classes_last ? logits.dim() - 1 : class_dim(input))),
      probabilities(has_class_probabilities(input, target_)),
      ignore_index(ignore_index),
      label_smoothing(label_smoothing) {
  target = probabilities ? arranged(target_, classes_last) : contiguous_indices(target_);
}

at::DimVector lse_sizes(const at::Tensor& input) {
  at::DimVector sizes = per_row_sizes(input);
  sizes.insert(sizes.begin(), 2);
  return sizes;
}

at::Tensor cross_entropy_composite(const at::Tensor& input, const at::Tensor& target,
                                   const std::optional<at::Tensor>& weight, int64_t ignore_index,
                                   std::string_view reduction, double label_smoothing) {
  check_label_smoothing(label_smoothing);
  const at::Tensor t = has_class_probabilities(input, target) ? target : as_long(target);
  return at::cross_entropy_loss(input, t, weight, parse_reduction(reduction), ignore_index,
                                label_smoothing);
}

namespace {

at::Tensor cross_entropy_default(const at::Tensor& input, const at::Tensor& target,
                                 const std::optional<at::Tensor>& weight, int64_t ignore_index,
                                 std::string_view reduction, double label_smoothing) {
  if (!cross_entropy_is_fusable(input, target, weight, label_smoothing)) {
    return cross_entropy_composite(input, target, weight, ignore_index, reduction, label_smoothing);
  }
  return std::get<0>(cross_entropy_forward(input, target, weight, ignore_index, reduction,
                                           label_smoothing, /*keep=*/false));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int ignore_index=-100, "
      "str reduction='mean', float label_smoothing=0.0) -> Tensor");
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
      "str reduction, float label_smoothing, bool keep) "
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

// On every device: one without kernels takes torch's way.
TORCH_LIBRARY_IMPL(fastnn, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy", cross_entropy_default);
}
TORCH_LIBRARY_IMPL(fastnn, CompositeImplicitAutogradNestedTensor, m) {
  m.impl("cross_entropy", cross_entropy_composite);
}

}  // namespace fastnn
