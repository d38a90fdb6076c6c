// cross_entropy(input, target): log_softmax and nll_loss in one, and its backward.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace fastnn {

// Calls through the dispatcher. `lse` holds each row's log-sum-exp in two parts, its maximum (0)
// and the log of the sum of exp(x - max) (1), which keep what their sum would round away;
// `total_weight` is what 'mean' divides by.
at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target,
                         const std::optional<at::Tensor>& weight, int64_t ignore_index,
                         std::string_view reduction, double label_smoothing);
std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_forward(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    int64_t ignore_index, std::string_view reduction, double label_smoothing);
at::Tensor cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                  const at::Tensor& target, const std::optional<at::Tensor>& weight,
                                  const at::Tensor& lse, const at::Tensor& total_weight,
                                  int64_t ignore_index, std::string_view reduction,
                                  double label_smoothing);

// Whether the target holds class probabilities: torch's rule, the input's shape.
bool has_class_probabilities(const at::Tensor& input, const at::Tensor& target);

// Whether the fused kernels take these arguments. Raises for options that no path takes.
bool cross_entropy_is_fusable(const at::Tensor& input, const at::Tensor& target,
                              const std::optional<at::Tensor>& weight, double label_smoothing);

// The checks of the kernels' launchers; the backward's are those that its forward has not made.
void check_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                         const std::optional<at::Tensor>& weight, int64_t ignore_index,
                         double label_smoothing);
void check_cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                  const at::Tensor& lse, const at::Tensor& total_weight,
                                  at::Reduction::Reduction reduction);

// The shape of lse: two values per row.
at::DimVector lse_sizes(const at::Tensor& input);

// The same in ATen operators, with torch's own transforms and derivatives of any order.
at::Tensor cross_entropy_composite(const at::Tensor& input, const at::Tensor& target,
                                   const std::optional<at::Tensor>& weight, int64_t ignore_index,
                                   std::string_view reduction, double label_smoothing);

}  // namespace fastnn
