// The part of linear's autograd that other operators use.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

namespace fastnn {

// Makes `output` the result of a linear layer, with a ReLU if `relu`, as if the layer had been
// called by itself. `edges` are those of the input, the weight and the bias. An input or weight
// that no gradient needs may be undefined.
void give_linear_history(const at::Tensor& output, bool relu, const at::Tensor& input,
                         const at::Tensor& weight, torch::autograd::edge_list edges);

}  // namespace fastnn
