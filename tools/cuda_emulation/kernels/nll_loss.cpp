#include "cuda/nll_loss_kernels.cuh"

#include "rows.h"

namespace fastnn::cuda::tests {
namespace {

constexpr int64_t kIgnored = 1;  // the ignore_index, a class that may occur

template <typename T>
struct Problem {
  Layout layout;
  Buffer<int64_t> target;
  Buffer<T> weight;
  bool weighted;

  Problem(const Layout& layout, bool weighted)
      : layout(layout),
        target(layout.rows()),
        weight(random_buffer<T>(layout.classes, 1, 0.25, 2)),
        weighted(weighted) {
    for (int64_t row = 0; row < layout.rows(); ++row) {
      target[row] = layout.classes == 0 ? kIgnored : random_index(layout.classes);
    }
  }
  double row_weight(int64_t row) const {
    const int64_t t = target.data()[row];
    return t == kIgnored ? 0 : weighted ? weight(t) : 1;
  }
};

// The log-probabilities may be a slice, whose outer dimension isn't dense.
template <typename T>
void nll_loss(const Problem<T>& problem, int64_t blocks, bool mean) {
  const Layout& layout = problem.layout;
  const int64_t outer_stride = layout.classes * layout.inner + 3;
  const auto log_probs = random_buffer<T>(layout.outer * outer_stride, 1, -8, 0);
  const RowStrides strides{layout.inner, outer_stride, layout.inner, 1};
  Buffer<T> losses(layout.rows()), loss(1);
  Buffer<accum<T>> total_weight(1);
  const NLLLossArgs<T> args{.log_probs = log_probs.data(),
                            .strides = strides,
                            .target = problem.target.data(),
                            .rows = layout.rows(),
                            .classes = layout.classes,
                            .ignore_index = kIgnored,
                            .weight = problem.weighted ? problem.weight.data() : nullptr,
                            .losses = losses.data(),
                            .result = {loss.data(), total_weight.data(), mean}};
  std::vector<LossSums> sums(blocks);
  FASTNN_LAUNCH((nll_loss_kernel<T>), blocks, kNLLThreads, 0, nullptr, args, sums.data());
  if (blocks > 1) {
    FASTNN_LAUNCH((finish_loss_kernel<T>), 1, kFinishThreads, 0, nullptr, sums.data(), blocks,
                  args.result);
  }
  expect_same_in_every_order(losses);
  expect_same_in_every_order(loss);
  expect_same_in_every_order(total_weight);
  double sum = 0, magnitude = 0, weight = 0;
  for (int64_t row = 0; row < layout.rows(); ++row) {
    const int64_t t = problem.target.data()[row];
    const int64_t o = row / layout.inner, i = row % layout.inner;
    const double expected =
        problem.row_weight(row) == 0
            ? 0
            : -problem.row_weight(row) * log_probs(o * outer_stride + t * layout.inner + i);
    expect_close<T>("losses", row, losses(row), expected, 2, std::abs(expected));
    sum += expected;
    magnitude += std::abs(expected);
    weight += problem.row_weight(row);
  }
  expect_sum<accum<T>>("total_weight", total_weight[0], weight, layout.rows(), weight);
  const double divisor = mean ? weight : 1;
  expect_close<T>("loss", 0, loss(0), weight == 0 && mean ? NAN : sum / divisor,
                  static_cast<double>(layout.rows()), magnitude / divisor);
}

template <typename T>
void nll_loss_backward(const Problem<T>& problem, const Way& way, const Offsets& offsets,
                       bool per_row) {
  const Layout& layout = problem.layout;
  const auto grad = random_buffer<T>(per_row ? layout.rows() : 1, offsets.first);
  const accum<T> total_weight = 3;
  using Op = NLLLossBackwardRows<T>;
  const Op op{.target = problem.target.data(),
              .classes = layout.classes,
              .ignore_index = kIgnored,
              .weight = problem.weighted ? problem.weight.data() : nullptr,
              .grad = {grad.data(), per_row, per_row ? nullptr : &total_weight}};
  const Plan plan = plan_of<Op>(layout, way);
  Buffer<T> grad_input(elements(layout), offsets.output);
  run_rows(op, plan, layout, {{nullptr, nullptr}, grad_input.data()});
  expect_same_in_every_order(grad_input);
  for (int64_t row = 0; row < layout.rows(); ++row) {
    const double g = per_row ? grad(row) : grad(0) / 3;
    for (int64_t c = 0; c < layout.classes; ++c) {
      const int64_t i = element(layout, row, c);
      const double expected = c == problem.target.data()[row] ? -g * problem.row_weight(row) : 0.0;
      expect_close<T>("grad_input", i, grad_input(i), expected, 4, std::abs(expected));
    }
  }
}

const Test forward("nll_loss", [] {
  for_each_dtype([&]<typename T>() {
    for (const Layout& layout :
         {Layout{1, 1, 1}, {67, 5, 1}, {2, 0, 1}, {2500, 3, 1}, {3, 4, 700}, {40, 1, 1}}) {
      for (const bool weighted : {false, true}) {
        const Problem<T> problem(layout, weighted);
        for (const int64_t blocks : {1, 3}) {
          describe("%s %s weighted=%d blocks=%d", kName<T>, to_string(layout).c_str(), weighted,
                   int(blocks));
          nll_loss(problem, blocks, /*mean=*/!weighted);
        }
      }
    }
  });
});

const Test backward("nll_loss_backward", [] {
  for_each_dtype([&]<typename T>() {
    for (const Layout& layout : layouts()) {
      for (const bool weighted : {false, true}) {
        const Problem<T> problem(layout, weighted);
        for (const Way& way : ways(layout)) {
          const Offsets at = one_of(offsets<T>());
          describe("%s %s %s weighted=%d offsets %d, %d", kName<T>, to_string(layout).c_str(),
                   way.name, weighted, int(at.first), int(at.output));
          nll_loss_backward(problem, way, at, /*per_row=*/weighted);
        }
      }
    }
  });
});

const Test nothing("a loss of no rows", [] {
  Buffer<float> loss(1), total_weight(1);
  const LossResult<float> result{loss.data(), total_weight.data(), /*mean=*/true};
  FASTNN_LAUNCH((finish_loss_kernel<float>), 1, kFinishThreads, 0, nullptr, nullptr, 0, result);
  expect(std::isnan(loss(0)) && total_weight(0) == 0, "the mean of nothing is NaN");
});

}  // namespace
}  // namespace fastnn::cuda::tests
