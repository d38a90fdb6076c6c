#include "autograd/target_distribution.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "ops/checks.h"

namespace fastnn {
namespace {

double number_of_classes(const at::Tensor& input) {
  return double(input.sym_size(class_dim(input)).guard_int(__FILE__, __LINE__));
}

// The class indices, shaped to broadcast against the input.
at::Tensor classes_of(const at::Tensor& input, const at::Tensor& target) {
  return (input.dim() == 1 ? target.reshape({1}) : target.unsqueeze(1)).to(at::kLong);
}

at::Tensor times_class_weight(const at::Tensor& distribution,
                              const std::optional<at::Tensor>& weight) {
  if (!weight) return distribution;
  std::vector<int64_t> sizes(distribution.dim(), 1);
  sizes[class_dim(distribution)] = -1;
  return distribution * weight->view(sizes);
}

}  // namespace

at::Tensor index_distribution(const at::Tensor& input, const at::Tensor& target,
                              const LossOptions& options) {
  const int64_t dim = class_dim(input);
  const at::Tensor classes = classes_of(input, target);
  const at::Tensor ignored = classes == options.ignore_index;
  const double smoothing = options.label_smoothing;
  const at::Tensor one_hot =
      at::zeros_like(input).scatter(dim, classes.masked_fill(ignored, 0), 1 - smoothing);
  const at::Tensor smooth = one_hot + smoothing / number_of_classes(input);
  return times_class_weight(smooth, options.weight);
}

at::Tensor zero_ignored_rows(const at::Tensor& grad_input, const at::Tensor& target,
                             int64_t ignore_index) {
  return grad_input.masked_fill(classes_of(grad_input, target) == ignore_index, 0);
}

at::Tensor probability_distribution(const at::Tensor& input, const at::Tensor& probabilities,
                                    const LossOptions& options) {
  const double smoothing = options.label_smoothing;
  const at::Tensor smooth = probabilities * (1 - smoothing) + smoothing / number_of_classes(input);
  return times_class_weight(smooth, options.weight);
}

at::Tensor grad_per_row(const at::Tensor& grad_output, const at::Tensor& input,
                        const at::Tensor& total_weight, at::Reduction::Reduction reduction) {
  switch (reduction) {
    case at::Reduction::None:
      return grad_output.unsqueeze(class_dim(input));
    case at::Reduction::Mean:
      return (grad_output / total_weight.masked_fill(total_weight == 0, NAN))
          .to(input.scalar_type());
    default:
      return grad_output;
  }
}

}  // namespace fastnn
