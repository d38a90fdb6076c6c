// log_softmax(input, dim), and its backward.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/layout.h"

namespace fastnn {

// Calls through the dispatcher.
at::Tensor log_softmax(const at::Tensor& input, int64_t dim);
at::Tensor log_softmax_backward(const at::Tensor& grad_output, const at::Tensor& output,
                                int64_t dim);

// Whether the fused kernel takes this input; torch serves or refuses the rest.
bool can_fuse_log_softmax(const at::Tensor& input);

// Torch's, with its own transforms and derivatives of any order.
at::Tensor log_softmax_composite(const at::Tensor& input, int64_t dim);

void check_log_softmax_backward(const at::Tensor& grad_output, const at::Tensor& output);

// A 0-d tensor is a row of one class.
Layout log_softmax_layout(const at::Tensor& tensor, int64_t dim);

}  // namespace fastnn
