// linear_cross_entropy(input, linear_weight, target): the cross entropy of linear's output, which
// never exists as a whole, and its gradients.
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

// What is done to the logits, and to the losses beside cross_entropy's options.
struct LinearLossOptions : LossOptions {
  double softcap = 0;  // logits become softcap * tanh(logits / softcap); 0: they don't
  double logit_scale = 1;
  double z_loss = 0;
  std::optional<at::Tensor> normalizer;  // what the sum is divided by, in the place of the count
  std::optional<at::ScalarType> dtype;   // the loss's and its targets'; the input's if absent

  bool adjusts_logits() const {
    return softcap != 0 || logit_scale != 1;
  }
};

// The gradients of input, weight and bias that are wanted.
using HeadMask = std::array<bool, 3>;
using HeadGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Calls through the dispatcher. Where a gradient is wanted, the forward returns those of the
// reduced loss, in what the sums are carried in, for the backward to scale and to round once:
// undefined where they aren't wanted. Without a reduction it returns each row's log-sum-exp instead
// (see cross_entropy_forward), from which linear_cross_entropy_backward computes the logits' blocks
// once more.
at::Tensor linear_cross_entropy(const LinearHead& head, const at::Tensor& target,
                                const LinearLossOptions& options);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_forward(
    const LinearHead& head, const at::Tensor& target, const LinearLossOptions& options,
    HeadMask wanted);
HeadGradients linear_cross_entropy_backward(const at::Tensor& grad_output, const LinearHead& head,
                                            const at::Tensor& target, const at::Tensor& lse,
                                            const LinearLossOptions& options, HeadMask wanted);

// Whether there are kernels for such a tensor: on the CPU. (Those of the meta device know shapes
// alone.)
bool has_linear_cross_entropy(const at::Tensor& input);

// Whether the fused kernels take these arguments; torch serves or refuses the rest.
bool can_fuse_linear_cross_entropy(const LinearHead& head, const at::Tensor& target,
                                   const LinearLossOptions& options);

// The checks of the kernels' launchers.
void check_linear_cross_entropy(const LinearHead& head, const at::Tensor& target,
                                const LinearLossOptions& options);
void check_linear_cross_entropy_backward(const at::Tensor& grad_output, const LinearHead& head,
                                         const at::Tensor& target, const at::Tensor& lse,
                                         const LinearLossOptions& options);

// A tensor of the logits' shape and device, and of the loss's dtype, of one element in memory: what
// stands for the logits where arguments are checked.
at::Tensor shape_of_logits(const LinearHead& head, const LinearLossOptions& options);

// What 'mean' divides by, in ATen operators, of logits or what stands for them.
at::Tensor linear_total_weight(const at::Tensor& logits, const at::Tensor& target,
                               const LinearLossOptions& options);

// The same in ATen operators, with torch's own transforms and derivatives of any order.
at::Tensor linear_cross_entropy_composite(const LinearHead& head, const at::Tensor& target,
                                          const LinearLossOptions& options);

// ---- the schema's boundary: `f`, which takes its options in one, as the dispatcher calls it ----

// Raises for options that there aren't.
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
