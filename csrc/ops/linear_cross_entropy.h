// linear_cross_entropy(input, linear_weight, target): the cross entropy of linear's output, which
// is never materialized as a whole, and its gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "ops/cross_entropy.h"

namespace fastnn {

// A linear layer and its input: logits = input @ weight.T + bias, with an input of (N, D) or (D).
struct LinearHead {
  at::Tensor input;
  at::Tensor weight;
  std::optional<at::Tensor> bias;
};

// The options for the logits and the losses, besides those of cross_entropy.
struct LinearLossOptions : LossOptions {
  double softcap = 0;  // logits become softcap * tanh(logits / softcap); 0 for none
  double logit_scale = 1;
  double z_loss = 0;
  std::optional<at::Tensor> normalizer;  // the divisor of the sum, instead of the count

  bool adjusts_logits() const {
    return softcap != 0 || logit_scale != 1;
  }
};

// The gradients of input, weight and bias that are wanted.
using HeadMask = std::array<bool, 3>;
using HeadGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Calls through the dispatcher. The forward returns the wanted gradients of the reduced loss, in
// the accumulation dtype, for the backward to scale and to round once; unwanted ones are undefined.
// Without a reduction it returns each row's log-sum-exp instead (see cross_entropy_forward), for
// linear_cross_entropy_backward to compute the gradients from recomputed blocks of logits.
at::Tensor linear_cross_entropy(const LinearHead& head, const at::Tensor& target,
                                const LinearLossOptions& options);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_forward(
    const LinearHead& head, const at::Tensor& target, const LinearLossOptions& options,
    HeadMask wanted);
HeadGradients linear_cross_entropy_backward(const at::Tensor& grad_output, const LinearHead& head,
                                            const at::Tensor& target, const at::Tensor& lse,
                                            const LinearLossOptions& options, HeadMask wanted);

// Whether the fused kernels take these arguments; torch handles or rejects the rest.
bool can_fuse_linear_cross_entropy(const LinearHead& head, const at::Tensor& target,
                                   const LinearLossOptions& options);

// The checks of the kernels' launchers.
void check_linear_cross_entropy(const LinearHead& head, const at::Tensor& target,
                                const LinearLossOptions& options);
void check_linear_cross_entropy_backward(const at::Tensor& grad_output, const LinearHead& head,
                                         const at::Tensor& target, const at::Tensor& lse,
                                         const LinearLossOptions& options);

// A tensor with the logits' shape and device and the loss's dtype, but one element in memory: it
// stands in for the logits when arguments are checked.
at::Tensor shape_of_logits(const LinearHead& head, const LinearLossOptions& options);

// The divisor of 'mean', with ATen operators; shape_of_logits() will do for the logits.
at::Tensor linear_total_weight(const at::Tensor& logits, const at::Tensor& target,
                               const LinearLossOptions& options);

// The same with ATen operators, which support torch's transforms and derivatives of any order.
at::Tensor linear_cross_entropy_composite(const LinearHead& head, const at::Tensor& target,
                                          const LinearLossOptions& options);

// ---- the schema's boundary: turns `f`, which takes a struct of options, into a kernel ----

// Raises for invalid options.
LinearLossOptions linear_loss_options(const std::optional<at::Tensor>& weight,
                                      std::string_view reduction, int64_t ignore_index,
                                      double label_smoothing, std::optional<double> softcap,
                                      double logit_scale, double z_loss,
                                      const std::optional<at::Tensor>& normalizer,
                                      std::optional<at::ScalarType> dtype);

template <auto f>
at::Tensor as_linear_cross_entropy(
    const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
    const std::optional<at::Tensor>& linear_bias, const std::optional<at::Tensor>& weight,
    std::string_view reduction, int64_t ignore_index, double label_smoothing,
    std::optional<double> softcap, double logit_scale, double z_loss,
    const std::optional<at::Tensor>& normalizer, std::optional<at::ScalarType> dtype) {
  return f({input, linear_weight, linear_bias}, target,
           linear_loss_options(weight, reduction, ignore_index, label_smoothing, softcap,
                               logit_scale, z_loss, normalizer, dtype));
}

template <auto f>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
as_linear_cross_entropy_forward(const at::Tensor& input, const at::Tensor& linear_weight,
                                const at::Tensor& target,
                                const std::optional<at::Tensor>& linear_bias,
                                const std::optional<at::Tensor>& weight, std::string_view reduction,
                                int64_t ignore_index, double label_smoothing,
                                std::optional<double> softcap, double logit_scale, double z_loss,
                                const std::optional<at::Tensor>& normalizer,
                                std::optional<at::ScalarType> dtype, HeadMask output_mask) {
  return f({input, linear_weight, linear_bias}, target,
           linear_loss_options(weight, reduction, ignore_index, label_smoothing, softcap,
                               logit_scale, z_loss, normalizer, dtype),
           output_mask);
}

template <auto f>
HeadGradients as_linear_cross_entropy_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& linear_weight,
    const at::Tensor& target, const std::optional<at::Tensor>& linear_bias,
    const std::optional<at::Tensor>& weight, const at::Tensor& lse, int64_t ignore_index,
    double label_smoothing, std::optional<double> softcap, double logit_scale, double z_loss,
    std::optional<at::ScalarType> dtype, HeadMask output_mask) {
  return f(grad_output, {input, linear_weight, linear_bias}, target, lse,
           linear_loss_options(weight, "none", ignore_index, label_smoothing, softcap, logit_scale,
                               z_loss, std::nullopt, dtype),
           output_mask);
}

}  // namespace fastnn
