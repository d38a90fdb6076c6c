// nll_loss on the CPU: one element of each row is read, so that any strides serve.
#include "ops/nll_loss.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <cstring>

#include "cpu/loss.h"

namespace fastnn::cpu {
namespace {

// The operands of the rows' losses; `weight` and `losses` may be null.
template <typename T>
struct Rows {
  const T* log_probs;
  RowStrides strides;
  const int64_t* target;
  int64_t classes;
  int64_t ignore_index;
  const T* weight;
  T* losses;
};

// Adds the rows [begin, end) to `sums`; returns the first whose target is out of range. By value
// all that the loop reads: the less it takes to a row, the more rows' cache misses overlap.
template <typename T>
int64_t sum_rows(const Rows<T> rows, int64_t begin, int64_t end, simd::LossSums& sums) {
  using accum = at::opmath_type<T>;
  simd::LossSums total;
  int64_t first_bad = simd::kNoBadTarget;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = rows.target[i];
    accum loss = 0;
    if (t >= 0 && t < rows.classes && t != rows.ignore_index) {
      const accum class_weight = rows.weight ? accum(rows.weight[t]) : accum(1);
      loss = -class_weight * accum(rows.log_probs[rows.strides.element(i, t)]);
      total.weight += class_weight;
    } else if (t != rows.ignore_index) {
      first_bad = std::min(first_bad, i);
    }
    if (rows.losses) rows.losses[i] = loss;
    total.loss += loss;
  }
  sums = total;
  return first_bad;
}

std::tuple<at::Tensor, at::Tensor> nll_loss_forward_cpu(const at::Tensor& input,
                                                        const at::Tensor& target,
                                                        const LossOptions& options) {
  check_nll_loss(input, target, options);
  const at::Tensor rows = with_one_inner_stride(input);
  const at::Tensor indices = contiguous_indices(target);
  const int64_t classes = input.size(class_dim(input));
  const at::Tensor losses =
      options.per_row() ? empty(per_row_sizes(input), input.scalar_type()) : at::Tensor();

  simd::LossSums sums;
  FirstBadTarget bad;
  const int64_t* t = indices.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "nll_loss", [&] {
    const auto class_weight = contiguous(options.weight);
    const Rows<scalar_t> operands{
        .log_probs = rows.const_data_ptr<scalar_t>(),
        .strides = row_strides(rows),
        .target = t,
        .classes = classes,
        .ignore_index = options.ignore_index,
        .weight = const_data_or_null<scalar_t>(class_weight),
        .losses = options.per_row() ? losses.mutable_data_ptr<scalar_t>() : nullptr};
    sums = sum_over_rows(indices.numel(), 1, [&](int64_t begin, int64_t end, auto& sum) {
      bad.update(sum_rows(operands, begin, end, sum));
    });
  });
  bad.raise_if_any(t, classes, options.ignore_index);
  return {options.per_row() ? losses : reduced_loss(sums, options, input),
          scalar_tensor(sums.weight, accumulate_dtype(input))};
}

at::Tensor nll_loss_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                 const at::Tensor& target, const at::Tensor& total_weight,
                                 const LossOptions& options) {
  check_nll_loss(input, target, options);
  check_loss_backward("nll_loss_backward", grad_output, input, total_weight, options);
  const auto zeros = large_zeros(input.sizes(), input.scalar_type());
  const at::Tensor grad_input = zeros ? *zeros : empty(input.sizes(), input.scalar_type());
  const at::Tensor indices = contiguous_indices(target);
  const at::Tensor grad = grad_output.contiguous();
  const simd::Layout layout = layout_around(input.sizes(), class_dim(input));
  const bool per_row = options.per_row();
  const double scale = row_grad_scale(total_weight, options);

  FirstBadTarget bad;
  const int64_t* t = indices.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "nll_loss_backward", [&] {
        using accum = at::opmath_type<scalar_t>;
        const auto class_weight = contiguous(options.weight);
        const scalar_t* w = const_data_or_null<scalar_t>(class_weight);
        const scalar_t* g = grad.const_data_ptr<scalar_t>();
        scalar_t* dx = grad_input.mutable_data_ptr<scalar_t>();
        const int64_t block = layout.classes * layout.inner;
        at::parallel_for(0, layout.outer, grain(block), [&](int64_t first, int64_t last) {
          const RowStrides strides = {layout.inner, block, layout.inner, 1};
          if (!zeros) {
            std::memset(dx + first * block, 0, (last - first) * block * sizeof(scalar_t));
          }
          for (int64_t i = first * layout.inner; i < last * layout.inner; ++i) {
            if (t[i] == options.ignore_index) continue;
            if (t[i] < 0 || t[i] >= layout.classes) {
              bad.update(i);
              continue;
            }
            const accum class_w = w ? accum(w[t[i]]) : accum(1);
            dx[strides.element(i, t[i])] = -class_w * (accum(g[per_row ? i : 0]) * accum(scale));
          }
        });
      });
  bad.raise_if_any(t, layout.classes, options.ignore_index);
  return grad_input;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("nll_loss_forward", as_nll_loss_forward<nll_loss_forward_cpu>);
  m.impl("nll_loss_backward", as_nll_loss_backward<nll_loss_backward_cpu>);
}

}  // namespace fastnn::cpu
