// mlp on the CPU: products whose epilogues add the bias, apply the ReLU, or mask a gradient by it.
// No gradient is copied between layers.
#include "cpu/mlp.h"

#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/column_sums.h"
#include "cpu/gemm.h"
#include "cpu/launch.h"
#include "cpu/matrix.h"
#include "cpu/stepped_param.h"
#include "ops/linear.h"
#include "ops/mlp.h"

namespace fastnn::cpu {

template <typename T>
void mlp_forward(int64_t rows, c10::ArrayRef<MLPLayer<T>> layers) {
  for (const MLPLayer<T>& layer : layers) {
    multiply(simd::Gemm<T>{.rows = rows,
                           .cols = layer.out_features,
                           .depth = layer.in_features,
                           .a = layer.input,
                           .b = transposed(layer.weight),
                           .bias = layer.bias,
                           .relu = layer.relu,
                           .out = layer.output});
  }
}

template <typename T>
void mlp_backward(int64_t rows, c10::ArrayRef<MLPLayer<T>> layers, const T* grad_output,
                  const MLPGradients<T>& grads) {
  const T* grad = grad_output;  // of the layer's product, before its ReLU
  if (const MLPLayer<T>& last = layers.back(); last.relu) {
    relu_backward<T>(grads.passed[0], nullptr, grad_output, last.output, rows, last.out_features);
    grad = grads.passed[0];
  }
  for (size_t i = layers.size(); i-- > grads.first;) {
    const MLPLayer<T>& layer = layers[i];
    const LayerGradients<T>& of = grads.layers[i];
    const simd::Matrix<T> grad_linear = {grad, layer.out_features, /*transposed=*/false};
    if (of.bias.grad) column_sums(of.bias.grad, grad, rows, layer.out_features);
    if (of.bias.step) step_range(*of.bias.step, of.bias.grad, 0, layer.out_features);
    // The gradient is passed on before the weight is stepped.
    T* passed = i == 0 ? grads.input : nullptr;
    if (i > grads.first) passed = grads.passed[grad == grads.passed[0] ? 1 : 0];
    if (passed) {
      multiply(simd::Gemm<T>{.rows = rows,
                             .cols = layer.in_features,
                             .depth = layer.out_features,
                             .a = grad_linear,
                             .b = layer.weight,
                             .mask = i > 0 && layers[i - 1].relu ? layers[i - 1].output : nullptr,
                             .out = passed});
    }
    if (of.weight.grad) {
      multiply(simd::Gemm<T>{.rows = layer.out_features,
                             .cols = layer.in_features,
                             .depth = rows,
                             .a = transposed(grad_linear),
                             .b = layer.input,
                             .step = of.weight.step,
                             .out = of.weight.grad});
    }
    grad = passed;
  }
}

#define FASTNN_INSTANTIATE(T)                                     \
  template void mlp_forward(int64_t, c10::ArrayRef<MLPLayer<T>>); \
  template void mlp_backward(int64_t, c10::ArrayRef<MLPLayer<T>>, const T*, const MLPGradients<T>&);
FASTNN_INSTANTIATE(double)
FASTNN_INSTANTIATE(float)
FASTNN_INSTANTIATE(simd::bfloat16)
FASTNN_INSTANTIATE(simd::float16)
#undef FASTNN_INSTANTIATE

namespace {

// ---- the operator ----

// The layers' tensors as the kernels take them; those that no wanted gradient needs are undefined.
struct BackwardOperands {
  at::Tensor grad;
  std::vector<at::Tensor> inputs;
  std::vector<at::Tensor> weights;
  at::Tensor output;
  std::vector<int64_t> features;  // of the input and of each layer

  BackwardOperands(const at::Tensor& grad_output, const OptionalTensors& inputs,
                   const OptionalTensors& weights, const std::optional<at::Tensor>& output,
                   const Flags& relu, const WantedGradients& wanted)
      : grad(matrix_of_rows(grad_output).contiguous()),
        inputs(relu.size()),
        weights(relu.size()),
        features(relu.size() + 1) {
    if (relu.get(relu.size() - 1)) this->output = matrix_of_rows(*output).contiguous();
    features.back() = grad.size(1);
    for (size_t i = relu.size(); i-- > 0 && wanted.reaches(i);) {
      const std::optional<at::Tensor> input = inputs.get(i), weight = weights.get(i);
      // A mask must be contiguous.
      const bool masks = i > 0 && relu.get(i - 1) && wanted.passes(i);
      if (masks) {
        this->inputs[i] = matrix_of_rows(*input).contiguous();
      } else if (wanted.weight(i)) {
        this->inputs[i] = as_matrix(matrix_of_rows(*input));
      }
      if (wanted.passes(i)) this->weights[i] = as_matrix(*weight);
      if (this->inputs[i].defined()) features[i] = this->inputs[i].size(1);
      if (this->weights[i].defined()) features[i] = this->weights[i].size(1);
    }
  }

  // A layer's output, null if it is undefined.
  template <typename T>
  T* output_of(size_t layer) const {
    const at::Tensor& tensor = layer + 1 == inputs.size() ? output : inputs[layer + 1];
    return tensor.defined() ? const_cast<T*>(const_data<T>(tensor)) : nullptr;
  }

  template <typename T>
  std::vector<MLPLayer<T>> layers(const Flags& relu) const {
    std::vector<MLPLayer<T>> layers(relu.size());
    for (size_t i = 0; i < layers.size(); ++i) {
      const auto matrix = [](const at::Tensor& tensor) {
        return tensor.defined() ? operand<T>(tensor) : simd::Matrix<T>{};
      };
      layers[i] = {.in_features = features[i],
                   .out_features = features[i + 1],
                   .input = matrix(inputs[i]),
                   .weight = matrix(weights[i]),
                   .bias = nullptr,
                   .relu = relu.get(i),
                   .output = output_of<T>(i)};
    }
    return layers;
  }
};

// The wanted gradients, in their order: of the input, the weights and the biases.
struct Gradients {
  at::Tensor input;
  std::vector<at::Tensor> weights;  // one per layer, undefined if it isn't wanted
  std::vector<at::Tensor> biases;
  at::Tensor passed[2];

  Gradients(const BackwardOperands& of, const WantedGradients& wanted)
      : weights(of.weights.size()), biases(of.weights.size()) {
    const at::ScalarType dtype = of.grad.scalar_type();
    const int64_t rows = of.grad.size(0);
    if (wanted.input()) input = empty_result({rows, of.features[0]}, dtype);
    int64_t widest = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t in = of.features[i], out = of.features[i + 1];
      if (wanted.weight(i)) weights[i] = empty_result({out, in}, dtype);
      if (wanted.bias(i)) biases[i] = empty_result({out}, dtype);
      if (wanted.reaches(i)) widest = std::max(widest, out);
    }
    for (at::Tensor& place : passed) place = empty_result({rows, widest}, dtype);
  }

  template <typename T>
  std::vector<LayerGradients<T>> layers() const {
    std::vector<LayerGradients<T>> layers(weights.size());
    for (size_t i = 0; i < layers.size(); ++i) {
      if (weights[i].defined()) layers[i].weight.grad = data<T>(weights[i]);
      if (biases[i].defined()) layers[i].bias.grad = data<T>(biases[i]);
    }
    return layers;
  }

  std::vector<at::Tensor> as_list(const at::Tensor& grad_output) const {
    std::vector<at::Tensor> list;
    if (input.defined()) list.push_back(input.view(with_last_size(grad_output, input.size(1))));
    for (const auto* grads : {&weights, &biases}) {
      std::copy_if(grads->begin(), grads->end(), std::back_inserter(list),
                   [](const at::Tensor& grad) { return grad.defined(); });
    }
    return list;
  }
};

std::vector<at::Tensor> mlp_backward_cpu(const at::Tensor& grad_output,
                                         const OptionalTensors& inputs,
                                         const OptionalTensors& weights,
                                         const std::optional<at::Tensor>& output, const Flags& relu,
                                         const Flags& output_mask) {
  check_mlp_backward(grad_output, inputs, weights, output, relu, output_mask);
  const WantedGradients wanted(output_mask);
  if (!wanted.reaches(weights.size() - 1)) return {};
  const BackwardOperands of(grad_output, inputs, weights, output, relu, wanted);
  const Gradients grads(of, wanted);
  dispatch(grad_output.scalar_type(), "mlp_backward", [&]<typename T>() {
    const auto layers = grads.layers<T>();
    const auto place = [](const at::Tensor& tensor) {
      return tensor.defined() ? data<T>(tensor) : nullptr;
    };
    mlp_backward<T>(of.grad.size(0), of.layers<T>(relu), const_data<T>(of.grad),
                    {.layers = layers,
                     .input = place(grads.input),
                     .first = wanted.first(),
                     .passed = {place(grads.passed[0]), place(grads.passed[1])}});
  });
  return grads.as_list(grad_output);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("mlp_backward", mlp_backward_cpu);
}

}  // namespace fastnn::cpu
