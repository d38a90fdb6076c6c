// A target out of range must end the kernel even if device asserts are compiled out: these kernels
// are compiled without them, in a namespace of their own.
#include <cuda_runtime.h>

#include <c10/cuda/CUDAException.h>

#include "cuda/rows/plan.h"
#include "cuda_emulation/expect.h"
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

constexpr int64_t kRows = 3, kClasses = 5;
constexpr Layout kLayout{kRows, kClasses, 1};

struct Problem {
  Buffer<float> logits = random_buffer<float>(kRows * kClasses);
  Buffer<float> weight = random_buffer<float>(kClasses, 0, 0.5, 2);
  Buffer<int64_t> target = Buffer<int64_t>(kRows);
  Buffer<float> max = random_buffer<float>(kRows);
  Buffer<float> sum = random_buffer<float>(kRows, 0, 1, 2);
  Buffer<float> losses = Buffer<float>(kRows);
  Buffer<float> grad = Buffer<float>(kRows * kClasses);
  Buffer<float> one = random_buffer<float>(1);
  Buffer<float> loss = Buffer<float>(1);
  Buffer<float> total = Buffer<float>(1);
  Buffer<without::LossSums> sums = Buffer<without::LossSums>(kRows);
  without::LossResult<float> result{loss.data(), total.data(), false};

  explicit Problem(int64_t out_of_range) {
    target[0] = 0;
    target[1] = out_of_range;
    target[2] = kClasses - 1;
  }
  template <typename Op>
  void run(const Op& op, float* out) {
    const auto plan = plan_rows(kLayout, without::row_traits<Op>());
    launch_rows(op, plan, kLayout, {{logits.data(), nullptr}, out}, nullptr, sums.data(), nullptr);
  }
};

void expect_trap(const std::function<void()>& launch) {
  cuda_emulation::tests::expect_fault(launch, {": trap", "block ("});
}

void cross_entropy(Problem& p) {
  const without::CrossEntropyArgs<float> args{.logits = p.logits.data(),
                                              .classes = kClasses,
                                              .inner = 1,
                                              .target = p.target.data(),
                                              .target_probs = nullptr,
                                              .weight = p.weight.data(),
                                              .ignore_index = -100,
                                              .keep = 1,
                                              .uniform = 0};
  const without::CrossEntropyForwardRows<float, TargetKind::Index> forward{
      .args = args,
      .losses = p.losses.data(),
      .max = p.max.data(),
      .sum = p.sum.data(),
      .result = p.result};
  expect_trap([&] { p.run(forward, nullptr); });
  expect_trap([&] {
    p.run(without::CrossEntropyGradientRows<float, TargetKind::Index>{forward, 1}, p.grad.data());
  });
  expect_trap([&] {
    FASTNN_LAUNCH((without::sum_target_weights_kernel<float>), 1, 64, 0, nullptr, args, kRows,
                  p.sums.data(), p.result);
  });
  expect_trap([&] {
    p.run(without::CrossEntropyBackwardRows<float, TargetKind::Index>{.args = args,
                                                                      .max = p.max.data(),
                                                                      .sum = p.sum.data(),
                                                                      .grad = {p.one.data(), false,
                                                                               nullptr},
                                                                      .uniform_sum = {}},
          p.grad.data());
  });
}

void nll_loss(Problem& p) {
  const without::NLLLossArgs<float> args{.log_probs = p.logits.data(),
                                         .strides = {1, kClasses, 1, 1},
                                         .target = p.target.data(),
                                         .rows = kRows,
                                         .classes = kClasses,
                                         .ignore_index = -100,
                                         .weight = p.weight.data(),
                                         .losses = p.losses.data(),
                                         .result = p.result};
  expect_trap([&] {
    FASTNN_LAUNCH((without::nll_loss_kernel<float>), 1, without::kNLLThreads, 0, nullptr, args,
                  nullptr);
  });
  expect_trap([&] {
    p.run(without::NLLLossBackwardRows<float>{.target = p.target.data(),
                                              .classes = kClasses,
                                              .ignore_index = -100,
                                              .weight = p.weight.data(),
                                              .grad = {p.one.data(), false, nullptr}},
          p.grad.data());
  });
}

const Test test("targets out of range without asserts", [] {
  for (const int64_t out_of_range : {kClasses, int64_t(-1), INT64_MAX, INT64_MIN}) {
    describe("target %lld", static_cast<long long>(out_of_range));
    Problem problem(out_of_range);
    cross_entropy(problem);
    nll_loss(problem);
  }
});

}  // namespace
}  // namespace fastnn::cuda::tests
