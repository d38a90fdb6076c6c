#include "ops/linear_cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/tanh.h>
#include <torch/library.h>

#include <cmath>

#include "ops/checks.h"
#include "ops/operands.h"

namespace fastnn {
namespace {

std::optional<double> optional_softcap(const LinearLossOptions& options) {
  return options.softcap == 0 ? std::nullopt : std::optional(options.softcap);
}

}  // namespace

at::Tensor linear_cross_entropy(const LinearHead& head, const at::Tensor& target,
                                const LinearLossOptions& options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastnn::linear_cross_entropy", "")
                             .typed<decltype(as_linear_cross_entropy<linear_cross_entropy>)>();
  return op.call(head.input, head.weight, target, head.bias, options.weight,
                 reduction_name(options.reduction), options.ignore_index, options.label_smoothing,
                 optional_softcap(options), options.logit_scale, options.z_loss, options.normalizer,
                 options.dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_forward(
    const LinearHead& head, const at::Tensor& target, const LinearLossOptions& options,
    HeadMask wanted) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastnn::linear_cross_entropy_forward", "")
          .typed<decltype(as_linear_cross_entropy_forward<linear_cross_entropy_forward>)>();
  return op.call(head.input, head.weight, target, head.bias, options.weight,
                 reduction_name(options.reduction), options.ignore_index, options.label_smoothing,
                 optional_softcap(options), options.logit_scale, options.z_loss, options.normalizer,
                 options.dtype, wanted);
}

HeadGradients linear_cross_entropy_backward(const at::Tensor& grad_output, const LinearHead& head,
                                            const at::Tensor& target, const at::Tensor& lse,
                                            const LinearLossOptions& options, HeadMask wanted) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastnn::linear_cross_entropy_backward", "")
          .typed<decltype(as_linear_cross_entropy_backward<linear_cross_entropy_backward>)>();
  return op.call(grad_output, head.input, head.weight, target, head.bias, options.weight, lse,
                 options.ignore_index, options.label_smoothing, optional_softcap(options),
                 options.logit_scale, options.z_loss, options.dtype, wanted);
}

namespace {

// The logits' shape, which may be symbolic.
c10::SymDimVector logits_sizes(const LinearHead& head) {
  c10::SymDimVector sizes(head.input.sym_sizes());
  sizes.back() = head.weight.sym_size(0);
  return sizes;
}

bool fits_input(const LinearHead& head, const at::Tensor& tensor) {
  return tensor.device() == head.input.device() &&
         tensor.scalar_type() == head.input.scalar_type() && tensor.layout() == at::kStrided;
}

}  // namespace

at::Tensor shape_of_logits(const LinearHead& head, const LinearLossOptions& options) {
  const auto dtype = options.dtype.value_or(head.input.scalar_type());
  return head.input.new_empty({}, head.input.options().dtype(dtype))
      .expand_symint(logits_sizes(head));
}

bool can_fuse_linear_cross_entropy(const LinearHead& head, const at::Tensor& target,
                                   const LinearLossOptions& options) {
  const auto& [input, weight, bias] = head;
  const bool fits = has_kernels(input) && (input.dim() == 1 || input.dim() == 2) &&
                    fits_input(head, weight) && weight.dim() == 2 &&
                    (!bias || (fits_input(head, *bias) && bias->dim() == 1));
  return fits && is_on_device_of(input, options.normalizer) &&
         can_fuse_cross_entropy(shape_of_logits(head, options), target, options);
}

namespace {

constexpr auto kName = "linear_cross_entropy";

// The messages are torch's, except for the name.
void check_head(const LinearHead& head) {
  const auto& [input, weight, bias] = head;
  TORCH_CHECK(input.dim() == 1 || input.dim() == 2, kName,
              ": expected input with dimensionality 1 or 2, got ", input.dim());
  TORCH_CHECK(weight.dim() == 2, kName, ": expected linear_weight with dimensionality 2, got ",
              weight.dim());
  check_same_device(kName, input, "linear_weight", weight);
  check_same_dtype(kName, input, "linear_weight", weight);
  TORCH_CHECK(input.sym_size(-1) == weight.sym_size(1), kName,
              ": expected equal input and linear_weight last dimensions (in_features), got ",
              input.sym_size(-1), " and ", weight.sym_size(1), ", respectively");
  if (!bias) return;
  check_same_device(kName, input, "linear_bias", *bias);
  check_same_dtype(kName, input, "linear_bias", *bias);
  TORCH_CHECK(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), kName,
              ": expected linear_bias shape [", weight.sym_size(0), "], got ", bias->sym_sizes());
}

void check_normalizer(const LinearHead& head, const LinearLossOptions& options) {
  if (!options.normalizer) return;
  const at::Tensor& normalizer = *options.normalizer;
  TORCH_CHECK_VALUE(!options.per_row(), kName,
                    ": normalizer takes reduction='mean' or 'sum', "
                    "but reduction is 'none'");
  check_same_device(kName, head.input, "normalizer", normalizer);
  TORCH_CHECK(normalizer.dim() == 0, kName,
              ": expected normalizer to be one number, but got shape ", normalizer.sym_sizes());
}

}  // namespace

void check_linear_cross_entropy(const LinearHead& head, const at::Tensor& target,
                                const LinearLossOptions& options) {
  check_head(head);
  check_normalizer(head, options);
  check_cross_entropy(shape_of_logits(head, options), target, options, kName);
}

void check_linear_cross_entropy_backward(const at::Tensor& grad_output, const LinearHead& head,
                                         const at::Tensor& target, const at::Tensor& lse,
                                         const LinearLossOptions& options) {
  constexpr auto op = "linear_cross_entropy_backward";
  check_linear_cross_entropy(head, target, options);
  const at::Tensor logits = shape_of_logits(head, options);
  check_same_device(op, logits, "grad_output", grad_output);
  check_same_dtype(op, logits, "grad_output", grad_output);
  check_sizes(op, "grad_output", grad_output, per_row_sizes(logits));
  check_same_device(op, logits, "lse", lse);
  check_sizes(op, "lse", lse, lse_sizes(logits));
  TORCH_CHECK(lse.scalar_type() == accumulate_dtype(logits), op, ": expected lse to have dtype ",
              accumulate_dtype(logits), ", but got ", lse.scalar_type());
}

namespace {

at::Tensor adjusted(at::Tensor logits, const LinearLossOptions& options) {
  if (options.logit_scale != 1) logits = logits * options.logit_scale;
  if (options.softcap != 0) logits = at::tanh(logits / options.softcap) * options.softcap;
  return logits;
}

// The values of the rows that count, else 0; with class probabilities all rows count.
at::Tensor counting(const at::Tensor& per_row, const at::Tensor& target, bool probabilities,
                    int64_t ignore_index) {
  return probabilities ? per_row : per_row.masked_fill(target == ignore_index, 0);
}

}  // namespace

at::Tensor linear_total_weight(const at::Tensor& logits, const at::Tensor& target,
                               const LinearLossOptions& options) {
  const at::Tensor ones = at::ones_like(logits.select(class_dim(logits), 0));
  if (has_class_probabilities(logits, target)) return ones.sum();
  const at::Tensor ignored = target == options.ignore_index;
  if (!options.weight) return ones.masked_fill(ignored, 0).sum();
  const at::Tensor classes = as_long(target).masked_fill(ignored, 0).reshape({-1});
  const at::Tensor weights = options.weight->index_select(0, classes).reshape(target.sizes());
  return weights.masked_fill(ignored, 0).sum();
}

at::Tensor linear_cross_entropy_composite(const LinearHead& head, const at::Tensor& target_,
                                          const LinearLossOptions& options) {
  check_head(head);
  check_normalizer(head, options);
  check_loss_devices(kName, head.input, target_, options.weight);
  at::Tensor logits = adjusted(at::linear(head.input, head.weight, head.bias), options);
  if (options.dtype) logits = logits.to(*options.dtype);
  const bool probabilities = has_class_probabilities(logits, target_);
  const at::Tensor target = probabilities ? target_ : as_long(target_);
  const auto cross_entropy = [&](at::Reduction::Reduction reduction) {
    return at::cross_entropy_loss(logits, target, options.weight, reduction, options.ignore_index,
                                  options.label_smoothing);
  };
  if (options.z_loss == 0 && !options.normalizer) return cross_entropy(options.reduction);
  at::Tensor losses = cross_entropy(at::Reduction::None);
  if (options.z_loss != 0) {
    const at::Tensor squares = at::logsumexp(logits, class_dim(logits)).square();
    losses =
        losses + counting(options.z_loss * squares, target, probabilities, options.ignore_index);
  }
  if (options.per_row()) return losses;
  const at::Tensor sum = losses.sum();
  if (options.normalizer) return (sum / *options.normalizer).to(sum.scalar_type());
  return options.is_mean() ? sum / linear_total_weight(logits, target, options) : sum;
}

namespace {

at::Tensor linear_cross_entropy_default(const LinearHead& head, const at::Tensor& target,
                                        const LinearLossOptions& options) {
  if (!can_fuse_linear_cross_entropy(head, target, options)) {
    return linear_cross_entropy_composite(head, target, options);
  }
  return std::get<0>(linear_cross_entropy_forward(head, target, options, HeadMask{}));
}

}  // namespace

LinearLossOptions linear_loss_options(const std::optional<at::Tensor>& weight,
                                      std::string_view reduction, int64_t ignore_index,
                                      double label_smoothing, std::optional<double> softcap,
                                      double logit_scale, double z_loss,
                                      const std::optional<at::Tensor>& normalizer,
                                      std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_VALUE(!softcap || (*softcap > 0 && std::isfinite(*softcap)), kName,
                    ": softcap must be a positive number or None. Got: ", softcap.value_or(0));
  TORCH_CHECK_VALUE(std::isfinite(logit_scale), kName,
                    ": logit_scale must be finite. Got: ", logit_scale);
  TORCH_CHECK_VALUE(std::isfinite(z_loss), kName, ": z_loss must be finite. Got: ", z_loss);
  return {cross_entropy_options(weight, ignore_index, reduction, label_smoothing, dtype, kName),
          softcap.value_or(0), logit_scale, z_loss, normalizer};
}

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor? linear_bias=None, Tensor? weight=None, str reduction='mean', "
      "int ignore_index=-100, float label_smoothing=0.0, float? softcap=None, "
      "float logit_scale=1.0, float z_loss=0.0, Tensor? normalizer=None, "
      "ScalarType? dtype=None) -> Tensor");
  m.def(
      "linear_cross_entropy_forward(Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor? linear_bias, Tensor? weight, str reduction, int ignore_index, "
      "float label_smoothing, float? softcap, float logit_scale, float z_loss, "
      "Tensor? normalizer, ScalarType? dtype, bool[3] output_mask) "
      "-> (Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor lse)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad_output, Tensor input, Tensor linear_weight, "
      "Tensor target, Tensor? linear_bias, Tensor? weight, Tensor lse, int ignore_index, "
      "float label_smoothing, float? softcap, float logit_scale, float z_loss, "
      "ScalarType? dtype, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
}

// For every device; those without kernels fall back to torch.
TORCH_LIBRARY_IMPL(fastnn, CompositeExplicitAutograd, m) {
  m.impl("linear_cross_entropy", as_linear_cross_entropy<linear_cross_entropy_default>);
}
TORCH_LIBRARY_IMPL(fastnn, CompositeImplicitAutogradNestedTensor, m) {
  m.impl("linear_cross_entropy", as_linear_cross_entropy<linear_cross_entropy_composite>);
}

}  // namespace fastnn
