// The target distribution of a loss as a tensor of the input's shape, for derivatives of any order.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/loss_options.h"

namespace fastnn {

// Class indices as a distribution over the classes: (1 - label_smoothing) * weight at the target
// plus label_smoothing / C * weight at every class. Ignored rows get that of class 0.
at::Tensor index_distribution(const at::Tensor& input, const at::Tensor& target,
                              const LossOptions& options);

// The same from class probabilities: weight * ((1 - label_smoothing) * p + label_smoothing / C).
at::Tensor probability_distribution(const at::Tensor& input, const at::Tensor& probabilities,
                                    const LossOptions& options);

// The gradient with respect to the input, with zeros in the ignored rows, even where it is NaN.
// `target` holds class indices.
at::Tensor zero_ignored_rows(const at::Tensor& grad_input, const at::Tensor& target,
                             int64_t ignore_index);

// A loss's incoming gradient for each row, shaped to broadcast against the input.
at::Tensor grad_per_row(const at::Tensor& grad_output, const at::Tensor& input,
                        const at::Tensor& total_weight, at::Reduction::Reduction reduction);

}  // namespace fastnn
