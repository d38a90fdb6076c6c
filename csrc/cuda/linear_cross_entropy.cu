// linear_cross_entropy on CUDA devices: blocks of rows large enough for the library's products to
// fill the device, and cross_entropy's kernels over rows. Nothing waits for the device; hence the
// rows of ignored targets are multiplied too.
#include "ops/linear_cross_entropy.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "cuda/linear_cross_entropy_kernels.cuh"
#include "cuda/rows/run.cuh"
#include "cuda/run_loss.cuh"
#include "ops/linear_cross_entropy_blocks.h"

namespace fastnn::cuda {
namespace {

template <typename T>
CrossEntropyArgs<T> args_of(const LogitRows& block, const LinearLossOptions& options) {
  using A = accum<T>;
  const bool probabilities = block.target.dim() == 2;
  const int64_t classes = block.logits.size(1);
  return {.logits = const_data<T>(block.logits),
          .classes = classes,
          .inner = 1,
          .target = probabilities ? nullptr : const_data<int64_t>(block.target),
          .target_probs = probabilities ? const_data<T>(block.target) : nullptr,
          .weight = const_data_or_null<T>(options.weight),
          .ignore_index = options.ignore_index,
          .keep = static_cast<A>(1 - options.label_smoothing),
          .uniform = static_cast<A>(options.label_smoothing /
                                    static_cast<double>(std::max<int64_t>(classes, 1)))};
}

// Calls f.template operator()<Kind>() with the kind of the targets.
template <typename F>
void with_kind(const LogitRows& block, const LinearLossOptions& options, F f) {
  if (block.target.dim() == 2) return f.template operator()<TargetKind::Probabilities>();
  if (options.label_smoothing != 0) return f.template operator()<TargetKind::SmoothedIndex>();
  return f.template operator()<TargetKind::Index>();
}

// Launches an operator over the block's rows, whose operands are given.
template <typename Op>
void run(const Op& op, const LogitRows& block, std::array<const typename Op::T*, 2> in,
         const at::Tensor& out) {
  using T = typename Op::T;
  const Layout layout{block.logits.size(0), block.logits.size(1), 1};
  const Plan plan = plan_of<Op>(layout);
  const BlockSums sums(Op::kSums ? summing_blocks(plan) : 0, block.logits.options());
  run_rows(op, plan, layout, Tensors<T>{{in[0], in[1]}, out.defined() ? data<T>(out) : nullptr},
           block.logits.options(), Op::kSums ? sums.data() : nullptr);
}

struct Device {
  static at::ScalarType dtype(const at::Tensor& input) {
    return input.scalar_type();
  }

  // An estimate: the products have tiles enough for a device of 150 multiprocessors, and sums as
  // long as the rows.
  static int64_t rows(int64_t /*rows*/, int64_t classes) {
    constexpr int64_t kElements = 1 << 27, kUnit = 128;
    const int64_t fitting = kElements / std::max<int64_t>(classes, 1) / kUnit * kUnit;
    return std::max(fitting, kUnit);
  }

  static at::Tensor counting_rows(const at::Tensor& /*target*/, int64_t /*classes*/,
                                  int64_t /*ignore_index*/) {
    return {};
  }

  static at::Tensor total_weight(const at::Tensor& target, const LinearLossOptions& options,
                                 int64_t classes) {
    const at::Tensor ignored = target == options.ignore_index;
    const at::Tensor weights =
        options.weight && classes > 0
            ? options.weight->to(at::kDouble).index_select(0, target.masked_fill(ignored, 0))
            : at::ones(target.sizes(), target.options().dtype(at::kDouble));
    return weights.masked_fill(ignored, 0).sum();
  }

  static void product(at::Tensor out, const at::Tensor& a, const at::Tensor& b,
                      const std::optional<at::Tensor>& bias, bool add) {
    const auto dtype = out.scalar_type();
    if (a.scalar_type() == dtype) {
      add || bias ? at::addmm_out(out, add ? out : *bias, a, b) : at::mm_out(out, a, b);
    } else if (a.is_cuda()) {
      add ? at::addmm_out(out, out, a, b, dtype) : at::mm_out(out, a, b, dtype);
    } else {  // the tests' emulation, whose library has no product that is wider than its factors
      product(out, a.to(dtype), b.to(dtype), bias, add);
    }
  }

  static void add_column_sums(const at::Tensor& sums, const at::Tensor& block) {
    sums.add_(block.sum(0, /*keepdim=*/false, accumulate_dtype(block)));
  }

  static at::Tensor losses(const LogitRows& block, const LinearLossOptions& options) {
    const at::Tensor gradient = block.grad.defined() ? at::empty_like(block.logits) : at::Tensor();
    dispatch(block.logits.scalar_type(), "linear_cross_entropy", [&]<typename T>() {
      using A = accum<T>;
      with_kind(block, options, [&]<TargetKind Kind>() {
        const bool keeps = block.max.defined();
        const CrossEntropyForwardRows<T, Kind> forward{
            .args = args_of<T>(block, options),
            .losses = nullptr,
            .max = keeps ? data<A>(block.max) : nullptr,
            .log_sum = keeps ? data<A>(block.log_sum) : nullptr};
        const LogitResults<A> results{data<A>(block.losses), static_cast<A>(options.z_loss)};
        const std::array<const T*, 2> in{forward.args.logits, forward.args.target_probs};
        if (gradient.defined()) {
          const CrossEntropyGradientRows<T, Kind> rows{forward, A(1), nullptr};
          run(LogitGradientRows<T, Kind>{{rows, results}, const_data<A>(block.grad)}, block, in,
              gradient);
        } else {
          run(LogitLossRows<T, Kind>{forward, results}, block, in, gradient);
        }
      });
    });
    return gradient;
  }

  // The gradient takes the logits' place.
  static at::Tensor gradient(const LogitRows& block, const LinearLossOptions& options) {
    dispatch(block.logits.scalar_type(), "linear_cross_entropy_backward", [&]<typename T>() {
      with_kind(block, options, [&]<TargetKind Kind>() {
        using A = accum<T>;
        const CrossEntropyArgs<T> args = args_of<T>(block, options);
        at::Tensor uniform_sum;
        if (Kind == TargetKind::SmoothedIndex) uniform_sum = sum_of_uniform(block, options);
        const CrossEntropyBackwardRows<T, Kind> rows{
            .args = args,
            .max = const_data<A>(block.max),
            .log_sum = const_data<A>(block.log_sum),
            .grad = {.grad = nullptr, .per_row = true, .total_weight = nullptr},
            .uniform_sum = A(0),
            .weighted_uniform_sum = uniform_sum.defined() ? const_data<A>(uniform_sum) : nullptr};
        std::array<const T*, 2> in{args.logits, nullptr};
        if (Kind == TargetKind::Probabilities) in = {args.target_probs, args.logits};
        run(LogitBackwardRows<T, Kind>{rows, const_data<A>(block.grad),
                                       static_cast<A>(options.z_loss)},
            block, in, block.logits);
      });
    });
    return block.logits;
  }

  static at::Tensor sum(const at::Tensor& losses) {
    return losses.sum(at::kDouble);
  }

 private:
  // The sum over classes of label smoothing's part of q.
  static at::Tensor sum_of_uniform(const LogitRows& block, const LinearLossOptions& options) {
    const auto dtype = accumulate_dtype(block.logits);
    const double smoothing = options.label_smoothing;
    if (!options.weight) return at::full({}, smoothing, block.logits.options().dtype(dtype));
    const double uniform = smoothing / static_cast<double>(block.logits.size(1));
    return (options.weight->sum(at::kDouble) * uniform).to(dtype);
  }
};

// ATen's operators would be cast once more: whoever called us has settled the dtype.
using WithoutAutocast = c10::impl::ExcludeDispatchKeyGuard;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
linear_cross_entropy_forward_cuda(const LinearHead& head, const at::Tensor& target,
                                  const LinearLossOptions& options, HeadMask wanted) {
  check_linear_cross_entropy(head, target, options);
  const c10::cuda::CUDAGuard guard(head.input.device());
  const WithoutAutocast without_autocast(c10::autocast_dispatch_keyset);
  return LinearCrossEntropyBlocks<Device>(head, target, options, wanted).forward();
}

HeadGradients linear_cross_entropy_backward_cuda(const at::Tensor& grad_output,
                                                 const LinearHead& head, const at::Tensor& target,
                                                 const at::Tensor& lse,
                                                 const LinearLossOptions& options,
                                                 HeadMask wanted) {
  check_linear_cross_entropy_backward(grad_output, head, target, lse, options);
  const c10::cuda::CUDAGuard guard(head.input.device());
  const WithoutAutocast without_autocast(c10::autocast_dispatch_keyset);
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
