// nll_loss on the CPU: one element of each row is read, so that any strides serve.
#include "ops/nll_loss.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/loss.h"

namespace fastnn::cpu {
namespace {

// The input as (outer, classes, inner), a view where its strides allow one.
at::Tensor as_3d(const at::Tensor& input) {
  const simd::Layout layout = layout_around(input.sizes(), class_dim(input));
  return input.reshape({layout.outer, layout.classes, layout.inner});
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
  const at::Tensor rows = as_3d(input);
  const at::Tensor indices = contiguous_indices(target);
  const int64_t classes = rows.size(1);
  const bool per_row = reduction == at::Reduction::None;
  at::Tensor losses = per_row ? at::empty(per_row_sizes(input), input.options()) : at::Tensor();

  simd::LossSums sums;
  FirstBadTarget bad;
  const int64_t* t = indices.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "nll_loss", [&] {
    using accum = at::opmath_type<scalar_t>;
    const auto class_weight = contiguous(weight);
    const scalar_t* w = const_data_or_null<scalar_t>(class_weight);
    const auto x = rows.accessor<const scalar_t, 3>();
    scalar_t* out = per_row ? losses.mutable_data_ptr<scalar_t>() : nullptr;
    const int64_t inner = rows.size(2);
    sums = sum_over_rows(indices.numel(), 1, [&](int64_t begin, int64_t end, auto& sum) {
      for (int64_t i = begin; i < end; ++i) {
        accum loss = 0;
        if (t[i] != ignore_index) {
          if (t[i] < 0 || t[i] >= classes) {
            bad.update(i);
            continue;
          }
          const accum class_w = w ? accum(w[t[i]]) : accum(1);
          loss = -class_w * accum(x[i / inner][t[i]][i % inner]);
          sum.weight += class_w;
        }
        if (out) out[i] = loss;
        sum.loss += loss;
      }
    });
  });
  bad.raise_if_any(t, classes, ignore_index);
  return {per_row ? losses : reduced_loss(sums, reduction, input),
          scalar_tensor(sums.weight, input.options().dtype(accumulate_dtype(input)))};
}

at::Tensor nll_loss_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                 const at::Tensor& target, const std::optional<at::Tensor>& weight,
                                 const at::Tensor& total_weight, int64_t ignore_index,
                                 std::string_view reduction_name) {
  check_arguments(input, target, weight);
  const auto reduction = parse_reduction(reduction_name);
  check_loss_backward("nll_loss_backward", grad_output, input, total_weight, reduction);
  const at::Tensor grad_input = at::zeros(input.sizes(), input.options());
  const at::Tensor indices = contiguous_indices(target);
  const at::Tensor grad = grad_output.contiguous();
  const simd::Layout layout = layout_around(input.sizes(), class_dim(input));
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
        at::parallel_for(0, indices.numel(), kGrain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            if (t[i] == ignore_index) continue;
            if (t[i] < 0 || t[i] >= layout.classes) {
              bad.update(i);
              continue;
            }
            const accum class_w = w ? accum(w[t[i]]) : accum(1);
            const int64_t row = i / layout.inner;
            const int64_t element = (row * layout.classes + t[i]) * layout.inner + i % layout.inner;
            dx[element] = -class_w * (accum(g[per_row ? i : 0]) * accum(scale));
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
