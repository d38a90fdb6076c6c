// linear_cross_entropy on the CPU: blocks of logits in the accumulation dtype, which fit the
// last-level cache, and our products or the library's.
#include "ops/linear_cross_entropy.h"

#include <torch/library.h>

#include "cpu/gemm.h"
#include "cpu/loss.h"
#include "ops/linear_cross_entropy_blocks.h"

namespace fastnn::cpu {
namespace {

// Calls f.template operator()<A>() with the type of a block's logits.
template <typename F>
void dispatch_sums(const at::Tensor& logits, F f) {
  logits.scalar_type() == at::kDouble ? f.template operator()<double>()
                                      : f.template operator()<float>();
}

template <typename A>
simd::LogitBlock<A> kernel_block(const LogitRows& block, const LinearLossOptions& options) {
  const bool is_forward = block.losses.defined();
  // The backward only reads: copy-on-write memory stays shared.
  const auto results = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return static_cast<A*>(nullptr);
    return is_forward ? data<A>(tensor) : const_cast<A*>(const_data<A>(tensor));
  };
  const bool probabilities = block.target.dim() == 2;
  return {.args = {.layout = {block.logits.size(0), block.logits.size(1), 1},
                   .logits = const_data<A>(block.logits),
                   .target = probabilities ? nullptr : const_data<int64_t>(block.target),
                   .target_probs = probabilities ? const_data<A>(block.target) : nullptr,
                   .weight = const_data_or_null<A>(options.weight),
                   .ignore_index = options.ignore_index,
                   .label_smoothing = options.label_smoothing},
          .z_loss = options.z_loss,
          .losses = results(block.losses),
          .max = results(block.max),
          .log_sum = results(block.log_sum),
          .gradient = block.grad.defined() ? data<A>(block.logits) : nullptr,
          .grad = block.grad.defined() ? const_data<A>(block.grad) : nullptr,
          .grad_per_row = block.grad.defined() && block.grad.dim() == 1};
}

struct Device {
  static constexpr bool kAdjustsLogits = false, kLeavesOutIgnored = true;

  static at::ScalarType dtype(const at::Tensor& input) {
    return accumulate_dtype(input);
  }

  // Each block reads the weight twice and adds to its gradient: with as many rows as features, that
  // traffic is no more than the logits'. But blocks shouldn't be so small that starting threads
  // costs, nor much larger than a cache.
  static int64_t rows(int64_t rows, int64_t classes, int64_t features) {
    constexpr int64_t kFewest = 1 << 21, kMost = 1 << 23, kUnit = 64;
    const int64_t across = std::max<int64_t>(classes, 1);
    const int64_t wanted = std::clamp(features, kFewest / across, kMost / across);
    const int64_t half = ceil_div<int64_t>(rows, 2);
    return std::max(ceil_div(std::min(wanted, half), kUnit), int64_t{1}) * kUnit;
  }

  static at::Tensor counting_rows(const at::Tensor& target, int64_t classes, int64_t ignore_index) {
    const int64_t* targets = const_data<int64_t>(target);
    int64_t count = 0;
    for (int64_t i = 0; i < target.numel(); ++i) {
      if (targets[i] == ignore_index) continue;
      if (targets[i] < 0 || targets[i] >= classes) {
        raise_bad_target(targets[i], classes, ignore_index);
      }
      ++count;
    }
    if (count == target.numel()) return {};
    const at::Tensor rows = empty_result({count}, at::kLong);
    int64_t* to = data<int64_t>(rows);
    for (int64_t i = 0; i < target.numel(); ++i) {
      if (targets[i] != ignore_index) *to++ = i;
    }
    return rows;
  }

  // The weights are in the blocks' dtype.
  static at::Tensor total_weight(const at::Tensor& target, const LinearLossOptions& options,
                                 int64_t /*classes*/) {
    double total = double(target.numel());
    if (options.weight) {
      total = 0;
      dispatch_sums(*options.weight, [&]<typename A>() {
        const A* weights = const_data<A>(*options.weight);
        const int64_t* targets = const_data<int64_t>(target);
        for (int64_t i = 0; i < target.numel(); ++i) total += weights[targets[i]];
      });
    }
    return scalar_tensor(total, at::kDouble);
  }

  static void product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                      const std::optional<at::Tensor>& bias, bool add) {
    matmul_into(out, a, b, bias, add);
  }

  static void add_column_sums(const at::Tensor& sums, const at::Tensor& block) {
    const int64_t rows = block.size(0), cols = block.size(1);
    const int64_t strips = ceil_div(cols, simd::kColumnSums);
    dispatch_sums(block, [&]<typename A>() {
      at::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t col = i * simd::kColumnSums;
          kernels<A>().column_sums(data<double>(sums) + col, const_data<A>(block) + col, rows,
                                   std::min(simd::kColumnSums, cols - col), cols);
        }
      });
    });
  }

  static at::Tensor losses(const LogitRows& block, const LinearLossOptions& options) {
    return run(block, options, [](const auto& kernels) { return kernels.logit_block; });
  }
  static at::Tensor gradient(const LogitRows& block, const LinearLossOptions& options) {
    return run(block, options, [](const auto& kernels) { return kernels.logit_block_backward; });
  }

  static at::Tensor sum(const at::Tensor& losses) {
    double sum = 0;
    dispatch_sums(losses, [&]<typename A>() {
      const A* values = const_data<A>(losses);
      for (int64_t i = 0; i < losses.numel(); ++i) sum += values[i];
    });
    return scalar_tensor(sum, at::kDouble);
  }

 private:
  template <typename Kernel>
  static at::Tensor run(const LogitRows& block, const LinearLossOptions& options, Kernel kernel) {
    dispatch_sums(block.logits, [&]<typename A>() {
      const auto args = kernel_block<A>(block, options);
      const auto run_rows = kernel(kernels<A>());
      at::parallel_for(0, block.logits.size(0), grain(block.logits.size(1)),
                       [&](int64_t begin, int64_t end) { run_rows(args, begin, end); });
    });
    return block.logits;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
linear_cross_entropy_forward_cpu(const LinearHead& head, const at::Tensor& target,
                                 const LinearLossOptions& options, HeadMask wanted) {
  check_linear_cross_entropy(head, target, options);
  return LinearCrossEntropyBlocks<Device>(head, target, options, wanted).forward();
}

HeadGradients linear_cross_entropy_backward_cpu(const at::Tensor& grad_output,
                                                const LinearHead& head, const at::Tensor& target,
                                                const at::Tensor& lse,
                                                const LinearLossOptions& options, HeadMask wanted) {
  check_linear_cross_entropy_backward(grad_output, head, target, lse, options);
  return LinearCrossEntropyBlocks<Device>(head, target, options, wanted).backward(grad_output, lse);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("linear_cross_entropy_forward",
         as_linear_cross_entropy_forward<linear_cross_entropy_forward_cpu>);
  m.impl("linear_cross_entropy_backward",
         as_linear_cross_entropy_backward<linear_cross_entropy_backward_cpu>);
}

}  // namespace fastnn::cpu
