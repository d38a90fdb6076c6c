#include "cuda/cross_entropy_kernels.cuh"

#include "rows.h"

namespace fastnn::cuda::tests {
namespace {

constexpr int64_t kIgnored = 1;  // as the ignore_index: a class that may occur

struct Options {
  bool probabilities = false;
  bool weighted = false;
  double label_smoothing = 0;
  bool masked = false;
  bool per_row = false;
};

template <typename T>
struct Problem : TargetDistribution<Problem<T>> {
  using A = accum<T>;
  Layout layout;
  Options options;
  Buffer<T> logits;
  Buffer<int64_t> target;
  Buffer<T> target_probs;
  Buffer<T> weight;

  Problem(const Layout& layout, const Options& options, const Offsets& offsets)
      : layout(layout),
        options(options),
        logits(random_buffer<T>(elements(layout), offsets.first, -20, 20)),
        target(layout.rows()),
        target_probs(random_buffer<T>(elements(layout), offsets.second, 0, 1)),
        weight(random_buffer<T>(layout.classes, 1, 0.25, 2)) {
    if (options.masked) mask_some(logits, layout);
    for (int64_t row = 0; row < layout.rows(); ++row) {
      target[row] = layout.classes == 0 ? kIgnored : random_index(layout.classes);
    }
  }

  CrossEntropy<T> arguments() const {
    const double s = options.label_smoothing;
    return {logits.data(),
            layout.classes,
            layout.inner,
            options.probabilities ? nullptr : target.data(),
            options.probabilities ? target_probs.data() : nullptr,
            options.weighted ? weight.data() : nullptr,
            kIgnored,
            A(1 - s),
            A(s / std::max<double>(layout.classes, 1))};
  }
  bool counts(int64_t row) const {
    return options.probabilities || target[row] != kIgnored;
  }
};

template <typename T>
struct Forward {
  Buffer<accum<T>> max;
  Buffer<accum<T>> log_sum;
  Buffer<T> losses;
  Buffer<T> loss;
  Buffer<accum<T>> total_weight;
};

template <typename T, TargetKind Kind>
Forward<T> forward(const Problem<T>& problem, const Way& way) {
  const Layout& layout = problem.layout;
  const int64_t rows = layout.rows();
  using Op = CrossEntropyForward<T, Kind>;
  const Plan plan = plan_of<Op>(layout, way);
  Forward<T> out{Buffer<accum<T>>(rows), Buffer<accum<T>>(rows), Buffer<T>(rows), Buffer<T>(1),
                 Buffer<accum<T>>(1)};
  const Op op{problem.arguments(), out.max.data(), out.log_sum.data(), out.losses.data()};
  std::vector<LossSums> sums(plan.last_blocks);
  run_rows(op, plan, layout, {{problem.logits.data(), problem.target_probs.data()}, nullptr},
           sums.data());
  // Of no rows nothing is launched, and no sums are left.
  FASTNN_LAUNCH((finish_loss<T>), 1, kFinishThreads, 0, nullptr, sums.data(),
                rows == 0 ? 0 : plan.last_blocks, /*mean=*/problem.options.weighted,
                out.loss.data(), out.total_weight.data());
  expect_same_in_every_order(out.log_sum);
  expect_same_in_every_order(out.losses);
  expect_same_in_every_order(out.loss);
  expect_same_in_every_order(out.total_weight);
  return out;
}

template <typename T>
void check_forward(const Problem<T>& problem, const Forward<T>& out) {
  const Layout& layout = problem.layout;
  const double roundings = roundings_of_row(layout);
  double sum = 0, sum_magnitude = 0, weight = 0;
  for (int64_t row = 0; row < layout.rows(); ++row) {
    const LogSumExp lse = log_sum_exp(problem.logits, layout, row);
    double loss = 0, magnitude = 0, farthest = 1;
    for (int64_t c = 0; c < layout.classes; ++c) {
      if (problem.q(row, c) == 0) continue;
      const double x = problem.logits(element(layout, row, c));
      loss -= problem.q(row, c) * lse.log_softmax(x);
      magnitude += problem.q(row, c) * lse.scale(x);
    }
    if (layout.classes != 0) {
      expect_close<accum<T>>("max", row, out.max(row), lse.max, 0, 0);
      expect_close<accum<T>>("log_sum", row, out.log_sum(row), lse.log_sum, roundings, farthest);
    }
    expect_close<T>("losses", row, out.losses(row), loss, roundings, magnitude);
    sum += loss;
    sum_magnitude += magnitude;
    weight += problem.row_weight(row);
  }
  const bool mean = problem.options.weighted;
  const double divisor = mean ? weight : 1;
  expect_sum<accum<T>>("total_weight", out.total_weight[0], weight, layout.rows(), weight);
  expect_close<T>("loss", 0, out.loss(0), mean && weight == 0 ? NAN : sum / divisor,
                  roundings + static_cast<double>(layout.rows()), sum_magnitude / divisor);
}

template <typename T, TargetKind Kind>
void check_backward(const Problem<T>& problem, const Way& way, const Offsets& offsets,
                    const Forward<T>& saved) {
  using A = accum<T>;
  const Layout& layout = problem.layout;
  const Options& options = problem.options;
  const bool per_row = options.per_row;
  auto grad = random_buffer<T>(per_row ? layout.rows() : 1, 1);
  for (int64_t row = 0; per_row && row < layout.rows(); ++row) {
    if (!problem.counts(row)) grad[row] = static_cast<T>(NAN);  // leaves no trace
  }
  Buffer<A> total_weight(1), weighted_uniform_sum(1);
  total_weight[0] = 3;
  FASTNN_LAUNCH((sum_class_weights<T>), 1, 64, 0, nullptr, problem.weight.data(), layout.classes,
                options.label_smoothing / std::max<double>(layout.classes, 1),
                weighted_uniform_sum.data());
  using Op = CrossEntropyBackward<T, Kind>;
  const Op op{
      problem.arguments(),        saved.max.data(),
      saved.log_sum.data(),       {grad.data(), per_row, per_row ? nullptr : total_weight.data()},
      A(options.label_smoothing), options.weighted ? weighted_uniform_sum.data() : nullptr};
  Tensors<T> tensors{{problem.logits.data(), nullptr}, nullptr};
  if (options.probabilities) tensors = {{problem.target_probs.data(), tensors.in[0]}, nullptr};
  const Plan plan = plan_of<Op>(layout, way);
  Buffer<T> grad_input(elements(layout), offsets.output);
  tensors.out = grad_input.data();
  run_rows(op, plan, layout, tensors);
  expect_same_in_every_order(grad_input);
  for (int64_t row = 0; row < layout.rows(); ++row) {
    const double g = per_row ? grad(row) : grad(0) / 3;
    const LogSumExp lse = log_sum_exp(problem.logits, layout, row);
    double q_sum = 0;
    for (int64_t c = 0; c < layout.classes; ++c) q_sum += problem.q(row, c);
    for (int64_t c = 0; c < layout.classes; ++c) {
      const int64_t i = element(layout, row, c);
      if (!problem.counts(row)) {
        expect(grad_input(i) == 0, "an ignored row's gradient is zero");
        continue;
      }
      const double x = problem.logits(i), q = problem.q(row, c);
      const double softmax = std::exp(lse.log_softmax(x));
      expect_close<T>("grad_input", i, grad_input(i), g * (softmax * q_sum - q),
                      roundings_of_row(layout), std::abs(g) * (softmax * q_sum * lse.scale(x) + q));
    }
  }
}

template <typename T, TargetKind Kind>
void cross_entropy(const Layout& layout, const Way& way, const Offsets& offsets,
                   const Options& options) {
  const Problem<T> problem(layout, options, offsets);
  const auto saved = forward<T, Kind>(problem, way);
  check_forward(problem, saved);
  check_backward<T, Kind>(problem, way, offsets, saved);
}

const Options kOptions[] = {
    {.masked = true, .per_row = true},
    {.weighted = true},
    {.label_smoothing = 0.1, .per_row = true},
    {.weighted = true, .label_smoothing = 0.1},
    {.probabilities = true, .per_row = true},
    {.probabilities = true, .weighted = true, .label_smoothing = 0.1},
};

// In an order that isn't in step with anything else's.
constexpr size_t kChoices[] = {0, 1, 2, 3, 4, 5, 2};

template <typename T>
void cross_entropy_of_kind(const Layout& layout, const Way& way, const Offsets& at,
                           const Options& options) {
  if (options.probabilities) {
    cross_entropy<T, TargetKind::Probabilities>(layout, way, at, options);
  } else if (options.label_smoothing != 0) {
    cross_entropy<T, TargetKind::SmoothedIndex>(layout, way, at, options);
  } else {
    cross_entropy<T, TargetKind::Index>(layout, way, at, options);
  }
}

const Test test("cross_entropy", [] {
  for_each_dtype([&]<typename T>() {
    for (const Layout& layout : layouts()) {
      for (const Way& way : ways(layout)) {
        for (int repeat = 0; repeat < 2; ++repeat) {
          const Offsets at = one_of(offsets<T>());
          const size_t choice = one_of(kChoices);
          describe("%s %s %s options=%d offsets %d, %d, %d", kName<T>, to_string(layout).c_str(),
                   way.name, int(choice), int(at.first), int(at.second), int(at.output));
          cross_entropy_of_kind<T>(layout, way, at, kOptions[choice]);
        }
      }
    }
  });
});

// What stands out of range ends the launch.
const Test bad("cross_entropy: target out of range", [] {
  using Op = CrossEntropyForward<float, TargetKind::Index>;
  for (const int64_t wrong : {int64_t{5}, int64_t{-1}, INT64_MAX, INT64_MIN}) {
    const Layout layout{3, 5, 1};
    describe("target %lld", static_cast<long long>(wrong));
    Problem<float> problem(layout, {}, {0, 0, 0});
    problem.target[2] = wrong;
    Buffer<float> lse(6);
    LossSums sums[3];
    bool ended = false;
    try {
      run_rows(Op{problem.arguments(), lse.data(), lse.data() + 3, nullptr},
               plan_of<Op>(layout, {"subwarp"}), layout,
               {{problem.logits.data(), nullptr}, nullptr}, sums);
    } catch (const fastnn::cuda_emulation::Fault& fault) {
      ended = std::strstr(fault.what(), "Target is out of bounds") != nullptr;
    }
    expect(ended, "a target out of range ends the launch");
  }
});

}  // namespace
}  // namespace fastnn::cuda::tests
