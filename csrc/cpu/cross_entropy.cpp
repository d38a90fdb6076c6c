// cross_entropy on the CPU: one pass over the logits forward (each row stays in cache between its
// maximum, its sum and what is kept for the backward).
#include "ops/cross_entropy.h"

#include <torch/library.h>

#include <cstring>

#include "cpu/loss.h"

namespace fastnn::cpu {
namespace {

struct Operands : CrossEntropyOperands {
  Operands(const at::Tensor& input, const at::Tensor& target, const LossOptions& options)
      : CrossEntropyOperands(input, target, options) {
    TORCH_CHECK(layout.classes <= INT32_MAX, "cross_entropy: expected input to have at most ",
                "2147483647 classes, but it has shape ", input.sizes());
    this->options.weight = class_weight_of(options);
  }

  template <typename T>
  simd::CrossEntropy<T> as() const {
    return {.layout = layout,
            .logits = const_data<T>(logits),
            .target = indices(),
            .target_probs = target_probs<T>(),
            .weight = const_data_or_null<simd::accum<T>>(options.weight),
            .ignore_index = options.ignore_index,
            .label_smoothing = options.label_smoothing};
  }
};

// The divisor of 'mean', from the targets alone.
template <typename T>
double total_weight_of(const simd::CrossEntropy<T>& args) {
  const auto add_weights = [&](int64_t begin, int64_t end, simd::LossSums& sum) {
    double total = 0;  // not `sum` itself, which would be written to memory at each row
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = args.target[i];
      const bool counts = t != args.ignore_index && t >= 0 && t < args.layout.classes;
      total += !counts ? 0 : args.weight ? args.weight[t] : 1;
    }
    sum.weight = total;
  };
  return sum_over_rows(args.layout.rows(), 1, add_weights).weight;
}

// The divisor that the forward returns, so that the backward computes a gradient of the same bits.
template <typename T>
simd::accum<T> divisor_of_rows(const simd::CrossEntropy<T>& args, const LossOptions& options) {
  if (!options.is_mean()) return 1;
  return args.target ? total_weight_of(args) : double(args.layout.rows());
}

// What the forward keeps for the backward; undefined tensors if nothing.
struct Kept {
  at::Tensor tensor;
  at::Tensor lse;
  bool copies_rows = false;  // whether the rows of logits are yet to be copied to `tensor`

  Kept(const Operands& operands, const at::Tensor& input) {
    if (keeps_gradient(input)) {
      tensor = empty_result(operands.logits.sizes(), input.scalar_type());
      return;
    }
    lse = empty_result(lse_sizes(input), accumulate_dtype(input));
    if (!operands.logits.is_alias_of(input)) {
      tensor = operands.logits;  // a copy already
    } else if (operands.layout.inner != 1) {
      tensor = operands.logits.clone();
    } else {
      tensor = empty_result(operands.logits.sizes(), input.scalar_type());
      copies_rows = input.numel() != 0;
    }
  }
  Kept() = default;

  template <typename T>
  simd::KeptRows<T> rows(const simd::CrossEntropy<T>& args, const LossOptions& options) const {
    if (!tensor.defined()) return {};
    if constexpr (simd::kKeepsGradient<T>) {
      const double scale = reciprocal(divisor_of_rows(args, options));
      return {.grad = data<T>(tensor), .scale = scale, .max = nullptr, .sum = nullptr};
    } else {
      auto* max = data<simd::accum<T>>(lse);
      return {.grad = nullptr, .scale = 1, .max = max, .sum = max + args.layout.rows()};
    }
  }
  // Called while the rows are in the cache.
  template <typename T>
  void copy_rows(const simd::CrossEntropy<T>& args, int64_t begin, int64_t end) const {
    const int64_t classes = args.layout.classes;
    std::memcpy(data<T>(tensor) + begin * classes, args.logits + begin * classes,
                (end - begin) * classes * sizeof(T));
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cross_entropy_forward_cpu(
    const at::Tensor& input, const at::Tensor& target, const LossOptions& options, bool keep) {
  check_cross_entropy(input, target, options);
  const Operands operands(input, target, options);
  const Kept kept = keep ? Kept(operands, input) : Kept();
  const at::Tensor losses = options.per_row()
                                ? empty_result(per_row_sizes(input), accumulate_dtype(input))
                                : at::Tensor();
  simd::LossSums sums;
  FirstBadTarget bad;
  dispatch(input.scalar_type(), "cross_entropy", [&]<typename T>() {
    const auto& kernel = kernels<T>();
    const auto args = operands.as<T>();
    const auto kept_rows = kept.rows(args, options);
    auto* loss = options.per_row() ? data<simd::accum<T>>(losses) : nullptr;
    const auto run = [&](int64_t begin, int64_t end, simd::LossSums& sum) {
      if (kept.copies_rows) kept.copy_rows(args, begin, end);
      bad.update(kernel.cross_entropy(args, begin, end, kept_rows, loss, sum));
    };
    sums = sum_over_rows(args.layout.rows(), args.layout.classes, run);
  });
  if (!operands.probabilities) {
    bad.raise_if_any(operands.indices(), operands.layout.classes, options.ignore_index);
  }
  // As in torch, the mean over nothing is NaN, for probabilities as for class indices.
  if (input.numel() == 0) sums.weight = 0;
  const at::ScalarType dtype = options.dtype_of_loss(input);
  return {options.per_row() ? losses.to(dtype) : reduced_loss(sums, options, dtype),
          keep ? operands.in_shape_of_input(kept.tensor) : at::Tensor(), kept.lse,
          scalar_tensor(sums.weight, accumulate_dtype(input))};
}

// Writes the gradient, laid out as the operands' logits, which are what the forward kept. It may
// overwrite them.
void write_gradient(const at::Tensor& grad_logits, const Operands& operands,
                    const at::Tensor& grad_output, const std::optional<at::Tensor>& lse,
                    const at::Tensor& total_weight) {
  const at::Tensor grad = in_accumulate_dtype(grad_output.contiguous());
  const auto saved_lse = contiguous(lse);
  const bool per_row = operands.options.per_row();
  const double scale = row_grad_scale(total_weight, operands.options);
  const int64_t rows = operands.layout.rows();
  FirstBadTarget bad;
  dispatch(grad_logits.scalar_type(), "cross_entropy_backward", [&]<typename T>() {
    const auto& kernel = kernels<T>();
    const auto args = operands.as<T>();
    using A = simd::accum<T>;
    const A* max = const_data_or_null<A>(saved_lse);
    const A* sum = max ? max + rows : nullptr;
    const A* g = const_data<A>(grad);
    T* grad_x = data<T>(grad_logits);
    if constexpr (simd::kKeepsGradient<T>) {
      if (grad_x == args.logits && !per_row && *g == 1) return;
    }
    at::parallel_for(0, rows, grain(operands.layout.classes), [&](int64_t begin, int64_t end) {
      bad.update(
          kernel.cross_entropy_backward(args, begin, end, max, sum, g, per_row, scale, grad_x));
    });
  });
  if (!operands.probabilities) {
    bad.raise_if_any(operands.indices(), operands.layout.classes, operands.options.ignore_index);
  }
}

at::Tensor cross_entropy_backward_cpu(const at::Tensor& grad_output, const at::Tensor& kept,
                                      const at::Tensor& target,
                                      const std::optional<at::Tensor>& lse,
                                      const at::Tensor& total_weight, const LossOptions& options) {
  check_cross_entropy_backward(grad_output, kept, target, lse, total_weight, options);
  const Operands operands(kept, target, options);
  const at::Tensor grad_logits = empty_result(operands.logits.sizes(), kept.scalar_type());
  write_gradient(grad_logits, operands, grad_output, lse, total_weight);
  return operands.in_shape_of_input(grad_logits);
}

void cross_entropy_backward_cpu_(const at::Tensor& grad_output, const at::Tensor& kept,
                                 const at::Tensor& target, const std::optional<at::Tensor>& lse,
                                 const at::Tensor& total_weight, const LossOptions& options) {
  check_cross_entropy_backward(grad_output, kept, target, lse, total_weight, options);
  const Operands operands(kept, target, options);
  write_gradient(operands.logits, operands, grad_output, lse, total_weight);
  // If the kernels don't take the strides, the operands are a copy.
  if (!operands.logits.is_alias_of(kept)) kept.copy_(operands.in_shape_of_input(operands.logits));
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("cross_entropy_forward", as_cross_entropy_forward<cross_entropy_forward_cpu>);
  m.impl("cross_entropy_backward", as_cross_entropy_backward<cross_entropy_backward_cpu>);
  m.impl("cross_entropy_backward_", as_cross_entropy_backward<cross_entropy_backward_cpu_>);
}

}  // namespace fastnn::cpu
