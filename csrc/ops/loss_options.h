// The options of a loss as one struct, which everything inside the schema's boundary takes.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace fastnn {

struct LossOptions {
  std::optional<at::Tensor> weight;  // one number per class
  int64_t ignore_index;
  at::Reduction::Reduction reduction;
  double label_smoothing = 0;  // nll_loss has none

  bool per_row() const {
    return reduction == at::Reduction::None;
  }
  bool is_mean() const {
    return reduction == at::Reduction::Mean;
  }
};

// The names of the reductions in the schemas. Raises for any other name.
at::Reduction::Reduction parse_reduction(std::string_view name);
std::string_view reduction_name(at::Reduction::Reduction reduction);

}  // namespace fastnn
