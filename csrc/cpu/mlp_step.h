// A whole training step of a chain of linear layers: forward, cross entropy, backward and update,
// on memory that is kept between steps. Where it pays, a weight's update is the epilogue of its
// gradient's product, and the gradient never reaches memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <mutex>
#include <optional>

#include "ops/loss_options.h"
#include "ops/sgd_options.h"

namespace fastnn::cpu {

// A contiguous parameter. Its gradient is stored, or it is stepped, or it is frozen.
struct StepParam {
  at::Tensor param;
  at::Tensor grad;  // memory for it; undefined if it isn't stored
  std::optional<SGDOptions> options;
  at::Tensor momentum_buffer;  // undefined without momentum; of a dtype that sgd_step_ takes

  bool wants_gradient() const {
    return grad.defined() || options;
  }
};

struct StepLayer {
  StepParam weight;
  std::optional<StepParam> bias;
  bool relu;
};

class MLPStep {
 public:
  // Trains on a batch and returns its loss: the cross entropy of the last layer's output, reduced
  // by 'mean' or 'sum'. Gradients are `scale` times those of the loss. Raises for bad input before
  // anything is changed.
  at::Tensor run(const at::Tensor& input, const at::Tensor& target, c10::ArrayRef<StepLayer> layers,
                 const LossOptions& loss, double scale);

 private:
  template <typename T>
  at::Tensor run_as(const at::Tensor& input, const at::Tensor& target,
                    c10::ArrayRef<StepLayer> layers, const LossOptions& loss, double scale);
  // At least this many bytes, with undefined contents.
  char* memory(int64_t bytes);

  std::mutex mutex_;
  at::Tensor memory_;
};

}  // namespace fastnn::cpu
