#include "ops/linear_cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tanh.h>
#include <torch/library.h>

#include "autograd/backward_node.h"
#include "autograd/target_distribution.h"
#include "autograd/transforms.h"
#include "ops/checks.h"
#include "ops/operands.h"

namespace fastnn {
namespace {

using torch::autograd::variable_list;

// The gradients from all the logits at once, with operators that can be differentiated.
// `grad_rows` multiplies each row's gradient, and broadcasts against the logits.
HeadGradients composite_gradients(const at::Tensor& grad_rows, const LinearHead& head,
                                  const at::Tensor& target, const LinearLossOptions& options,
                                  HeadMask wanted) {
  at::Tensor logits = at::linear(head.input, head.weight, head.bias);
  if (options.logit_scale != 1) logits = logits * options.logit_scale;
  at::Tensor slope;
  if (options.softcap != 0) {
    const at::Tensor tanh = at::tanh(logits / options.softcap);
    slope = 1 - tanh * tanh;
    logits = tanh * options.softcap;
  }
  if (options.dtype) logits = logits.to(*options.dtype);
  const int64_t dim = class_dim(logits);
  const bool probabilities = has_class_probabilities(logits, target);
  at::Tensor q = probabilities ? probability_distribution(logits, target, options)
                               : index_distribution(logits, target, options);
  at::Tensor total = q.sum(dim, /*keepdim=*/true);
  if (options.z_loss != 0) {
    total = total + 2 * options.z_loss * at::logsumexp(logits, dim, /*keepdim=*/true);
  }
  at::Tensor derivative = at::softmax(logits, dim) * total - q, factor = grad_rows;
  if (!probabilities) {
    // Zero the factor too: a mean over no rows is NaN, and a second derivative multiplies by it.
    factor = zero_ignored_rows(factor.expand_as(logits), target, options.ignore_index);
    derivative = zero_ignored_rows(derivative, target, options.ignore_index);
  }
  at::Tensor grad = factor * derivative;
  grad = grad.to(head.input.scalar_type());
  if (slope.defined()) grad = grad * slope;
  if (options.logit_scale != 1) grad = grad * options.logit_scale;

  HeadGradients grads;
  const auto rows = [](const at::Tensor& tensor) {
    return tensor.dim() == 1 ? tensor.unsqueeze(0) : tensor;
  };
  if (wanted[0]) std::get<0>(grads) = grad.matmul(head.weight);
  if (wanted[1]) std::get<1>(grads) = rows(grad).t().matmul(rows(head.input));
  if (wanted[2]) std::get<2>(grads) = rows(grad).sum(0);
  return grads;
}

HeadGradients linear_cross_entropy_backward_composite(
    const at::Tensor& grad_output, const LinearHead& head, const at::Tensor& target,
    const at::Tensor& /*lse*/, const LinearLossOptions& options, HeadMask wanted) {
  const at::Tensor grad_rows = grad_output.unsqueeze(class_dim(shape_of_logits(head, options)));
  return composite_gradients(grad_rows, head, target, options, wanted);
}

// What autograd saves for the backward.
using Saved = std::array<at::Tensor, 10>;
using SavedOptions = std::tuple<int64_t, int64_t, double, double, double, double, int64_t>;
constexpr int64_t kNoDtype = -1;

SavedOptions saved(const LinearLossOptions& options) {
  return {options.ignore_index,
          options.reduction,
          options.label_smoothing,
          options.softcap,
          options.logit_scale,
          options.z_loss,
          options.dtype ? int64_t(*options.dtype) : kNoDtype};
}

LinearLossOptions restored(const SavedOptions& saved, const at::Tensor& weight,
                           const at::Tensor& normalizer) {
  const auto [ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss, dtype] =
      saved;
  return {{optional(weight), ignore_index, at::Reduction::Reduction(reduction), label_smoothing,
           dtype == kNoDtype ? std::nullopt : std::optional(at::ScalarType(dtype))},
          softcap,
          logit_scale,
          z_loss,
          optional(normalizer)};
}

// The gradient that the forward kept times the incoming one, rounded once.
at::Tensor scaled(at::Tensor&& kept, const at::Tensor& grad, at::ScalarType dtype) {
  if (!kept.defined()) return {};
  const at::Tensor factor = grad.to(kept.scalar_type());
  if (!may_replace(kept, grad)) return (kept * factor).to(dtype);
  // On the CPU the factor, which is usually 1, can be read without waiting.
  const bool is_one = factor.is_cpu() && factor.item<double>() == 1;
  if (!is_one) kept.mul_(factor);
  return kept.to(dtype);
}

struct LinearCrossEntropyBackward {
  static constexpr auto name = "LinearCrossEntropyBackward";
  using Tensors = Saved;
  static constexpr std::array<bool, 10> kOutputs = {};
  using Options = SavedOptions;

  static variable_list backward(const at::Tensor& grad, Tensors&& tensors, const Options& options,
                                const std::vector<bool>& needs_input_grad) {
    auto& [input, weight, bias, target, class_weight, normalizer, lse, kept_input, kept_weight,
           kept_bias] = tensors;
    const LinearLossOptions o = restored(options, class_weight, normalizer);
    const LinearHead head{input, weight, optional(bias)};
    const HeadMask wanted = {needs_input_grad[0], needs_input_grad[1], needs_input_grad[2]};
    if (backward_must_be_composite(grad)) {
      return list(composite_backward(grad, head, target, o, wanted));
    }
    BelowAutograd below_autograd;
    if (o.per_row()) {
      return list(linear_cross_entropy_backward(grad, head, target, lse, o, wanted));
    }
    const auto dtype = input.scalar_type();
    return {wanted[0] ? scaled(std::move(kept_input), grad, dtype) : at::Tensor(),
            wanted[1] ? scaled(std::move(kept_weight), grad, dtype) : at::Tensor(),
            wanted[2] ? scaled(std::move(kept_bias), grad, dtype) : at::Tensor()};
  }

 private:
  static variable_list list(const HeadGradients& grads) {
    return {std::get<0>(grads), std::get<1>(grads), std::get<2>(grads)};
  }

  static HeadGradients composite_backward(const at::Tensor& grad, const LinearHead& head,
                                          const at::Tensor& target,
                                          const LinearLossOptions& options, HeadMask wanted) {
    const at::Tensor logits = shape_of_logits(head, options);
    if (options.normalizer) {
      const at::Tensor factor = (grad / *options.normalizer).to(grad.scalar_type());
      return composite_gradients(factor, head, target, options, wanted);
    }
    at::Tensor total;
    if (options.is_mean()) total = linear_total_weight(logits, target, options);
    const at::Tensor factor = grad_per_row(grad, logits, total, options.reduction);
    return composite_gradients(factor, head, target, options, wanted);
  }
};

at::Tensor linear_cross_entropy_recorded(const LinearHead& head, const at::Tensor& target,
                                         const LinearLossOptions& options) {
  const at::Tensor bias = head.bias.value_or(at::Tensor());
  const auto node = make_backward_node<LinearCrossEntropyBackward>(head.input, head.weight, bias);
  const HeadMask wanted = {needs_grad(head.input), needs_grad(head.weight), needs_grad(bias)};
  const auto [loss, kept_input, kept_weight, kept_bias, lse] = [&] {
    BelowAutograd below_autograd;
    return linear_cross_entropy_forward(head, target, options, wanted);
  }();
  record(node, loss,
         {head.input, head.weight, bias, target, options.weight.value_or(at::Tensor()),
          options.normalizer.value_or(at::Tensor()), lse, kept_input, kept_weight, kept_bias},
         saved(options));
  return loss;
}

at::Tensor linear_cross_entropy_autograd(const LinearHead& head, const at::Tensor& target,
                                         const LinearLossOptions& options) {
  // The fused backward only computes the gradients of the linear layer: if anything else needs one,
  // the composite computes it.
  const auto is_composites = [](const auto&... tensors) {
    return (... || (needs_grad(tensors) || has_tangent(tensors)));
  };
  if (in_functorch() || has_tangent(head.input) || has_tangent(head.weight) ||
      has_tangent(head.bias) || is_composites(target, options.weight, options.normalizer) ||
      !can_fuse_linear_cross_entropy(head, target, options)) {
    return linear_cross_entropy_composite(head, target, options);
  }
  if (needs_grad(head.input) || needs_grad(head.weight) || needs_grad(head.bias)) {
    return linear_cross_entropy_recorded(head, target, options);
  }
  BelowAutograd below_autograd;
  return linear_cross_entropy(head, target, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("linear_cross_entropy", as_linear_cross_entropy<linear_cross_entropy_autograd>);
}

// vmap runs these on the whole batch at once; without them it would loop over the samples.
TORCH_LIBRARY_IMPL(fastnn, FuncTorchBatchedDecomposition, m) {
  m.impl("linear_cross_entropy", as_linear_cross_entropy<linear_cross_entropy_composite>);
  m.impl("linear_cross_entropy_backward",
         as_linear_cross_entropy_backward<linear_cross_entropy_backward_composite>);
}

}  // namespace fastnn
