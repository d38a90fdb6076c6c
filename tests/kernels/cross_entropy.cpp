#include "rows.h"

namespace fastnn::tests {
namespace {

constexpr int64_t kIgnored = 1;  // the ignore_index, a class that may occur

struct Options {
  bool probabilities = false;
  bool weighted = false;
  double label_smoothing = 0;
  bool bad_targets = false;
  bool grad_per_row = false;
  int64_t offset = 0;
};

// The operands, and what they are made of.
template <typename T>
struct Problem : TargetDistribution<Problem<T>> {
  Options options;
  Layout layout;
  Buffer<T> logits;
  Buffer<int64_t> target;
  Buffer<T> target_probs;
  Buffer<accum<T>> weight;

  Problem(const Layout& layout, const Options& options)
      : options(options),
        layout(layout),
        logits(random_buffer<T>(elements(layout), options.offset)),
        target(layout.rows()),
        target_probs(random_buffer<T>(elements(layout), options.offset, 0, 1)),
        weight(random_buffer<accum<T>>(layout.classes, options.offset, 0.25, 2)) {
    for (int64_t row = 0; row < layout.rows(); ++row) target[row] = random_target();
  }

  int64_t random_target() const {
    constexpr int64_t kBad[] = {-1, INT64_MIN, INT64_MAX};
    if (layout.classes == 0) return kIgnored;
    if (!options.bad_targets || random_index(3) != 0) return random_index(layout.classes);
    const int64_t choice = random_index(4);
    return choice == 3 ? layout.classes : kBad[choice];
  }

  simd::CrossEntropy<T> arguments() const {
    return {.layout = layout,
            .logits = logits.data(),
            .target = data_if(!options.probabilities, target),
            .target_probs = data_if(options.probabilities, target_probs),
            .weight = data_if(options.weighted, weight),
            .ignore_index = kIgnored,
            .label_smoothing = options.label_smoothing};
  }

  bool is_bad(int64_t row) const {
    const int64_t t = target[row];
    return !options.probabilities && t != kIgnored && (t < 0 || t >= layout.classes);
  }
  bool counts(int64_t row) const {
    return options.probabilities || (!is_bad(row) && target[row] != kIgnored);
  }
  int64_t first_bad() const {
    for (int64_t row = 0; row < layout.rows(); ++row) {
      if (is_bad(row)) return row;
    }
    return simd::kNoBadTarget;
  }
};

void keep_lowest(std::atomic<int64_t>& lowest, int64_t value) {
  int64_t known = lowest;
  while (value < known && !lowest.compare_exchange_weak(known, value)) {}
}

// What is wanted beside the sums.
struct Wanted {
  bool losses = false;
  bool kept = false;
};
constexpr Wanted kWanted[] = {{}, {.losses = true}, {.losses = true, .kept = true}};

constexpr double kScale = 0.25;

template <typename T>
struct Forward {
  Buffer<T> grad;  // or, for a type that doesn't keep it, the two next ones
  Buffer<accum<T>> max;
  Buffer<accum<T>> sum;
  Buffer<accum<T>> losses;
  Buffer<double> sums;  // of loss and weight, for each chunk
};

// In chunks of a fixed number of rows, each with sums of its own, as the launcher does.
template <typename T>
Forward<T> forward(const Target& target, const Problem<T>& problem, const Wanted& wanted,
                   int threads) {
  const int64_t rows = problem.layout.rows();
  const int64_t chunk = target.lanes<T>() + 1;
  const int64_t chunks = (rows + chunk - 1) / chunk;
  const int64_t offset = problem.options.offset;
  Forward<T> out{Buffer<T>(elements(problem.layout), offset), Buffer<accum<T>>(rows),
                 Buffer<accum<T>>(rows), Buffer<accum<T>>(rows, offset),
                 Buffer<double>(2 * chunks)};
  const bool keeps_grad = wanted.kept && kKeepsGradient<T>;
  const bool keeps_lse = wanted.kept && !kKeepsGradient<T>;
  const simd::KeptRows<T> kept{data_if(keeps_grad, out.grad), kScale, data_if(keeps_lse, out.max),
                               data_if(keeps_lse, out.sum)};
  const auto arguments = problem.arguments();
  std::atomic<int64_t> first_bad{simd::kNoBadTarget};
  parallel_for(threads, chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      simd::LossSums sums;
      keep_lowest(first_bad, target.kernels<T>().cross_entropy(
                                 arguments, i * chunk, std::min((i + 1) * chunk, rows), kept,
                                 data_if(wanted.losses, out.losses), sums));
      out.sums[2 * i] = sums.loss;
      out.sums[2 * i + 1] = sums.weight;
    }
  });
  expect(first_bad == problem.first_bad(), "another position is the first bad target's");
  return out;
}

template <typename T>
void check_forward(const Problem<T>& problem, const Forward<T>& out, const Wanted& wanted) {
  const Layout& layout = problem.layout;
  const double roundings = roundings_of_row(layout);
  double sum = 0, sum_magnitude = 0, weight = 0;
  for (int64_t row = 0; row < layout.rows(); ++row) {
    const LogSumExp lse = log_sum_exp(problem.logits, layout, row);
    double loss = 0, magnitude = 0, farthest = 0;
    for (int64_t c = 0; c < layout.classes; ++c) {
      const double x = problem.logits(element(layout, row, c));
      loss -= problem.q(row, c) * lse.log_softmax(x);
      magnitude += problem.q(row, c) * lse.scale(x);
      farthest = std::max(farthest, lse.scale(x));
    }
    if (layout.classes != 0 && wanted.kept && !kKeepsGradient<T>) {
      expect_close("max", row, out.max[row], lse.max, 0, 0);
      const double exp_sum = std::exp(lse.log_sum);
      expect_close("sum", row, out.sum[row], exp_sum, roundings, exp_sum * farthest);
    }
    if (wanted.losses) {
      expect_close("losses", row, out.losses[row], loss, roundings, magnitude);
    }
    sum += loss;
    sum_magnitude += magnitude;
    weight += problem.row_weight(row);
  }
  double actual_sum = 0, actual_weight = 0;
  for (int64_t i = 0; i < out.sums.size(); i += 2) {
    actual_sum += out.sums(i);
    actual_weight += out.sums(i + 1);
  }
  // Summed over the rows in float64 for every storage type.
  const double added = layout.rows() * kEpsilon<double>;
  expect_within("sum of losses", 0, actual_sum, sum,
                (roundings * kEpsilon<accum<T>> + added) * sum_magnitude);
  expect_within("sum of weights", 0, actual_weight, weight, added * weight);
}

// That the gradient is kScale * g(row) * (sum(q) * softmax - q).
template <typename T, typename Grad>
void check_gradient(const Problem<T>& problem, const Buffer<T>& grad_input, Grad grad) {
  const Layout& layout = problem.layout;
  for (int64_t row = 0; row < layout.rows(); ++row) {
    const double g = problem.counts(row) ? kScale * grad(row) : 0;
    const LogSumExp lse = log_sum_exp(problem.logits, layout, row);
    double q_sum = 0;
    for (int64_t c = 0; c < layout.classes; ++c) q_sum += problem.q(row, c);
    for (int64_t c = 0; c < layout.classes; ++c) {
      const int64_t i = element(layout, row, c);
      const double x = problem.logits(i), q = problem.q(row, c);
      const double softmax = std::exp(lse.log_softmax(x));
      expect_close("grad_input", i, grad_input[i], g * (softmax * q_sum - q),
                   roundings_of_row(layout), std::abs(g) * (softmax * q_sum * lse.scale(x) + q));
    }
  }
}

// From what the forward kept, which the gradient replaces or leaves alone.
template <typename T>
void check_backward(const Target& target, const Problem<T>& problem, const Forward<T>& saved,
                    bool in_place) {
  const Layout& layout = problem.layout;
  const Options& options = problem.options;
  auto grad = random_buffer<accum<T>>(options.grad_per_row ? layout.rows() : 1, options.offset);
  for (int64_t row = 0; options.grad_per_row && row < layout.rows(); ++row) {
    if (!problem.counts(row)) grad[row] = from_double<accum<T>>(NAN);  // leaves no trace
  }
  const Buffer<T>& kept = kKeepsGradient<T> ? saved.grad : problem.logits;
  const auto [grad_input] = same_on_any_threads([&](int threads) {
    Buffer<T> grad_input = in_place ? kept : Buffer<T>(elements(layout), options.offset);
    auto arguments = problem.arguments();
    arguments.logits = in_place ? grad_input.data() : kept.data();
    std::atomic<int64_t> first_bad{simd::kNoBadTarget};
    parallel_for(threads, layout.rows(), [&](int64_t begin, int64_t end) {
      keep_lowest(first_bad, target.kernels<T>().cross_entropy_backward(
                                 arguments, begin, end, saved.max.data(), saved.sum.data(),
                                 grad.data(), options.grad_per_row, kScale, grad_input.data()));
    });
    expect(kKeepsGradient<T> || first_bad == problem.first_bad(),
           "another position is the first bad target's");
    return std::tuple(grad_input);
  });
  check_gradient(problem, grad_input,
                 [&](int64_t row) { return grad(options.grad_per_row ? row : 0); });
}

template <typename T>
void cross_entropy(const Target& target, const Layout& layout, const Options& options) {
  const Problem<T> problem(layout, options);
  for (const Wanted& wanted : kWanted) {
    const auto [grad, max, sum, losses, sums] = same_on_any_threads([&](int threads) {
      const auto [grad, max, sum, losses, sums] = forward(target, problem, wanted, threads);
      return std::tuple(grad, max, sum, losses, sums);
    });
    const Forward<T> out{grad, max, sum, losses, sums};
    check_forward(problem, out, wanted);
    if (!wanted.kept) continue;
    if (kKeepsGradient<T>) check_gradient(problem, out.grad, [](int64_t) { return 1; });
    for (const bool in_place : {false, true}) check_backward(target, problem, out, in_place);
  }
}

const Options kOptions[] = {
    {.grad_per_row = true},
    {.weighted = true, .label_smoothing = 0.1, .offset = 1},
    {.weighted = true, .bad_targets = true, .offset = 1},
    {.probabilities = true, .offset = 1},
    {.probabilities = true, .weighted = true, .label_smoothing = 0.1, .grad_per_row = true},
};

const Test test("cross_entropy", [](const Target& target) {
  for_each_dtype([&]<typename T>() {
    for (const Layout& layout : layouts(target.lanes<T>())) {
      for (const Options& options : kOptions) {
        describe("%s %s options=%d", kName<T>, to_string(layout).c_str(), int(&options - kOptions));
        cross_entropy<T>(target, layout, options);
      }
    }
  });
});

}  // namespace
}  // namespace fastnn::tests
