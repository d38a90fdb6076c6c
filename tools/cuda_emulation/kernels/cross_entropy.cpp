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
  Buffer<Wide<T>> weight;

  Problem(const Layout& layout, const Options& options, const Offsets& offsets)
      : layout(layout),
        options(options),
        logits(random_buffer<T>(elements(layout), offsets.first, -20, 20)),
        target(layout.rows()),
        target_probs(random_buffer<T>(elements(layout), offsets.second, 0, 1)),
        weight(random_buffer<Wide<T>>(layout.classes, 1, 0.25, 2)) {
    if (options.masked) mask_some(logits, layout);
    for (int64_t row = 0; row < layout.rows(); ++row) {
      target[row] = layout.classes == 0 ? kIgnored : random_index(layout.classes);
    }
  }

  CrossEntropyArgs<T> arguments() const {
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
  Buffer<accum<T>> sum;
  Buffer<Wide<T>> losses;
  Buffer<Wide<T>> loss;
  Buffer<accum<T>> total_weight;
  Buffer<T> kept;
};

template <typename T>
Tensors<T> operands(const Problem<T>& problem, T* out) {
  return {{problem.logits.data(),
           problem.options.probabilities ? problem.target_probs.data() : nullptr},
          out};
}

// Runs the operator that `make` makes of the plain forward's.
template <typename T, TargetKind Kind, typename Make>
Forward<T> forward(const Problem<T>& problem, const Way& way, const Offsets& offsets, bool lse,
                   Make make) {
  const Layout& layout = problem.layout;
  const int64_t rows = layout.rows();
  Forward<T> out{Buffer<accum<T>>(rows), Buffer<accum<T>>(rows),
                 Buffer<Wide<T>>(rows),  Buffer<Wide<T>>(1),
                 Buffer<accum<T>>(1),    Buffer<T>(elements(layout), offsets.output)};
  const bool mean = problem.options.weighted;
  const LossResult<T> result{out.loss.data(), out.total_weight.data(), mean};
  const auto op = make(CrossEntropyForwardRows<T, Kind>{.args = problem.arguments(),
                                                        .losses = out.losses.data(),
                                                        .max = lse ? out.max.data() : nullptr,
                                                        .sum = out.sum.data(),
                                                        .result = result});
  using Op = std::remove_const_t<decltype(op)>;
  const Plan plan = plan_of<Op>(layout, way);
  std::vector<LossSums> sums(summing_blocks(plan));
  constexpr bool kKeeps = Op::kMaps || Op::kCopies;
  run_rows(op, plan, layout, operands(problem, kKeeps ? out.kept.data() : nullptr), sums.data());
  // Without rows nothing is launched, and no sums are left.
  if (rows == 0 || summing_blocks(plan) > 1) {
    FASTNN_LAUNCH((finish_loss_kernel<T>), 1, kFinishThreads, 0, nullptr, sums.data(),
                  rows == 0 ? 0 : summing_blocks(plan), result);
  }
  if (lse) expect_same_in_every_order(out.sum);
  if (kKeeps) expect_same_in_every_order(out.kept);
  expect_same_in_every_order(out.losses);
  expect_same_in_every_order(out.loss);
  expect_same_in_every_order(out.total_weight);
  return out;
}

template <typename T>
void check_forward(const Problem<T>& problem, const Forward<T>& out, bool lse) {
  const Layout& layout = problem.layout;
  const double roundings = roundings_of_row(layout);
  double sum = 0, sum_magnitude = 0, weight = 0;
  for (int64_t row = 0; row < layout.rows(); ++row) {
    const LogSumExp exact = log_sum_exp(problem.logits, layout, row);
    double loss = 0, magnitude = 0, farthest = 1;
    for (int64_t c = 0; c < layout.classes; ++c) {
      if (problem.q(row, c) == 0) continue;
      const double x = problem.logits(element(layout, row, c));
      loss -= problem.q(row, c) * exact.log_softmax(x);
      magnitude += problem.q(row, c) * exact.scale(x);
    }
    if (lse && layout.classes != 0) {
      expect_close<accum<T>>("max", row, out.max(row), exact.max, 0, 0);
      const double exp_sum = std::exp(exact.log_sum);
      expect_close<accum<T>>("sum", row, out.sum(row), exp_sum, roundings, exp_sum * farthest);
    }
    expect_close<Wide<T>>("losses", row, out.losses(row), loss, roundings, magnitude);
    sum += loss;
    sum_magnitude += magnitude;
    weight += problem.row_weight(row);
  }
  const bool mean = problem.options.weighted;
  const double divisor = mean ? weight : 1;
  expect_sum<accum<T>>("total_weight", out.total_weight[0], weight, layout.rows(), weight);
  expect_close<Wide<T>>("loss", 0, out.loss(0), mean && weight == 0 ? NAN : sum / divisor,
                        roundings + static_cast<double>(layout.rows()), sum_magnitude / divisor);
}

// That the gradient is grad(row) * (sum(q) * softmax - q), and zero in the rows ignored.
template <typename T, typename Grad>
void check_gradient(const Problem<T>& problem, const Buffer<T>& grad_input, Grad grad) {
  const Layout& layout = problem.layout;
  for (int64_t row = 0; row < layout.rows(); ++row) {
    const double g = grad(row);
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
      expect_close<T>("grad_input", i, static_cast<T>(grad_input(i)), g * (softmax * q_sum - q),
                      roundings_of_row(layout), std::abs(g) * (softmax * q_sum * lse.scale(x) + q));
    }
  }
}

template <typename T>
Buffer<Wide<T>> incoming_grad(const Problem<T>& problem) {
  const int64_t rows = problem.layout.rows();
  const bool per_row = problem.options.per_row;
  auto grad = random_buffer<Wide<T>>(per_row ? rows : 1, 1);
  for (int64_t row = 0; per_row && row < rows; ++row) {
    if (!problem.counts(row)) grad[row] = static_cast<Wide<T>>(NAN);  // leaves no trace
  }
  return grad;
}

template <typename T>
struct UniformSumOf {
  accum<T> unweighted;
  Buffer<accum<T>> weighted{1};
  bool is_weighted;

  explicit UniformSumOf(const Problem<T>& problem)
      : unweighted(accum<T>(problem.options.label_smoothing)),
        is_weighted(problem.options.weighted) {
    const int64_t classes = problem.layout.classes;
    FASTNN_LAUNCH((sum_class_weights_kernel<T>), 1, 64, 0, nullptr, problem.weight.data(), classes,
                  problem.options.label_smoothing / std::max<double>(classes, 1), weighted.data());
  }
  UniformSum<accum<T>> sum() const {
    return {unweighted, is_weighted ? weighted.data() : nullptr};
  }
};

// Runs over a copy of the logits, which the kernel overwrites or leaves alone.
template <typename T, TargetKind Kind>
void check_backward(const Problem<T>& problem, const Way& way, const Offsets& offsets,
                    const Forward<T>& saved, bool in_place) {
  using A = accum<T>;
  const Layout& layout = problem.layout;
  const Options& options = problem.options;
  const bool per_row = options.per_row;
  const Buffer<Wide<T>> grad = incoming_grad(problem);
  Buffer<A> total_weight(1);
  total_weight[0] = 3;
  const UniformSumOf<T> uniform(problem);
  using Op = CrossEntropyBackwardRows<T, Kind>;
  const Op op{.args = problem.arguments(),
              .max = saved.max.data(),
              .sum = saved.sum.data(),
              .grad = {grad.data(), per_row, per_row ? nullptr : total_weight.data()},
              .uniform_sum = uniform.sum()};
  Buffer<T> grad_input = in_place ? saved.kept : Buffer<T>(elements(layout), offsets.output);
  const T* logits = in_place ? grad_input.data() : saved.kept.data();
  Tensors<T> tensors{{logits, nullptr}, grad_input.data()};
  if (options.probabilities) {
    tensors.in[0] = problem.target_probs.data();
    tensors.in[1] = logits;
  }
  run_rows(op, plan_of<Op>(layout, way), layout, tensors);
  expect_same_in_every_order(grad_input);
  check_gradient(problem, grad_input,
                 [&](int64_t row) { return per_row ? grad(row) : grad(0) / 3; });
}

// Scales the gradient that the forward kept.
template <typename T>
void check_scale(const Problem<T>& problem, const Way& way, const Offsets& offsets,
                 const Forward<T>& saved, bool in_place) {
  const bool per_row = problem.options.per_row;
  const Buffer<Wide<T>> grad = incoming_grad(problem);
  Buffer<T> grad_input =
      in_place ? saved.kept : Buffer<T>(elements(problem.layout), offsets.output);
  using Op = ScaleGradientRows<T>;
  const Op op{.target = problem.arguments().target,
              .ignore_index = kIgnored,
              .grad = {grad.data(), per_row, nullptr},
              .in_place = in_place};
  const T* kept = in_place ? grad_input.data() : saved.kept.data();
  run_rows(op, plan_of<Op>(problem.layout, way), problem.layout,
           Tensors<T>{{kept, nullptr}, grad_input.data()});
  expect_same_in_every_order(grad_input);
  for (int64_t row = 0; row < problem.layout.rows(); ++row) {
    const double g = problem.counts(row) ? grad(per_row ? row : 0) : 0;
    for (int64_t c = 0; c < problem.layout.classes; ++c) {
      const int64_t i = element(problem.layout, row, c);
      expect_close<T>("scaled", i, static_cast<T>(grad_input(i)), g * saved.kept(i), 0, 0);
    }
  }
}

// An incoming gradient of 1 leaves the memory alone: it isn't even read.
template <typename T>
void check_scale_by_one(const Problem<T>& problem, const Way& way) {
  Buffer<T> kept(elements(problem.layout)), one(1);  // NaN
  one[0] = static_cast<T>(1);
  using Op = ScaleGradientRows<T>;
  const Op op{.target = problem.arguments().target,
              .ignore_index = kIgnored,
              .grad = {one.data(), false, nullptr},
              .in_place = true};
  run_rows(op, plan_of<Op>(problem.layout, way), problem.layout,
           Tensors<T>{{kept.data(), nullptr}, kept.data()});
  for (int64_t i = 0; i < kept.size(); ++i) expect(std::isnan(kept(i)), "nothing is written");
}

// What 'mean' divides by, from the targets alone: on one block and on several.
template <typename T>
void check_target_weights(const Problem<T>& problem, const Buffer<accum<T>>& total_weight) {
  const int64_t rows = problem.layout.rows();
  for (const unsigned blocks : {1, 3}) {
    std::vector<LossSums> sums(blocks);
    Buffer<accum<T>> total(1);
    const LossResult<T> result{nullptr, total.data(), /*mean=*/false};
    FASTNN_LAUNCH((sum_target_weights_kernel<T>), blocks, 64, 0, nullptr, problem.arguments(), rows,
                  sums.data(), result);
    if (blocks > 1) {
      FASTNN_LAUNCH((finish_loss_kernel<T>), 1, kFinishThreads, 0, nullptr, sums.data(), blocks,
                    result);
    }
    expect_sum<accum<T>>("target weights", total[0], total_weight(0), rows, total_weight(0));
  }
}

template <typename T, TargetKind Kind>
void cross_entropy(const Layout& layout, const Way& way, const Offsets& offsets,
                   const Options& options) {
  using A = accum<T>;
  const Problem<T> problem(layout, options, offsets);
  const auto alone = forward<T, Kind>(problem, way, offsets, false, [](auto op) { return op; });
  check_forward(problem, alone, false);
  if constexpr (Kind != TargetKind::Probabilities)
    check_target_weights(problem, alone.total_weight);
  if constexpr (kKeepsGradient<T>) {
    Buffer<A> divisor(1);
    divisor[0] = 3;
    const A* total_weight = options.per_row ? nullptr : divisor.data();
    const UniformSumOf<T> uniform(problem);
    const auto saved = forward<T, Kind>(problem, way, offsets, false, [&](auto op) {
      return CrossEntropyGradientRows<T, Kind>{op, A(0.5), uniform.sum(), total_weight};
    });
    check_forward(problem, saved, false);
    check_gradient(problem, saved.kept, [&](int64_t) { return total_weight ? 0.5 / 3 : 0.5; });
    if (Kind != TargetKind::Probabilities && layout.rows() > 0 && alone.total_weight(0) > 0) {
      const auto weighed = forward<T, Kind>(problem, way, offsets, false, [&](auto op) {
        return CrossEntropyGradientRows<T, Kind>{op, A(0.5), uniform.sum(), nullptr, layout.rows()};
      });
      check_gradient(problem, weighed.kept, [&](int64_t) { return 0.5 / alone.total_weight(0); });
    }
    for (const bool in_place : {false, true}) {
      check_scale(problem, way, offsets, saved, in_place);
    }
    check_scale_by_one(problem, way);
  } else {
    const auto saved = forward<T, Kind>(
        problem, way, offsets, true, [](auto op) { return CrossEntropyCopyingRows<T, Kind>{op}; });
    check_forward(problem, saved, true);
    for (int64_t i = 0; i < saved.kept.size(); ++i) {
      expect(saved.kept(i) == problem.logits(i), "the logits are copied");
    }
    for (const bool in_place : {false, true}) {
      check_backward<T, Kind>(problem, way, offsets, saved, in_place);
    }
  }
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
  const auto test_dtype = [&]<typename T>() {
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
  };
  for_each_dtype(test_dtype);
  test_dtype.template operator()<Widened<BFloat16>>();
});

// A target out of range ends the launch.
const Test bad("cross_entropy: target out of range", [] {
  using Op = CrossEntropyForwardRows<float, TargetKind::Index>;
  for (const int64_t wrong : {int64_t{5}, int64_t{-1}, INT64_MAX, INT64_MIN}) {
    const Layout layout{3, 5, 1};
    describe("target %lld", static_cast<long long>(wrong));
    Problem<float> problem(layout, {}, {0, 0, 0});
    problem.target[2] = wrong;
    LossSums sums[3];
    bool ended = false;
    try {
      run_rows(Op{.args = problem.arguments(),
                  .losses = nullptr,
                  .max = nullptr,
                  .sum = nullptr,
                  .result = {}},
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
