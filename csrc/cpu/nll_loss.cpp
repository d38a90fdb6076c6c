// nll_loss on the CPU: one element of each row is read, so that any strides will do.
#include "ops/nll_loss.h"

#include <torch/library.h>

#include "cpu/loss.h"
#include "cpu/nll_loss_kernels.h"

namespace fastnn::cpu {
namespace {

std::tuple<at::Tensor, at::Tensor> nll_loss_forward_cpu(const at::Tensor& input,
                                                        const at::Tensor& target,
                                                        const LossOptions& options) {
  check_nll_loss(input, target, options);
  const at::Tensor rows = with_one_inner_stride(input);
  const at::Tensor indices = contiguous_indices(target);
  const int64_t classes = input.size(class_dim(input));
  const at::Tensor losses = options.per_row()
                                ? empty_result(per_row_sizes(input), accumulate_dtype(input))
                                : at::Tensor();

  simd::LossSums sums;
  FirstBadTarget bad;
  const int64_t* t = const_data<int64_t>(indices);
  const auto class_weight = class_weight_of(options);
  dispatch_scalars(input.scalar_type(), "nll_loss", [&]<typename T>() {
    const NLLRows<T> args{.log_probs = const_data<T>(rows),
                          .strides = row_strides(rows),
                          .target = t,
                          .classes = classes,
                          .ignore_index = options.ignore_index,
                          .weight = const_data_or_null<simd::accum<T>>(class_weight),
                          .losses = options.per_row() ? data<simd::accum<T>>(losses) : nullptr};
    sums = sum_over_rows(indices.numel(), 1, [&](int64_t begin, int64_t end, auto& sum) {
      bad.update(sum_nll_rows(args, begin, end, sum));
    });
  });
  bad.raise_if_any(t, classes, options.ignore_index);
  const at::ScalarType dtype = options.dtype_of_loss(input);
  return {options.per_row() ? losses.to(dtype) : reduced_loss(sums, options, dtype),
          scalar_tensor(sums.weight, accumulate_dtype(input))};
}

at::Tensor nll_loss_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                 const at::Tensor& target, const at::Tensor& total_weight,
                                 const LossOptions& options) {
  check_nll_loss_backward(grad_output, input, target, total_weight, options);
  const auto zeros = large_zeros(input.sizes(), input.scalar_type());
  const at::Tensor grad_input = zeros ? *zeros : empty_result(input.sizes(), input.scalar_type());
  const at::Tensor indices = contiguous_indices(target);
  const at::Tensor grad = in_accumulate_dtype(grad_output.contiguous());
  const auto class_weight = class_weight_of(options);
  const Layout layout = layout_around(input.sizes(), class_dim(input));

  FirstBadTarget bad;
  const int64_t* t = const_data<int64_t>(indices);
  dispatch_scalars(input.scalar_type(), "nll_loss_backward", [&]<typename T>() {
    const NLLGradient<T> args{.layout = layout,
                              .target = t,
                              .ignore_index = options.ignore_index,
                              .weight = const_data_or_null<simd::accum<T>>(class_weight),
                              .grad = const_data<simd::accum<T>>(grad),
                              .grad_per_row = options.per_row(),
                              .scale = row_grad_scale(total_weight, options),
                              .grad_input = data<T>(grad_input),
                              .is_zero = zeros.has_value()};
    const int64_t grain_of_blocks = grain(layout.classes * layout.inner);
    at::parallel_for(0, layout.outer, grain_of_blocks, [&](int64_t first, int64_t last) {
      bad.update(write_nll_gradient(args, first, last));
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
