// The options that a loss's backward needs, kept in the node as one entry: each entry of saved_data
// costs an allocation and a hash of its name, at every call.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "ops/checks.h"

namespace fastnn {

struct LossOptions {
  int64_t ignore_index;
  std::string_view reduction;
  double label_smoothing;
};

inline void save_loss_options(torch::autograd::AutogradContext* ctx, const LossOptions& options) {
  const int64_t reduction = parse_reduction(options.reduction);
  ctx->saved_data["options"] =
      c10::ivalue::Tuple::create(options.ignore_index, reduction, options.label_smoothing);
}

inline LossOptions saved_loss_options(torch::autograd::AutogradContext* ctx) {
  const auto& options = ctx->saved_data["options"].toTupleRef().elements();
  const auto reduction = static_cast<at::Reduction::Reduction>(options[1].toInt());
  return {options[0].toInt(), reduction_name(reduction), options[2].toDouble()};
}

}  // namespace fastnn
