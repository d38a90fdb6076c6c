#include "ops/log_softmax.h"

#include <ATen/ops/_log_softmax_backward_data.h>
#include <torch/library.h>

#include "autograd/backward_node.h"
#include "autograd/transforms.h"

namespace fastnn {
namespace {

at::Tensor log_softmax_backward_composite(const at::Tensor& grad, const at::Tensor& output,
                                          int64_t dim, std::optional<at::ScalarType> dtype) {
  const at::Tensor result = at::_log_softmax_backward_data(grad, output, dim, output.scalar_type());
  return dtype ? result.to(*dtype) : result;
}

struct LogSoftmaxBackward {
  static constexpr auto name = "LogSoftmaxBackward";
  using Tensors = std::array<at::Tensor, 1>;
  static constexpr std::array<bool, 1> kOutputs = {true};
  using Options = std::tuple<int64_t, int64_t>;

  static torch::autograd::variable_list backward(const at::Tensor& grad, const Tensors& tensors,
                                                 const Options& options,
                                                 const std::vector<bool>& /*needs_input_grad*/) {
    const auto& [output] = tensors;
    const auto [dim, input_dtype] = options;
    const auto dtype = at::ScalarType(input_dtype);
    if (backward_must_be_composite(grad)) {
      return {log_softmax_backward_composite(grad, output, dim, dtype)};
    }
    BelowAutograd below_autograd;
    return {log_softmax_backward(grad, output, dim, dtype)};
  }
};

at::Tensor log_softmax_recorded(const at::Tensor& input, int64_t dim,
                                std::optional<at::ScalarType> dtype) {
  const auto node = make_backward_node<LogSoftmaxBackward>(input);
  const at::Tensor output = [&] {
    BelowAutograd below_autograd;
    return fastnn::log_softmax(input, dim, dtype);
  }();
  record(node, output, {output}, {dim, int64_t(input.scalar_type())});
  return output;
}

at::Tensor log_softmax_autograd(const at::Tensor& input, int64_t dim,
                                std::optional<at::ScalarType> dtype) {
  if (in_functorch() || has_tangent(input) || !can_fuse_log_softmax(input, dtype)) {
    return log_softmax_composite(input, dim, dtype);
  }
  if (needs_grad(input)) return log_softmax_recorded(input, dim, dtype);
  BelowAutograd below_autograd;
  return fastnn::log_softmax(input, dim, dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, Autograd, m) {
  m.impl("log_softmax", log_softmax_autograd);
}

// vmap runs these on the whole batch at once; without them it would loop over the samples.
TORCH_LIBRARY_IMPL(fastnn, FuncTorchBatchedDecomposition, m) {
  m.impl("log_softmax", log_softmax_composite);
  m.impl("log_softmax_backward", log_softmax_backward_composite);
}

}  // namespace fastnn
