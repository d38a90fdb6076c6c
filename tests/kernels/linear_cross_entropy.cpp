// The blocks of logits: losses, log-sum-exps, and the gradient in the logits' place.
#include "rows.h"

namespace fastnn::tests {
namespace {

struct Options {
  bool probabilities = false;
  bool weighted = false;
  double label_smoothing = 0;
  double z_loss = 0;
  bool grad_per_row = false;
  int64_t offset = 0;
};

template <typename A>
struct Problem : TargetDistribution<Problem<A>> {
  Options options;
  Layout layout;
  Buffer<A> logits;
  Buffer<int64_t> target;
  Buffer<A> target_probs;
  Buffer<A> weight;
  Buffer<A> grad;

  Problem(const Layout& layout, const Options& options)
      : options(options),
        layout(layout),
        logits(random_buffer<A>(elements(layout), options.offset)),
        target(layout.rows()),
        target_probs(random_buffer<A>(elements(layout), options.offset, 0, 1)),
        weight(random_buffer<A>(layout.classes, options.offset, 0.25, 2)),
        grad(random_buffer<A>(options.grad_per_row ? layout.rows() : 1, options.offset)) {
    for (int64_t row = 0; row < layout.rows(); ++row) target[row] = random_index(layout.classes);
  }
  bool counts(int64_t) const {
    return true;
  }
  double grad_of(int64_t row) const {
    return grad(options.grad_per_row ? row : 0);
  }
};

template <typename A>
struct Results {
  Buffer<A> logits;  // or the gradient in their place
  Buffer<A> losses;
  Buffer<A> max;
  Buffer<A> log_sum;

  explicit Results(const Problem<A>& problem)
      : logits(problem.logits),
        losses(problem.layout.rows()),
        max(problem.layout.rows()),
        log_sum(problem.layout.rows()) {
  }
  simd::LogitBlock<A> block(const Problem<A>& problem, bool wants_gradient) {
    const Options& options = problem.options;
    return {.args = {.layout = problem.layout,
                     .logits = logits.data(),
                     .target = data_if(!options.probabilities, problem.target),
                     .target_probs = data_if(options.probabilities, problem.target_probs),
                     .weight = data_if(options.weighted, problem.weight),
                     .ignore_index = -100,
                     .label_smoothing = options.label_smoothing},
            .z_loss = options.z_loss,
            .losses = losses.data(),
            .max = max.data(),
            .log_sum = log_sum.data(),
            .gradient = data_if(wants_gradient, logits),
            .grad = problem.grad.data(),
            .grad_per_row = options.grad_per_row};
  }
};

template <typename A>
void check_results(const Problem<A>& problem, const Buffer<A>& losses, const Buffer<A>& max,
                   const Buffer<A>& log_sum) {
  const double roundings = roundings_of_row(problem.layout);
  for (int64_t row = 0; row < problem.layout.rows(); ++row) {
    const LogSumExp lse = log_sum_exp(problem.logits, problem.layout, row);
    const double total = lse.max + lse.log_sum, z = problem.options.z_loss * total * total;
    double loss = z, magnitude = 4 * std::abs(z), farthest = 0;
    for (int64_t c = 0; c < problem.layout.classes; ++c) {
      const double x = problem.logits(element(problem.layout, row, c));
      loss -= problem.q(row, c) * lse.log_softmax(x);
      magnitude += problem.q(row, c) * lse.scale(x);
      farthest = std::max(farthest, lse.scale(x));
    }
    expect_close("max", row, max[row], lse.max, 0, 0);
    expect_close("log_sum", row, log_sum[row], lse.log_sum, roundings, farthest);
    expect_close("losses", row, losses[row], loss, roundings, magnitude + farthest);
  }
}

template <typename A>
void check_gradient(const Problem<A>& problem, const Buffer<A>& gradient) {
  const Layout& layout = problem.layout;
  for (int64_t row = 0; row < layout.rows(); ++row) {
    const double g = problem.grad_of(row);
    const LogSumExp lse = log_sum_exp(problem.logits, layout, row);
    const double of_z = 2 * problem.options.z_loss * (lse.max + lse.log_sum);
    double q_sum = 0;
    for (int64_t c = 0; c < layout.classes; ++c) q_sum += problem.q(row, c);
    for (int64_t c = 0; c < layout.classes; ++c) {
      const int64_t i = element(layout, row, c);
      const double x = problem.logits(i), q = problem.q(row, c);
      const double softmax = std::exp(lse.log_softmax(x));
      const double magnitude = softmax * (q_sum + std::abs(of_z)) * lse.scale(x) + q;
      expect_close("gradient", i, gradient[i], g * (softmax * (q_sum + of_z) - q),
                   roundings_of_row(layout), std::abs(g) * magnitude);
    }
  }
}

template <typename A>
void logit_block(const Target& target, const Layout& layout, const Options& options) {
  const Problem<A> problem(layout, options);
  const auto run = [&](Results<A>& out, auto kernel, bool wants_gradient, int threads) {
    const auto block = out.block(problem, wants_gradient);
    parallel_for(threads, layout.rows(),
                 [&](int64_t begin, int64_t end) { kernel(block, begin, end); });
  };
  for (const bool wants_gradient : {false, true}) {
    const auto [gradient, losses, max, log_sum] = same_on_any_threads([&](int threads) {
      Results<A> out(problem);
      run(out, target.kernels<A>().logit_block, wants_gradient, threads);
      return std::tuple(out.logits, out.losses, out.max, out.log_sum);
    });
    check_results(problem, losses, max, log_sum);
    if (wants_gradient) {
      check_gradient(problem, gradient);
    } else {
      expect_same_bits("logits", gradient, problem.logits);
    }
    Results<A> out(problem);
    run(out, target.kernels<A>().logit_block, false, 1);
    run(out, target.kernels<A>().logit_block_backward, true, 1);
    check_gradient(problem, out.logits);
  }
}

const Options kOptions[] = {
    {},
    {.weighted = true, .z_loss = 0.1, .grad_per_row = true, .offset = 1},
    {.weighted = true, .label_smoothing = 0.1, .offset = 1},
    {.label_smoothing = 0.1, .z_loss = 0.1, .grad_per_row = true},
    {.probabilities = true, .weighted = true, .z_loss = 0.1, .offset = 1},
};

const Test test("linear_cross_entropy", [](const Target& target) {
  const auto run = [&]<typename A>(A) {
    for (const Layout& layout : layouts(target.lanes<A>())) {
      if (layout.inner != 1 || layout.classes == 0) continue;
      for (const Options& options : kOptions) {
        describe("%s %s options=%d", kName<A>, to_string(layout).c_str(), int(&options - kOptions));
        logit_block<A>(target, layout, options);
      }
    }
  };
  run(0.0);
  run(0.0f);
});

}  // namespace
}  // namespace fastnn::tests
