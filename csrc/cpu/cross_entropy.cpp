// cross_entropy on the CPU: one pass over the logits forward (each row stays in cache between its
// maximum and its sum), one backward.
#include "ops/cross_entropy.h"

#include <torch/library.h>

#include "cpu/loss.h"

namespace fastnn::cpu {
namespace {

struct Operands : CrossEntropyOperands {
  Operands(const at::Tensor& input, const at::Tensor& target,
           const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing)
      : CrossEntropyOperands(input, target, weight, ignore_index, label_smoothing) {
    TORCH_CHECK(layout.classes <= INT32_MAX, "cross_entropy: expected input to have at most ",
                "2147483647 classes, but it has shape ", input.sizes());
  }

  template <typename T>
  simd::CrossEntropy<T> as() const {
    return {.layout = layout,
            .logits = const_data<T>(logits),
            .target = indices(),
            .target_probs = target_probs<T>(),
            .weight = const_data_or_null<T>(weight),
            .ignore_index = ignore_index,
            .label_smoothing = label_smoothing};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_forward_cpu(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    int64_t ignore_index, std::string_view reduction_name, double label_smoothing) {
  check_cross_entropy(input, target, weight, ignore_index, label_smoothing);
  const auto reduction = parse_reduction(reduction_name);
  const Operands operands(input, target, weight, ignore_index, label_smoothing);
  const at::Tensor lse = empty(lse_sizes(input), accumulate_dtype(input));
  const bool per_row = reduction == at::Reduction::None;
  const at::Tensor losses =
      per_row ? empty(per_row_sizes(input), input.scalar_type()) : at::Tensor();
  const int64_t rows = operands.layout.rows();
  simd::LossSums sums;
  FirstBadTarget bad;
  dispatch(input.scalar_type(), "cross_entropy", [&]<typename T>() {
    const auto& kernel = kernels<T>();
    const auto args = operands.as<T>();
    auto* max = data<simd::accum<T>>(lse);
    T* loss = per_row ? data<T>(losses) : nullptr;
    sums = sum_over_rows(
        rows, operands.layout.classes, [&](int64_t begin, int64_t end, simd::LossSums& sum) {
          bad.update(kernel.cross_entropy(args, begin, end, max, max + rows, loss, sum));
        });
  });
  if (!operands.probabilities) {
    bad.raise_if_any(operands.indices(), operands.layout.classes, ignore_index);
  }
  // Torch's rule: over nothing, the mean of probabilities is NaN as that of class indices is.
  if (input.numel() == 0) sums.weight = 0;
  return {per_row ? losses : reduced_loss(sums, reduction, input), lse,
          scalar_tensor(sums.weight, accumulate_dtype(input))};
}

at::Tensor cross_entropy_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                      const at::Tensor& target,
                                      const std::optional<at::Tensor>& weight,
                                      const at::Tensor& lse, const at::Tensor& total_weight,
                                      int64_t ignore_index, std::string_view reduction_name,
                                      double label_smoothing) {
  constexpr auto op = "cross_entropy_backward";
  check_cross_entropy(input, target, weight, ignore_index, label_smoothing);
  const auto reduction = parse_reduction(reduction_name);
  check_cross_entropy_backward(grad_output, input, lse, total_weight, reduction);

  const Operands operands(input, target, weight, ignore_index, label_smoothing);
  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor saved_lse = lse.contiguous();
  const bool per_row = reduction == at::Reduction::None;
  const double scale = grad_scale(total_weight, reduction);
  const at::Tensor grad_logits = empty(operands.logits.sizes(), input.scalar_type());
  const int64_t rows = operands.layout.rows();
  FirstBadTarget bad;
  dispatch(input.scalar_type(), op, [&]<typename T>() {
    const auto& kernel = kernels<T>();
    const auto args = operands.as<T>();
    const auto* max = const_data<simd::accum<T>>(saved_lse);
    const T* g = const_data<T>(grad);
    T* grad_x = data<T>(grad_logits);
    at::parallel_for(0, rows, grain(operands.layout.classes), [&](int64_t begin, int64_t end) {
      bad.update(kernel.cross_entropy_backward(args, begin, end, max, max + rows, g, per_row, scale,
                                               grad_x));
    });
  });
  if (!operands.probabilities) {
    bad.raise_if_any(operands.indices(), operands.layout.classes, ignore_index);
  }
  return operands.in_shape_of_input(grad_logits);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("cross_entropy_forward", cross_entropy_forward_cpu);
  m.impl("cross_entropy_backward", cross_entropy_backward_cpu);
}

}  // namespace fastnn::cpu
