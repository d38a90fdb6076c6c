#include "ops/cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/softmax.h>
#include <torch/library.h>

#include "autograd/backward_node.h"
#include "autograd/target_distribution.h"
#include "autograd/transforms.h"
#include "ops/checks.h"

namespace fastnn {
namespace {

// grad * (softmax * sum(q) - q): the kernel's formula, in differentiable operators.
at::Tensor composite_backward(const at::Tensor& grad, const at::Tensor& input,
                              const at::Tensor& target, const std::optional<at::Tensor>& weight,
                              const at::Tensor& total_weight, int64_t ignore_index,
                              std::string_view reduction, double label_smoothing) {
  const int64_t dim = class_dim(input);
  const bool probabilities = has_class_probabilities(input, target);
  const at::Tensor q =
      probabilities ? probability_distribution(input, target, weight, label_smoothing)
                    : index_distribution(input, target, weight, ignore_index, label_smoothing);
  const at::Tensor grad_rows = grad_per_row(grad, input, total_weight, reduction);
  const at::Tensor grad_input =
      grad_rows * (at::softmax(input, dim) * q.sum(dim, /*keepdim=*/true) - q);
  return probabilities ? grad_input : zero_ignored_rows(grad_input, target, ignore_index);
}

at::Tensor cross_entropy_backward_composite(const at::Tensor& grad, const at::Tensor& input,
                                            const at::Tensor& target,
                                            const std::optional<at::Tensor>& weight,
                                            const at::Tensor& /*lse*/,
                                            const at::Tensor& total_weight, int64_t ignore_index,
                                            std::string_view reduction, double label_smoothing) {
  return composite_backward(grad, input, target, weight, total_weight, ignore_index, reduction,
                            label_smoothing);
}

struct CrossEntropyBackward {
  static constexpr auto name = "CrossEntropyBackward";
  using Tensors = std::array<at::Tensor, 5>;
  static constexpr std::array<bool, 5> kOutputs = {};
  using Options = std::tuple<int64_t, int64_t, double>;

  static torch::autograd::variable_list backward(const at::Tensor& grad, const Tensors& tensors,
                                                 const Options& options,
                                                 const std::vector<bool>& /*needs_input_grad*/) {
    const auto& [input, target, saved_weight, lse, total_weight] = tensors;
    const auto weight = optional(saved_weight);
    const auto [ignore_index, reduction_code, label_smoothing] = options;
    const auto reduction = reduction_name(reduction_code);
    if (backward_must_be_composite(grad)) {
      return {composite_backward(grad, input, target, weight, total_weight, ignore_index, reduction,
                                 label_smoothing)};
    }
    BelowAutograd below_autograd;
    return {cross_entropy_backward(grad, input, target, weight, lse, total_weight, ignore_index,
                                   reduction, label_smoothing)};
  }
};

at::Tensor cross_entropy_recorded(const at::Tensor& input, const at::Tensor& target,
                                  const std::optional<at::Tensor>& weight, int64_t ignore_index,
                                  std::string_view reduction, double label_smoothing) {
  const auto node = make_backward_node<CrossEntropyBackward>(input);
  const auto [loss, lse, total_weight] = [&] {
    BelowAutograd below_autograd;
    return cross_entropy_forward(input, target, weight, ignore_index, reduction, label_smoothing);
  }();
  record(node, loss, {input, target, weight.value_or(at::Tensor()), lse, total_weight},
         {ignore_index, parse_reduction(reduction), label_smoothing});
  return loss;
}

at::Tensor cross_entropy_autograd(const at::Tensor& input, const at::Tensor& target,
                                  const std::optional<at::Tensor>& weight, int64_t ignore_index,
                                  std::string_view reduction, double label_smoothing) {
  // The fused backward gives the logits' gradient alone: probabilities or weights that want one
  // take torch's composite.
  if (in_functorch() || has_tangent(input) || has_tangent(target) || has_tangent(weight) ||
      needs_grad(target) || needs_grad(weight) ||
      !cross_entropy_is_fusable(input, target, weight, label_smoothing)) {
    return cross_entropy_composite(input, target, weight, ignore_index, reduction, label_smoothing);
  }
  if (needs_grad(input)) {
    return cross_entropy_recorded(input, target, weight, ignore_index, reduction, label_smoothing);
  }
  BelowAutograd below_autograd;
  return cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("cross_entropy", cross_entropy_autograd);
}

// vmap: over the whole batch at once; without these it loops over the samples.
TORCH_LIBRARY_IMPL(fastnn, FuncTorchBatchedDecomposition, m) {
  m.impl("cross_entropy", cross_entropy_composite);
  m.impl("cross_entropy_backward", cross_entropy_backward_composite);
}

}  // namespace fastnn
