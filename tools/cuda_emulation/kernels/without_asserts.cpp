// A target out of range must read and write nothing, even if device asserts are compiled out: these
// kernels are compiled without them, in a namespace of their own.
#include <cuda_runtime.h>

#include <c10/cuda/CUDAException.h>

#include "cuda/rows/plan.h"
#include "harness.h"

#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) static_cast<void>(condition)
namespace fastnn::cuda_without_asserts {
using namespace fastnn::cuda;  // what harness.h has included
}
#define cuda cuda_without_asserts
#include "cuda/cross_entropy_kernels.cuh"
#include "cuda/nll_loss_kernels.cuh"
#include "cuda/rows/launch.cuh"
#undef cuda

namespace fastnn::cuda::tests {
namespace {

namespace without = cuda_without_asserts;
using without::TargetKind;

constexpr int64_t kRows = 6, kClasses = 5;

struct Problem {
  Layout layout;
  Buffer<float> logits = random_buffer<float>(kRows * kClasses);
  Buffer<float> weight = random_buffer<float>(kClasses, 0, 0.5, 2);
  Buffer<int64_t> target = Buffer<int64_t>(kRows);

  explicit Problem(const Layout& layout) : layout(layout) {
    const int64_t targets[kRows] = {0, kClasses, -1, INT64_MAX, INT64_MIN, 4};
    for (int64_t row = 0; row < kRows; ++row) target[row] = targets[row];
  }
  static bool counts(int64_t row) {
    return row == 0 || row == kRows - 1;
  }
  template <typename Op>
  void run(const Op& op, float* out, without::LossSums* sums) const {
    const auto plan = plan_rows(layout, without::row_traits<Op>());
    launch_rows(op, plan, layout, {{logits.data(), nullptr}, out}, nullptr, sums, nullptr);
  }
  void expect_zero_rows(const Buffer<float>& grad) const {
    for (int64_t row = 0; row < kRows; ++row) {
      bool zero = true;
      for (int64_t c = 0; c < kClasses; ++c) {
        const int64_t i = (row / layout.inner * kClasses + c) * layout.inner + row % layout.inner;
        expect(std::isfinite(grad(i)), "every element of a gradient is written");
        zero = zero && grad(i) == 0;
      }
      expect(zero != counts(row), "a row of a target out of range has no gradient, others do");
    }
  }
};

void cross_entropy(const Problem& problem) {
  Buffer<float> lse(2 * kRows), losses(kRows), grad(kRows * kClasses), one(1), loss(1), total(1);
  const without::LossResult<float> result{loss.data(), total.data(), false};
  std::vector<without::LossSums> sums(kRows);
  const without::CrossEntropyArgs<float> args{problem.logits.data(),
                                              kClasses,
                                              problem.layout.inner,
                                              problem.target.data(),
                                              nullptr,
                                              problem.weight.data(),
                                              -100,
                                              1,
                                              0};
  const without::CrossEntropyForwardRows<float, TargetKind::Index> forward{
      .args = args,
      .losses = losses.data(),
      .max = lse.data(),
      .sum = lse.data() + kRows,
      .result = result};
  problem.run(forward, nullptr, sums.data());
  for (int64_t row = 0; row < kRows; ++row) {
    expect((losses(row) > 0) == Problem::counts(row), "a loss of a target out of range is zero");
  }
  Buffer<float> kept(kRows * kClasses);
  problem.run(without::CrossEntropyGradientRows<float, TargetKind::Index>{forward, 1}, kept.data(),
              sums.data());
  problem.expect_zero_rows(kept);
  total[0] = 0;
  FASTNN_LAUNCH((without::sum_target_weights_kernel<float>), 1, 64, 0, nullptr, args, kRows,
                sums.data(), result);
  expect(total(0) == float(problem.weight(0) + problem.weight(4)),
         "a target out of range has no weight");
  one[0] = 1;
  problem.run(without::CrossEntropyBackwardRows<float, TargetKind::Index>{.args = args,
                                                                          .max = lse.data(),
                                                                          .sum = lse.data() + kRows,
                                                                          .grad = {one.data(),
                                                                                   false, nullptr},
                                                                          .uniform_sum = {}},
              grad.data(), nullptr);
  problem.expect_zero_rows(grad);
}

void nll_loss(const Problem& problem) {
  Buffer<float> losses(kRows), grad(kRows * kClasses), one(1), loss(1), total(1);
  const int64_t inner = problem.layout.inner;
  const without::NLLLossArgs<float> args{problem.logits.data(),
                                         {inner, kClasses * inner, inner, 1},
                                         problem.target.data(),
                                         kRows,
                                         kClasses,
                                         -100,
                                         problem.weight.data(),
                                         losses.data(),
                                         {loss.data(), total.data(), false}};
  FASTNN_LAUNCH((without::nll_loss_kernel<float>), 1, without::kNLLThreads, 0, nullptr, args,
                nullptr);
  for (int64_t row = 0; row < kRows; ++row) {
    expect((losses(row) != 0) == Problem::counts(row), "a loss of a target out of range is zero");
  }
  one[0] = 1;
  problem.run(without::NLLLossBackwardRows<float>{.target = problem.target.data(),
                                                  .classes = kClasses,
                                                  .ignore_index = -100,
                                                  .weight = problem.weight.data(),
                                                  .grad = {one.data(), false, nullptr}},
              grad.data(), nullptr);
  problem.expect_zero_rows(grad);
}

const Test test("targets out of range without asserts", [] {
  for (const Layout& layout : {Layout{kRows, kClasses, 1}, Layout{2, kClasses, 3}}) {
    describe("inner=%d", int(layout.inner));
    const Problem problem(layout);
    cross_entropy(problem);
    nll_loss(problem);
  }
});

}  // namespace
}  // namespace fastnn::cuda::tests
