// nll_loss on CUDA devices: one element of each row is read, so that any strides will do.
#include "ops/nll_loss.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/nll_loss_kernels.cuh"
#include "cuda/rows/run.cuh"
#include "cuda/run_loss.cuh"

namespace fastnn::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor> nll_loss_forward_cuda(const at::Tensor& input,
                                                         const at::Tensor& target,
                                                         const LossOptions& options) {
  check_nll_loss(input, target, options);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor rows = with_one_inner_stride(input);
  const at::Tensor indices = contiguous_indices(target);
  const auto class_weight = contiguous(options.weight);
  const bool per_row = options.per_row();
  const at::Tensor loss = at::empty(per_row ? per_row_sizes(input) : at::DimVector{},
                                    input.options().dtype(options.dtype_of_loss(input)));
  const at::Tensor total_weight = at::empty({}, input.options().dtype(accumulate_dtype(input)));

  const int64_t blocks =
      clamp(ceil_div<int64_t>(indices.numel(), kNLLThreads * kNLLUnroll), 0, kMaxSummingBlocks);
  const BlockSums sums(blocks, input.options());
  dispatch_widened(input.scalar_type(), loss.scalar_type(), "nll_loss", [&]<typename T>() {
    const NLLLossArgs<T> args{.log_probs = const_data<T>(rows),
                              .strides = row_strides(rows),
                              .target = const_data<int64_t>(indices),
                              .rows = indices.numel(),
                              .classes = input.size(class_dim(input)),
                              .ignore_index = options.ignore_index,
                              .weight = const_data_or_null<Wide<T>>(class_weight),
                              .losses = per_row ? data<Wide<T>>(loss) : nullptr,
                              .result = {.loss = per_row ? nullptr : data<Wide<T>>(loss),
                                         .total_weight = data<accum<T>>(total_weight),
                                         .mean = options.is_mean()}};
    if (blocks > 0) {
      FASTNN_LAUNCH((nll_loss_kernel<T>), static_cast<unsigned>(blocks), kNLLThreads, 0,
                    c10::cuda::getCurrentCUDAStream(), args, sums.data());
    }
    run_finish_loss(sums, /*empty=*/false, args.result);
  });
  return {loss, total_weight};
}

at::Tensor nll_loss_backward_cuda(const at::Tensor& grad_output, const at::Tensor& input,
                                  const at::Tensor& target, const at::Tensor& total_weight,
                                  const LossOptions& options) {
  check_nll_loss_backward(grad_output, input, target, total_weight, options);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor grad_input = at::empty(input.sizes(), input.options());
  const at::Tensor indices = contiguous_indices(target);
  const at::Tensor grad = grad_output.contiguous();
  const auto class_weight = contiguous(options.weight);

  const Layout layout = layout_around(input.sizes(), class_dim(input));
  const auto name = "nll_loss_backward";
  dispatch_widened(input.scalar_type(), grad.scalar_type(), name, [&]<typename T>() {
    using Op = NLLLossBackwardRows<T>;
    const Op op{
        .target = const_data<int64_t>(indices),
        .classes = layout.classes,
        .ignore_index = options.ignore_index,
        .weight = const_data_or_null<Wide<T>>(class_weight),
        .grad = {.grad = const_data<Wide<T>>(grad),
                 .per_row = options.per_row(),
                 .total_weight = options.is_mean() ? const_data<accum<T>>(total_weight) : nullptr}};
    run_rows(op, plan_of<Op>(layout), layout, {{nullptr, nullptr}, data<T>(grad_input)},
             input.options());
  });
  return grad_input;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, FASTNN_CUDA_KEY, m) {
  m.impl("nll_loss_forward", as_nll_loss_forward<nll_loss_forward_cuda>);
  m.impl("nll_loss_backward", as_nll_loss_backward<nll_loss_backward_cuda>);
}

}  // namespace fastnn::cuda
