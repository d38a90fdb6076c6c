// linear_cross_entropy on CUDA devices: the library's products over blocks of rows, and
// cross_entropy's kernels over the rows. The CPU never waits for the device.
#include "ops/linear_cross_entropy.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>
#include <torch/version.h>

#include "autograd/transforms.h"
#include "cuda/linear_cross_entropy_kernels.cuh"
#include "cuda/rows/run.cuh"
#include "cuda/run_cross_entropy.cuh"
#include "ops/linear_cross_entropy_blocks.h"

namespace fastnn::cuda {
namespace {

// Calls f.template operator()<A>() with the type of the sums and of a block's logits.
template <typename F>
void dispatch_sums(at::ScalarType dtype, F f) {
  dtype == at::kDouble ? f.template operator()<double>() : f.template operator()<float>();
}

// Calls f.template operator()<A, Element>() with that type and the gradient's element type.
template <typename F>
void dispatch_gradient(at::ScalarType dtype, F f) {
  dispatch(dtype, "linear_cross_entropy", [&]<typename T>() {
    using A = accum<T>;
    f.template operator()<A, std::conditional_t<std::is_same_v<T, A>, T, Widened<T>>>();
  });
}

template <typename A, typename Element>
LogitArgs<A, Element> args_of(const CrossEntropyCall& call, const LinearLossOptions& options) {
  return {call.as<A>(), static_cast<A>(options.logit_scale), static_cast<A>(options.softcap),
          static_cast<A>(options.z_loss)};
}

template <typename Op>
void run(const Op& op, const CrossEntropyCall& call, const TensorsOf<Op>& tensors) {
  run_rows(op, plan_of<Op>(call.layout), call.layout, tensors, call.logits.options());
}

template <typename A, typename Element, TargetKind Kind>
CrossEntropyForwardRows<A, Kind, LogitArgs<A, Element>> forward_rows(
    const CrossEntropyCall& call, const LogitRows& block, const LinearLossOptions& options) {
  return {.args = args_of<A, Element>(call, options),
          .losses = data<A>(block.losses),
          .max = block.max.defined() ? data<A>(block.max) : nullptr,
          .sum = block.max.defined() ? data<A>(block.log_sum) : nullptr};
}

void run_losses(const CrossEntropyCall& call, const LogitRows& block,
                const LinearLossOptions& options) {
  dispatch_sums(block.logits.scalar_type(), [&]<typename A>() {
    with_kind(call, [&]<TargetKind Kind>() {
      const LogitLossRows<A, Kind> op{forward_rows<A, A, Kind>(call, block, options)};
      run(op, call, {{op.args.logits, op.args.target_probs}, nullptr});
    });
  });
}

void run_losses_and_gradient(const CrossEntropyCall& call, const LogitRows& block,
                             const LinearLossOptions& options, const at::Tensor& gradient) {
  dispatch_gradient(gradient.scalar_type(), [&]<typename A, typename T>() {
    with_kind(call, [&]<TargetKind Kind>() {
      const UniformSumMemory<A> uniform(call, block.logits.options());
      const LogitGradientRows<A, T, Kind> op{
          {forward_rows<A, T, Kind>(call, block, options), A(1), uniform.sum()},
          const_data<A>(block.grad)};
      run(op, call, {{op.args.logits, op.args.target_probs}, data<T>(gradient)});
    });
  });
}

void run_gradient(const CrossEntropyCall& call, const LogitRows& block,
                  const LinearLossOptions& options, const at::Tensor& gradient) {
  dispatch_gradient(gradient.scalar_type(), [&]<typename A, typename T>() {
    with_kind(call, [&]<TargetKind Kind>() {
      const UniformSumMemory<A> uniform(call, block.logits.options());
      const LogitBackwardRows<A, T, Kind> op{
          .args = args_of<A, T>(call, options),
          .max = const_data<A>(block.max),
          .sum = const_data<A>(block.log_sum),
          .grad = {.grad = const_data<A>(block.grad), .per_row = true, .total_weight = nullptr},
          .uniform_sum = uniform.sum()};
      run(op, call, backward_tensors(call, op.args.logits, data<T>(gradient)));
    });
  });
}

struct Device {
  static constexpr bool kAdjustsLogits = true, kLeavesOutIgnored = false;

  static at::ScalarType dtype(const at::Tensor& input) {
    return input.scalar_type();
  }

  // Enough for the products to fill the device, and for the weight's gradient, which each block
  // reads and writes, to cost little next to them: docs/performance.md, "Bounds of the CUDA
  // kernels".
  static int64_t rows(int64_t rows, int64_t classes, int64_t /*features*/) {
    constexpr int64_t kElements = 1 << 27, kFewest = 2048, kUnit = 128;
    const int64_t fitting = std::max(kElements / std::max<int64_t>(classes, 1), kFewest);
    const int64_t blocks = std::max<int64_t>(ceil_div(rows, fitting), rows > kFewest ? 2 : 1);
    return ceil_div(ceil_div(rows, blocks), kUnit) * kUnit;
  }

  // The kernel asserts that targets are in range.
  static at::Tensor total_weight(const at::Tensor& target, const LinearLossOptions& options,
                                 int64_t classes) {
    const at::Tensor total = at::empty({}, target.options().dtype(at::kDouble));
    std::optional<at::Tensor> weight;
    if (options.weight) weight = options.weight->to(at::kDouble);
    const CrossEntropyArgs<double> args{.logits = nullptr,
                                        .classes = classes,
                                        .inner = 1,
                                        .target = const_data<int64_t>(target),
                                        .target_probs = nullptr,
                                        .weight = const_data_or_null<double>(weight),
                                        .ignore_index = options.ignore_index,
                                        .keep = 1,
                                        .uniform = 0};
    run_target_weights(args, target.numel(), total);
    return total;
  }

  // Computes the product in float32 if the factors are narrower.
  static void product(at::Tensor out, const at::Tensor& a, const at::Tensor& b,
                      const std::optional<at::Tensor>& bias, bool add) {
    const bool wide = a.scalar_type() != out.scalar_type();
    if (!add && !bias) {
      wide ? at::mm_out(out, a, b, out.scalar_type()) : at::mm_out(out, a, b);
      return;
    }
    const at::Tensor& addend = add ? out : *bias;
    if (!wide) {
      at::addmm_out(out, addend, a, b);
      return;
    }
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11
    at::addmm_out(out, addend, a, b, out.scalar_type());
#else  // before 2.11 the addend must have the factors' dtype
    const at::Tensor product = at::mm(a, b, out.scalar_type());
    at::add_out(out, product, addend);
#endif
  }

  static void add_column_sums(const at::Tensor& sums, const at::Tensor& block) {
    sums.add_(block.sum(0, /*keepdim=*/false, accumulate_dtype(block)));
  }

  static at::Tensor losses(const LogitRows& block, const LinearLossOptions& options) {
    const CrossEntropyCall call(block.logits, block.target, options);
    if (!block.grad.defined()) {
      run_losses(call, block, options);
      return {};
    }
    // Not in place: a thread may read the target's logit after another thread has overwritten it.
    const at::Tensor gradient =
        at::empty(block.logits.sizes(), block.logits.options().dtype(block.gradient_dtype));
    run_losses_and_gradient(call, block, options, gradient);
    return gradient;
  }

  static at::Tensor gradient(const LogitRows& block, const LinearLossOptions& options) {
    const CrossEntropyCall call(block.logits, block.target, options);
    const at::Tensor gradient =
        block.gradient_dtype == block.logits.scalar_type()
            ? block.logits
            : at::empty(block.logits.sizes(), block.logits.options().dtype(block.gradient_dtype));
    run_gradient(call, block, options, gradient);
    return gradient;
  }

  static at::Tensor sum(const at::Tensor& losses) {
    return losses.sum(at::kDouble);
  }
};

// Keeps autocast from casting the operands of ATen's operators, whose dtype is already decided, and
// autograd from rejecting the out= variants.
struct PlainOperators {
  c10::impl::ExcludeDispatchKeyGuard without_autocast{c10::autocast_dispatch_keyset};
  BelowAutograd below_autograd;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
linear_cross_entropy_forward_cuda(const LinearHead& head, const at::Tensor& target,
                                  const LinearLossOptions& options, HeadMask wanted) {
  check_linear_cross_entropy(head, target, options);
  const c10::cuda::CUDAGuard guard(head.input.device());
  const PlainOperators plain_operators;
  return LinearCrossEntropyBlocks<Device>(head, target, options, wanted).forward();
}

HeadGradients linear_cross_entropy_backward_cuda(const at::Tensor& grad_output,
                                                 const LinearHead& head, const at::Tensor& target,
                                                 const at::Tensor& lse,
                                                 const LinearLossOptions& options,
                                                 HeadMask wanted) {
  check_linear_cross_entropy_backward(grad_output, head, target, lse, options);
  const c10::cuda::CUDAGuard guard(head.input.device());
  const PlainOperators plain_operators;
  return LinearCrossEntropyBlocks<Device>(head, target, options, wanted).backward(grad_output, lse);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, FASTNN_CUDA_KEY, m) {
  m.impl("linear_cross_entropy_forward",
         as_linear_cross_entropy_forward<linear_cross_entropy_forward_cuda>);
  m.impl("linear_cross_entropy_backward",
         as_linear_cross_entropy_backward<linear_cross_entropy_backward_cuda>);
}

}  // namespace fastnn::cuda
