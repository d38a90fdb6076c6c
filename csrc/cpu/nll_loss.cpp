// nll_loss on the CPU: one element of each row is read, so that any strides serve.
#include "ops/nll_loss.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <cstring>

#include "cpu/loss.h"

namespace fastnn::cpu {
namespace {

// Where the elements of a log-probability tensor lie, as (outer, classes, inner).
struct Elements {
  at::Tensor tensor;  // keeps the memory alive
  simd::Layout layout;
  int64_t outer_stride;
  int64_t class_stride;
  int64_t inner_stride;

  int64_t operator()(int64_t row, int64_t c) const {
    // A division costs more than the rest of a row's work.
    if (layout.inner == 1) return row * outer_stride + c * class_stride;
    const int64_t outer = row / layout.inner;
    return outer * outer_stride + c * class_stride + row % layout.inner * inner_stride;
  }
};

// The input's own elements; a copy's where no single stride serves the dimensions after the
// classes.
Elements elements_of(const at::Tensor& input) {
  const simd::Layout layout = layout_around(input.sizes(), class_dim(input));
  if (input.dim() == 1) return {input, layout, 0, input.stride(0), 0};
  if (input.dim() == 2) return {input, layout, input.stride(0), input.stride(1), 0};
  const at::Tensor rows = input.reshape({layout.outer, layout.classes, layout.inner});
  return {rows, layout, rows.stride(0), rows.stride(1), rows.stride(2)};
}

void check_arguments(const at::Tensor& input, const at::Tensor& target,
                     const std::optional<at::Tensor>& weight) {
  TORCH_CHECK_VALUE(input.dim() >= 1, "nll_loss: Expected input of 1 or more dimensions (got 0)");
  check_class_indices("nll_loss", input, target, weight);
}

std::tuple<at::Tensor, at::Tensor> nll_loss_forward_cpu(const at::Tensor& input,
                                                        const at::Tensor& target,
                                                        const std::optional<at::Tensor>& weight,
                                                        int64_t ignore_index,
                                                        std::string_view reduction_name) {
  check_arguments(input, target, weight);
  const auto reduction = parse_reduction(reduction_name);
  const Elements element = elements_of(input);
  const at::Tensor indices = contiguous_indices(target);
  const int64_t classes = element.layout.classes;
  const bool per_row = reduction == at::Reduction::None;
  const at::Tensor losses =
      per_row ? empty(per_row_sizes(input), input.scalar_type()) : at::Tensor();

  simd::LossSums sums;
  FirstBadTarget bad;
  const int64_t* t = indices.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "nll_loss", [&] {
    using accum = at::opmath_type<scalar_t>;
    const auto class_weight = contiguous(weight);
    const scalar_t* w = const_data_or_null<scalar_t>(class_weight);
    const scalar_t* x = element.tensor.const_data_ptr<scalar_t>();
    scalar_t* out = per_row ? losses.mutable_data_ptr<scalar_t>() : nullptr;
    sums = sum_over_rows(element.layout.rows(), 1, [&](int64_t begin, int64_t end, auto& sum) {
      for (int64_t i = begin; i < end; ++i) {
        accum loss = 0;
        if (t[i] != ignore_index) {
          if (t[i] < 0 || t[i] >= classes) {
            bad.update(i);
            continue;
          }
          const accum class_w = w ? accum(w[t[i]]) : accum(1);
          loss = -class_w * accum(x[element(i, t[i])]);
          sum.weight += class_w;
        }
        if (out) out[i] = loss;
        sum.loss += loss;
      }
    });
  });
  bad.raise_if_any(t, classes, ignore_index);
  return {per_row ? losses : reduced_loss(sums, reduction, input),
          scalar_tensor(sums.weight, accumulate_dtype(input))};
}

at::Tensor nll_loss_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                 const at::Tensor& target, const std::optional<at::Tensor>& weight,
                                 const at::Tensor& total_weight, int64_t ignore_index,
                                 std::string_view reduction_name) {
  check_arguments(input, target, weight);
  const auto reduction = parse_reduction(reduction_name);
  check_loss_backward("nll_loss_backward", grad_output, input, total_weight, reduction);
  const at::Tensor grad_input = empty(input.sizes(), input.scalar_type());
  const at::Tensor indices = contiguous_indices(target);
  const at::Tensor grad = grad_output.contiguous();
  const Elements element = elements_of(grad_input);
  const simd::Layout& layout = element.layout;
  const bool per_row = reduction == at::Reduction::None;
  const double scale = grad_scale(total_weight, reduction);

  FirstBadTarget bad;
  const int64_t* t = indices.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "nll_loss_backward", [&] {
        using accum = at::opmath_type<scalar_t>;
        const auto class_weight = contiguous(weight);
        const scalar_t* w = const_data_or_null<scalar_t>(class_weight);
        const scalar_t* g = grad.const_data_ptr<scalar_t>();
        scalar_t* dx = grad_input.mutable_data_ptr<scalar_t>();
        const int64_t block = layout.classes * layout.inner;
        at::parallel_for(0, layout.outer, grain(block), [&](int64_t first, int64_t last) {
          std::memset(dx + first * block, 0, (last - first) * block * sizeof(scalar_t));
          for (int64_t i = first * layout.inner; i < last * layout.inner; ++i) {
            if (t[i] == ignore_index) continue;
            if (t[i] < 0 || t[i] >= layout.classes) {
              bad.update(i);
              continue;
            }
            const accum class_w = w ? accum(w[t[i]]) : accum(1);
            dx[element(i, t[i])] = -class_w * (accum(g[per_row ? i : 0]) * accum(scale));
          }
        });
      });
  bad.raise_if_any(t, layout.classes, ignore_index);
  return grad_input;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("nll_loss_forward", nll_loss_forward_cpu);
  m.impl("nll_loss_backward", nll_loss_backward_cpu);
}

}  // namespace fastnn::cpu
