// A chain of linear layers on raw memory: its forward, and its backward, which writes each gradient
// or steps the parameter along it. T: a storage type of the kernels.
#pragma once

#include <c10/util/ArrayRef.h>

#include "cpu/simd/kernels.h"

namespace fastnn::cpu {

template <typename T>
struct MLPLayer {
  int64_t in_features;
  int64_t out_features;
  simd::Matrix<T> input;   // (rows, in_features)
  simd::Matrix<T> weight;  // (out_features, in_features)
  const T* bias;           // may be null
  bool relu;
  T* output;  // (rows, out_features), the next layer's input
};

template <typename T>
void mlp_forward(int64_t rows, c10::ArrayRef<MLPLayer<T>> layers);

// Memory for a parameter's gradient, null if it isn't wanted. With a `step` the parameter is
// stepped along it, and the memory is undefined afterwards.
template <typename T>
struct ParamGradient {
  T* grad = nullptr;
  const simd::SteppedParam<T>* step = nullptr;
};

template <typename T>
struct LayerGradients {
  ParamGradient<T> weight;
  ParamGradient<T> bias;
};

// The gradients that a backward computes.
template <typename T>
struct MLPGradients {
  c10::ArrayRef<LayerGradients<T>> layers;
  T* input;      // null if it isn't wanted
  size_t first;  // the first layer with a wanted gradient; 0 if the input's is wanted
  T* passed[2];  // buffers, each with room for the gradient of any layer's output
};

// `grad_output` may be in either buffer of `grads.passed`.
template <typename T>
void mlp_backward(int64_t rows, c10::ArrayRef<MLPLayer<T>> layers, const T* grad_output,
                  const MLPGradients<T>& grads);

}  // namespace fastnn::cpu
