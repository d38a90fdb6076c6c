// nll_loss(input, target): -weight[target] * input[target] per row, and its backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "ops/loss_options.h"

namespace fastnn {

// Calls through the dispatcher. `total_weight` is the sum of the weights of the rows kept, which
// 'mean' divides by. The loss of narrow log-probabilities may have the accumulation dtype: see
// cross_entropy.h.
at::Tensor nll_loss(const at::Tensor& input, const at::Tensor& target, const LossOptions& options);
std::tuple<at::Tensor, at::Tensor> nll_loss_forward(const at::Tensor& input,
                                                    const at::Tensor& target,
                                                    const LossOptions& options);
at::Tensor nll_loss_backward(const at::Tensor& grad_output, const at::Tensor& input,
                             const at::Tensor& target, const at::Tensor& total_weight,
                             const LossOptions& options);

// Whether the fused kernels take these arguments; torch handles or rejects the rest.
bool can_fuse_nll_loss(const at::Tensor& input, const at::Tensor& target,
                       const LossOptions& options);

// The checks of the kernels' launchers.
void check_nll_loss(const at::Tensor& input, const at::Tensor& target, const LossOptions& options);
void check_nll_loss_backward(const at::Tensor& grad_output, const at::Tensor& input,
                             const at::Tensor& target, const at::Tensor& total_weight,
                             const LossOptions& options);

// The same with ATen operators, which support torch's transforms and derivatives of any order.
at::Tensor nll_loss_composite(const at::Tensor& input, const at::Tensor& target,
                              const LossOptions& options);

// ---- the schema's boundary: turns `f`, which takes a struct of options, into a kernel ----

template <auto f>
at::Tensor as_nll_loss(const at::Tensor& input, const at::Tensor& target,
                       const std::optional<at::Tensor>& weight, int64_t ignore_index,
                       std::string_view reduction, std::optional<at::ScalarType> dtype) {
  return f(input, target, {weight, ignore_index, parse_reduction(reduction), 0, dtype});
}

template <auto f>
std::tuple<at::Tensor, at::Tensor> as_nll_loss_forward(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    int64_t ignore_index, std::string_view reduction, std::optional<at::ScalarType> dtype) {
  return f(input, target, {weight, ignore_index, parse_reduction(reduction), 0, dtype});
}

// grad_output has the loss's dtype.
template <auto f>
at::Tensor as_nll_loss_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                const at::Tensor& target, const std::optional<at::Tensor>& weight,
                                const at::Tensor& total_weight, int64_t ignore_index,
                                std::string_view reduction) {
  return f(grad_output, input, target, total_weight,
           {weight, ignore_index, parse_reduction(reduction), 0, grad_output.scalar_type()});
}

}  // namespace fastnn
