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

// A contiguous parameter and how it is stepped; without options it is not.
struct StepParam {
  at::Tensor param;
  at::Tensor momentum_buffer;  // undefined without momentum; of the dtypes that sgd_step_ takes
  std::optional<SGDOptions> options;
};

struct StepLayer {
  StepParam weight;
  std::optional<StepParam> bias;
  bool relu;
};

class MLPStep {
 public:
  // Trains on a batch and returns its loss. The last layer's output are the logits of
  // cross_entropy, reduced by 'mean' or 'sum'. Raises for bad input before anything is changed.
  at::Tensor run(const at::Tensor& input, const at::Tensor& target, c10::ArrayRef<StepLayer> layers,
                 const LossOptions& loss);

 private:
  template <typename T>
  at::Tensor run_as(const at::Tensor& input, const at::Tensor& target,
                    c10::ArrayRef<StepLayer> layers, const LossOptions& loss);
  // At least so many bytes, of which nothing is kept.
  char* memory(int64_t bytes);

  std::mutex mutex_;
  at::Tensor memory_;
};

}  // namespace fastnn::cpu
