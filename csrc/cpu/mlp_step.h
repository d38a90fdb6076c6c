// A whole training step of a chain of linear layers: forward, cross entropy, backward and update,
// on memory that is kept between steps. The update is the epilogue of the weight gradient's
// product, so that no gradient of a weight reaches memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <mutex>
#include <optional>

#include "ops/loss_options.h"
#include "ops/sgd_options.h"

namespace fastnn::cpu {

// A contiguous parameter, and what becomes of it: its gradient is stored, or it is stepped, or
// neither.
struct StepParam {
  at::Tensor param;
  at::Tensor grad;  // where to; undefined where it is not stored
  std::optional<SGDOptions> options;
  at::Tensor momentum_buffer;  // undefined without momentum; of the dtypes that sgd_step_ takes

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
  // Trains on a batch and returns its loss. The last layer's output are the logits of
  // cross_entropy, reduced by 'mean' or 'sum'. Gradients are `scale` times those of the loss.
  // Raises for bad input before anything is changed.
  at::Tensor run(const at::Tensor& input, const at::Tensor& target, c10::ArrayRef<StepLayer> layers,
                 const LossOptions& loss, double scale);

 private:
  template <typename T>
  at::Tensor run_as(const at::Tensor& input, const at::Tensor& target,
                    c10::ArrayRef<StepLayer> layers, const LossOptions& loss, double scale);
  // At least so many bytes, of which nothing is kept.
  char* memory(int64_t bytes);

  std::mutex mutex_;
  at::Tensor memory_;
};

}  // namespace fastnn::cpu
