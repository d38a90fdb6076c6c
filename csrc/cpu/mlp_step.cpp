#include "cpu/mlp_step.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <vector>

#include "cpu/launch.h"
#include "cpu/loss.h"
#include "cpu/matrix.h"
#include "cpu/mlp.h"
#include "ops/cross_entropy.h"

namespace fastnn::cpu {
namespace {

// Raises unless the input matches the first layer, and each layer the next one.
void check_layers(const at::Tensor& input, c10::ArrayRef<StepLayer> layers) {
  int64_t features = input.size(1);
  for (size_t i = 0; i < layers.size(); ++i) {
    const at::Tensor& weight = layers[i].weight.param;
    TORCH_CHECK(i > 0 || weight.size(1) == features,
                "train_step: expected input's last dimension to be the first layer's in_features ",
                weight.size(1), ", but input has shape ", input.sizes());
    TORCH_CHECK(weight.size(1) == features, "train_step: expected layer ", i, " to have ", features,
                " in_features, the previous layer's out_features, but its weight has shape ",
                weight.sizes());
    features = weight.size(0);
  }
}

// Cuts the memory of a step into pieces that each start at a cache line.
class Pieces {
 public:
  // Only counts the bytes, before there is memory.
  Pieces() = default;
  explicit Pieces(char* memory) : memory_(memory) {
  }
  template <typename T>
  T* take(int64_t count) {
    constexpr int64_t kLine = 64;
    char* const piece = memory_ == nullptr ? nullptr : memory_ + taken_;
    taken_ += ceil_div<int64_t>(count * sizeof(T), kLine) * kLine;
    return reinterpret_cast<T*>(piece);
  }
  int64_t taken() const {
    return taken_;
  }

 private:
  char* memory_ = nullptr;
  int64_t taken_ = 0;
};

// A step's buffers, except its parameters and the logits.
template <typename T>
struct Places {
  std::vector<T*> hidden;  // the outputs of all layers but the last
  T* weight_grad;          // each layer's, in turn
  T* bias_grad;
  T* passed[2];

  Places(Pieces& pieces, int64_t rows, c10::ArrayRef<StepLayer> layers) {
    int64_t largest = 0, widest = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
      const at::Tensor& weight = layers[i].weight.param;
      if (i + 1 < layers.size()) hidden.push_back(pieces.take<T>(rows * weight.size(0)));
      largest = std::max(largest, weight.numel());
      widest = std::max(widest, weight.size(0));
    }
    weight_grad = pieces.take<T>(largest);
    bias_grad = pieces.take<T>(widest);
    for (T*& place : passed) place = pieces.take<T>(rows * widest);
  }
};

template <typename T>
simd::SteppedParam<T> stepped(const StepParam& of) {
  simd::SteppedParam<T> step{.param = data<T>(of.param),
                             .momentum_buffer = nullptr,
                             .wide_momentum_buffer = nullptr,
                             .options = *of.options};
  if (!of.momentum_buffer.defined()) return step;
  if (of.momentum_buffer.scalar_type() == of.param.scalar_type()) {
    step.momentum_buffer = data<T>(of.momentum_buffer);
  } else {
    step.wide_momentum_buffer = data<simd::accum<T>>(of.momentum_buffer);
  }
  return step;
}

// The parameters' steps, which the gradients point to.
template <typename T>
struct Steps {
  std::vector<simd::SteppedParam<T>> params;
  std::vector<LayerGradients<T>> layers;
  size_t first;  // the first layer with a wanted gradient; the number of layers if there is none

  Steps(c10::ArrayRef<StepLayer> of, const Places<T>& places)
      : layers(of.size()), first(of.size()) {
    params.reserve(2 * of.size());  // gradients point to them
    const auto step = [&](size_t i, const StepParam& param, ParamGradient<T>& grad, T* place) {
      if (!param.wants_gradient()) return;
      first = std::min(first, i);
      if (param.grad.defined()) {
        grad.grad = data<T>(param.grad);
      } else {
        grad = {place, &params.emplace_back(stepped<T>(param))};
      }
    };
    for (size_t i = 0; i < of.size(); ++i) {
      step(i, of[i].weight, layers[i].weight, places.weight_grad);
      if (of[i].bias) step(i, *of[i].bias, layers[i].bias, places.bias_grad);
    }
  }
};

template <typename T>
std::vector<MLPLayer<T>> chain(const at::Tensor& input, const at::Tensor& logits,
                               c10::ArrayRef<StepLayer> layers, const Places<T>& places) {
  std::vector<MLPLayer<T>> chain(layers.size());
  simd::Matrix<T> layer_input = operand<T>(input);
  for (size_t i = 0; i < layers.size(); ++i) {
    const at::Tensor& weight = layers[i].weight.param;
    const int64_t out_features = weight.size(0), in_features = weight.size(1);
    T* const output = i + 1 < layers.size() ? places.hidden[i] : data<T>(logits);
    chain[i] = {.in_features = in_features,
                .out_features = out_features,
                .input = layer_input,
                .weight = {const_data<T>(weight), in_features, /*transposed=*/false},
                .bias = layers[i].bias ? const_data<T>(layers[i].bias->param) : nullptr,
                .relu = layers[i].relu,
                .output = output};
    layer_input = {output, out_features, /*transposed=*/false};
  }
  return chain;
}

struct LossAndGradient {
  at::Tensor loss;
  at::Tensor grad;
};

// Raises for a bad target.
LossAndGradient loss_of(const at::Tensor& logits, const at::Tensor& target,
                        const LossOptions& options, double scale) {
  const auto [loss, kept, lse, total_weight] =
      cross_entropy_forward(logits, target, options, /*keep=*/true);
  if (scale != 1 || !keeps_gradient(logits)) {
    const at::Tensor grad_output = scalar_tensor(scale, logits.scalar_type());
    cross_entropy_backward_(grad_output, kept, target, optional(lse), total_weight, options);
  }
  return {loss, kept};
}

void bump_versions(c10::ArrayRef<StepLayer> layers) {
  const auto bump = [](const StepParam& of) {
    if (!of.options) return;
    for (const at::Tensor& tensor : {of.param, of.momentum_buffer}) {
      if (tensor.defined() && !tensor.is_inference()) torch::autograd::impl::bump_version(tensor);
    }
  };
  for (const StepLayer& layer : layers) {
    bump(layer.weight);
    if (layer.bias) bump(*layer.bias);
  }
}

}  // namespace

char* MLPStep::memory(int64_t bytes) {
  if (!memory_.defined() || memory_.numel() < bytes) {
    memory_ = at::Tensor();  // free the old memory first
    memory_ = empty_result({bytes}, at::kByte);
  }
  return static_cast<char*>(memory_.data_ptr());
}

template <typename T>
at::Tensor MLPStep::run_as(const at::Tensor& given_input, const at::Tensor& target,
                           c10::ArrayRef<StepLayer> layers, const LossOptions& options,
                           double scale) {
  const at::Tensor input = as_matrix(given_input);
  const int64_t rows = input.size(0);
  const at::Tensor logits =
      empty_result({rows, layers.back().weight.param.size(0)}, input.scalar_type());
  Pieces counted;
  Places<T>(counted, rows, layers);
  Pieces pieces(memory(counted.taken()));
  const Places<T> places(pieces, rows, layers);
  const auto chained = chain(input, logits, layers, places);
  mlp_forward<T>(rows, chained);
  const auto [loss, grad] = loss_of(logits, target, options, scale);
  // Nothing has changed so far, and nothing raises from here on.
  const Steps<T> steps(layers, places);
  if (steps.first < layers.size()) {
    mlp_backward<T>(rows, chained, const_data<T>(grad),
                    {.layers = steps.layers,
                     .input = nullptr,
                     .first = steps.first,
                     .passed = {places.passed[0], places.passed[1]}});
  }
  return loss;
}

at::Tensor MLPStep::run(const at::Tensor& input, const at::Tensor& target,
                        c10::ArrayRef<StepLayer> layers, const LossOptions& loss, double scale) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  check_layers(input, layers);
  at::Tensor result;
  dispatch(input.scalar_type(), "train_step",
           [&]<typename T>() { result = run_as<T>(input, target, layers, loss, scale); });
  bump_versions(layers);
  return result;
}

}  // namespace fastnn::cpu
