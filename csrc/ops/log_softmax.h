// log_softmax(input, dim), and its backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "ops/layout.h"

namespace fastnn {

// Calls through the dispatcher. The forward's dtype is the output's, as if the input were cast to
// it first, the backward's that of the input, whose gradient it gives; absent they are one.
at::Tensor log_softmax(const at::Tensor& input, int64_t dim,
                       std::optional<at::ScalarType> dtype = std::nullopt);
at::Tensor log_softmax_backward(const at::Tensor& grad_output, const at::Tensor& output,
                                int64_t dim, std::optional<at::ScalarType> dtype = std::nullopt);

// Whether the fused kernel takes this input, and has an output of that dtype: the input's, or what
// it is summed in. Torch serves or refuses the rest.
bool can_fuse_log_softmax(const at::Tensor& input, std::optional<at::ScalarType> dtype);

// torch's log_softmax, which supports torch's transforms and derivatives of any order.
at::Tensor log_softmax_composite(const at::Tensor& input, int64_t dim,
                                 std::optional<at::ScalarType> dtype);

void check_log_softmax_backward(const at::Tensor& grad_output, const at::Tensor& output,
                                std::optional<at::ScalarType> dtype);

// A 0-d tensor is a row of one class.
Layout log_softmax_layout(const at::Tensor& tensor, int64_t dim);

}  // namespace fastnn
