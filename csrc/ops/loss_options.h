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
  // The loss's, as if input, target and weight were cast to it first; the input's if absent.
  std::optional<at::ScalarType> dtype = std::nullopt;

  bool per_row() const {
    return reduction == at::Reduction::None;
  }
  bool is_mean() const {
    return reduction == at::Reduction::Mean;
  }
  at::ScalarType dtype_of_loss(const at::Tensor& input) const {
    return dtype.value_or(input.scalar_type());
  }
  // The operands as that cast makes them; class indices stay.
  at::Tensor cast(const at::Tensor& tensor) const {
    return dtype && at::isFloatingType(tensor.scalar_type()) ? tensor.to(*dtype) : tensor;
  }
  std::optional<at::Tensor> cast_weight() const {
    return weight ? std::optional(cast(*weight)) : weight;
  }
};

// The names of the reductions in the schemas. Raises for any other name.
at::Reduction::Reduction parse_reduction(std::string_view name);
std::string_view reduction_name(at::Reduction::Reduction reduction);

}  // namespace fastnn
