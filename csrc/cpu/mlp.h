// A chain of linear layers on raw memory: its forward, and its backward, whose gradients are
// written or step their parameters. T: a storage type of the kernels.
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
  T* output;  // (rows, out_features); behind it the next layer's input
};

template <typename T>
void mlp_forward(int64_t rows, c10::ArrayRef<MLPLayer<T>> layers);

// Where the gradient of a parameter goes: to memory of its size; which then holds nothing where
// the parameter is stepped by it. Null where it is not wanted.
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

// The gradients that a backward makes.
template <typename T>
struct MLPGradients {
  c10::ArrayRef<LayerGradients<T>> layers;
  T* input;      // null where it is not wanted
  size_t first;  // the first layer with a wanted gradient, 0 where the input's is
  T* passed[2];  // each for the gradient of any layer's output
};

// `grad_output` may be in either of the places for what is passed on.
template <typename T>
void mlp_backward(int64_t rows, c10::ArrayRef<MLPLayer<T>> layers, const T* grad_output,
                  const MLPGradients<T>& grads);

}  // namespace fastnn::cpu
