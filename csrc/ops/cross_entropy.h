// cross_entropy(input, target): log_softmax and nll_loss in one, and its backward.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "ops/loss_options.h"
#include "ops/operands.h"

namespace fastnn {

// Calls through the dispatcher. `total_weight` is the divisor of 'mean'. With `keep`, the forward
// also returns, for the backward,
//   kept   the gradient of the reduced loss (without a reduction, of each row's loss), or a copy of
//          the logits: see keeps_gradient
//   lse    with such a copy, each row's log-sum-exp in two parts, its maximum (0) and the sum of
//          exp(x - max) (1)
// which are undefined otherwise. So later changes of the logits don't affect the gradient.
// cross_entropy_backward_ overwrites `kept` with the gradient, which saves memory and, if `kept` is
// the gradient and the incoming one is 1, all work.
at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target,
                         const LossOptions& options);
// Logits narrower than the accumulation dtype may have a loss of that dtype. Loss and gradient are
// then, to the bit, those of a copy of the logits in it; class weights and grad_output have it too.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cross_entropy_forward(
    const at::Tensor& input, const at::Tensor& target, const LossOptions& options, bool keep);
at::Tensor cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& kept,
                                  const at::Tensor& target, const std::optional<at::Tensor>& lse,
                                  const at::Tensor& total_weight, const LossOptions& options);
void cross_entropy_backward_(const at::Tensor& grad_output, const at::Tensor& kept,
                             const at::Tensor& target, const std::optional<at::Tensor>& lse,
                             const at::Tensor& total_weight, const LossOptions& options);

// Whether the gradient is kept for logits of this dtype.
bool keeps_gradient(const at::Tensor& logits);

// Whether the target holds class probabilities: as in torch, if it has the input's shape.
bool has_class_probabilities(const at::Tensor& input, const at::Tensor& target);

// Whether the fused kernels take these arguments; torch handles or rejects the rest.
bool can_fuse_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                            const LossOptions& options);

// The checks of the kernels' launchers. The backward may be called without the forward.
void check_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                         const LossOptions& options, std::string_view op = "cross_entropy");
void check_cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& kept,
                                  const at::Tensor& target, const std::optional<at::Tensor>& lse,
                                  const at::Tensor& total_weight, const LossOptions& options);

// The tensors as the kernels of every device take them, with their properties.
struct CrossEntropyOperands {
  bool classes_last;
  at::Tensor logits;
  at::Tensor target;
  LossOptions options;
  Layout layout;
  bool probabilities;

  CrossEntropyOperands(const at::Tensor& input, const at::Tensor& target,
                       const LossOptions& options);

  // Null if the target holds probabilities.
  const int64_t* indices() const {
    return probabilities ? nullptr : const_data<int64_t>(target);
  }
  template <typename T>
  const T* target_probs() const {
    return probabilities ? const_data<T>(target) : nullptr;
  }
  // A tensor that is laid out as `logits`, in the input's shape.
  at::Tensor in_shape_of_input(const at::Tensor& tensor) const {
    return classes_last ? tensor.movedim(-1, 1) : tensor;
  }
};

// The shape of lse: two values per row.
at::DimVector lse_sizes(const at::Tensor& input);

// The same with ATen operators, which support torch's transforms and derivatives of any order.
at::Tensor cross_entropy_composite(const at::Tensor& input, const at::Tensor& target,
                                   const LossOptions& options);

// ---- the schema's boundary: turns `f`, which takes a struct of options, into a kernel ----

// Raises for an invalid reduction or label smoothing.
LossOptions cross_entropy_options(const std::optional<at::Tensor>& weight, int64_t ignore_index,
                                  std::string_view reduction, double label_smoothing,
                                  std::optional<at::ScalarType> dtype = std::nullopt,
                                  std::string_view op = "cross_entropy");

template <auto f>
at::Tensor as_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                            const std::optional<at::Tensor>& weight, int64_t ignore_index,
                            std::string_view reduction, double label_smoothing,
                            std::optional<at::ScalarType> dtype) {
  return f(input, target,
           cross_entropy_options(weight, ignore_index, reduction, label_smoothing, dtype));
}

template <auto f>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> as_cross_entropy_forward(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    int64_t ignore_index, std::string_view reduction, double label_smoothing, bool keep,
    std::optional<at::ScalarType> dtype) {
  return f(input, target,
           cross_entropy_options(weight, ignore_index, reduction, label_smoothing, dtype), keep);
}

// Serves cross_entropy_backward, and cross_entropy_backward_, which returns nothing. grad_output
// has the loss's dtype.
template <auto f>
auto as_cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& kept,
                               const at::Tensor& target, const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& lse, const at::Tensor& total_weight,
                               int64_t ignore_index, std::string_view reduction,
                               double label_smoothing) {
  return f(grad_output, kept, target, lse, total_weight,
           cross_entropy_options(weight, ignore_index, reduction, label_smoothing,
                                 grad_output.scalar_type()));
}

}  // namespace fastnn
