#include "cuda/linear_cross_entropy_kernels.cuh"

#include "rows.h"

namespace fastnn::cuda::tests {
namespace {

constexpr int64_t kIgnored = 1;  // as the ignore_index: a class that may occur

struct Options {
  bool probabilities = false;
  bool weighted = false;
  double label_smoothing = 0;
  double scale = 1;
  double softcap = 0;
  double z_loss = 0;
};

// `products` are what the kernels read, `logits` what the operator makes of them.
template <typename T, typename Element>
struct Problem : TargetDistribution<Problem<T, Element>> {
  Layout layout;
  Options options;
  Buffer<T> products;
  Buffer<double> logits;
  Buffer<int64_t> target;
  Buffer<T> target_probs;
  Buffer<T> weight;

  Problem(const Layout& layout, const Options& options, const Offsets& offsets)
      : layout(layout),
        options(options),
        products(random_buffer<T>(elements(layout), offsets.first, -20, 20)),
        logits(elements(layout)),
        target(layout.rows()),
        target_probs(random_buffer<T>(elements(layout), offsets.second, 0, 1)),
        weight(random_buffer<T>(layout.classes, 1, 0.25, 2)) {
    for (int64_t i = 0; i < elements(layout); ++i) {
      const double x = products(i) * T(options.scale), cap = options.softcap;
      logits[i] = cap == 0 ? x : cap * std::tanh(x / cap);
    }
    for (int64_t row = 0; row < layout.rows(); ++row) {
      target[row] = layout.classes == 0 ? kIgnored : random_index(layout.classes);
      if (!counts(row)) hide(row);
    }
  }

  LogitArgs<T, Element> arguments() const {
    const double s = options.label_smoothing;
    return {{products.data(), layout.classes, layout.inner,
             options.probabilities ? nullptr : target.data(),
             options.probabilities ? target_probs.data() : nullptr,
             options.weighted ? weight.data() : nullptr, kIgnored, T(1 - s),
             T(s / std::max<double>(layout.classes, 1))},
            T(options.scale),
            T(options.softcap),
            T(options.z_loss)};
  }
  bool counts(int64_t row) const {
    return options.probabilities || target[row] != kIgnored;
  }
  // The slope of a logit by its product, without the scale.
  double slope(int64_t i) const {
    const double cap = options.softcap;
    return cap == 0 ? 1 : 1 - (logits(i) / cap) * (logits(i) / cap);
  }

 private:
  // What stands in an ignored row leaves no trace.
  void hide(int64_t row) {
    for (int64_t c = 0; c < layout.classes; ++c) products[element(layout, row, c)] = T(NAN);
  }
};

template <typename T>
struct Results {
  Buffer<T> losses;
  Buffer<T> max;
  Buffer<T> sum;

  explicit Results(int64_t rows) : losses(rows), max(rows), sum(rows) {
  }
};

template <TargetKind Kind, typename T, typename Element>
CrossEntropyForwardRows<T, Kind, LogitArgs<T, Element>> forward_rows(
    const Problem<T, Element>& problem, Results<T>& out) {
  return {.args = problem.arguments(),
          .losses = out.losses.data(),
          .max = out.max.data(),
          .sum = out.sum.data()};
}

// How far a softcap's tanh puts a logit off, in roundings: a few of its own.
constexpr double kAdjusted = 8;

template <typename T, typename Element>
void check_results(const Problem<T, Element>& problem, const Results<T>& out) {
  const Layout& layout = problem.layout;
  for (int64_t row = 0; row < layout.rows() && layout.classes > 0; ++row) {
    if (!problem.counts(row)) {
      expect(out.losses(row) == 0, "an ignored row has no loss");
      continue;
    }
    const LogSumExp lse = log_sum_exp(problem.logits, layout, row);
    const double total = lse.max + lse.log_sum, z = problem.options.z_loss * total * total;
    double loss = z, magnitude = 4 * std::abs(z), farthest = 1;
    for (int64_t c = 0; c < layout.classes; ++c) {
      const double x = problem.logits(element(layout, row, c));
      loss -= problem.q(row, c) * lse.log_softmax(x);
      farthest = std::max({farthest, lse.scale(x), std::abs(x)});
      magnitude += problem.q(row, c) * farthest;
    }
    const double roundings = roundings_of_row(layout) + kAdjusted;
    expect_close<T>("max", row, out.max(row), lse.max, kAdjusted, farthest);
    // The relative error of a sum is the absolute one of its log.
    expect_close<T>("sum", row, out.sum(row), std::exp(lse.log_sum), roundings,
                    farthest * std::exp(lse.log_sum));
    expect_close<T>("losses", row, out.losses(row), loss, roundings, magnitude + farthest);
  }
}

// That it is grad(row) * slope * ((sum(q) + 2 z lse) * softmax - q), and zero in the rows ignored.
template <typename T, typename Element, typename Grad>
void check_gradient(const Problem<T, Element>& problem, const Buffer<Element>& gradient,
                    Grad grad) {
  const Layout& layout = problem.layout;
  for (int64_t row = 0; row < layout.rows(); ++row) {
    const LogSumExp lse = log_sum_exp(problem.logits, layout, row);
    const double of_z = 2 * problem.options.z_loss * (lse.max + lse.log_sum);
    double q_sum = 0;
    for (int64_t c = 0; c < layout.classes; ++c) q_sum += problem.q(row, c);
    for (int64_t c = 0; c < layout.classes; ++c) {
      const int64_t i = element(layout, row, c);
      if (!problem.counts(row)) {
        expect(gradient(i) == 0, "an ignored row's gradient is zero");
        continue;
      }
      const double x = problem.logits(i), q = problem.q(row, c);
      const double softmax = std::exp(lse.log_softmax(x));
      const double scale = std::max(lse.scale(x), std::abs(x));
      const double magnitude = softmax * (q_sum + std::abs(of_z)) * scale + q;
      expect_close<Element>("gradient", i, gradient[i],
                            grad(row) * problem.slope(i) * (softmax * (q_sum + of_z) - q),
                            roundings_of_row(layout) + kAdjusted, std::abs(grad(row)) * magnitude);
    }
  }
}

template <typename Op>
void run_on(const Op& op, const Layout& layout, const Way& way, const TensorsOf<Op>& tensors) {
  run_rows(op, plan_of<Op>(layout, way), layout, tensors);
}

template <typename T>
void expect_results_in_every_order(const Results<T>& out) {
  expect_same_in_every_order(out.losses);
  expect_same_in_every_order(out.max);
  expect_same_in_every_order(out.sum);
}

// The sum over classes of label smoothing's part of q, by a kernel where class weights make it.
template <typename T, typename Element>
UniformSum<T> uniform_sum(const Problem<T, Element>& problem, Buffer<T>& memory) {
  const Options& options = problem.options;
  if (!options.weighted) return {T(options.label_smoothing), nullptr};
  const int64_t classes = problem.layout.classes;
  FASTNN_LAUNCH((sum_class_weights_kernel<T>), 1, 64, 0, nullptr, problem.weight.data(), classes,
                options.label_smoothing / std::max<double>(classes, 1), memory.data());
  return {T(0), memory.data()};
}

// The losses alone, or with the gradient times a number in memory.
template <typename T, typename Element, TargetKind Kind>
void check_forward(const Problem<T, Element>& problem, const Way& way, const Offsets& offsets) {
  const Layout& layout = problem.layout;
  const T* probs = problem.options.probabilities ? problem.target_probs.data() : nullptr;
  if constexpr (std::is_same_v<T, Element>) {
    Results<T> out(layout.rows());
    run_on(LogitLossRows<T, Kind>{forward_rows<Kind>(problem, out)}, layout, way,
           {{problem.products.data(), probs}, nullptr});
    expect_results_in_every_order(out);
    check_results(problem, out);
  }
  Results<T> out(layout.rows());
  Buffer<T> grad(1), uniform(1);
  grad[0] = T(0.5);
  Buffer<Element> gradient(elements(layout), offsets.output);
  run_on(
      LogitGradientRows<T, Element, Kind>{
          {forward_rows<Kind>(problem, out), T(1), uniform_sum(problem, uniform)}, grad.data()},
      layout, way, {{problem.products.data(), probs}, gradient.data()});
  expect_results_in_every_order(out);
  expect_same_in_every_order(gradient);
  check_results(problem, out);
  check_gradient(problem, gradient, [](int64_t) { return 0.5; });
}

// From each row's log-sum-exp and incoming gradient, which may replace the products.
template <typename T, typename Element, TargetKind Kind>
void check_backward(const Problem<T, Element>& problem, const Way& way, const Offsets& offsets) {
  const Layout& layout = problem.layout;
  Results<T> saved(layout.rows());
  auto grad = random_buffer<T>(layout.rows(), 1);
  for (int64_t row = 0; row < layout.rows(); ++row) {
    const LogSumExp lse = log_sum_exp(problem.logits, layout, row);
    saved.max[row] = T(lse.max);
    saved.sum[row] = T(std::exp(lse.log_sum));
    if (!problem.counts(row)) grad[row] = T(NAN);
  }
  Buffer<T> uniform(1);
  Buffer<Element> gradient(elements(layout), offsets.output);
  const LogitBackwardRows<T, Element, Kind> op{.args = problem.arguments(),
                                               .max = saved.max.data(),
                                               .sum = saved.sum.data(),
                                               .grad = {grad.data(), true, nullptr},
                                               .uniform_sum = uniform_sum(problem, uniform)};
  Tensors<T, Element> tensors{{problem.products.data(), nullptr}, gradient.data()};
  if (problem.options.probabilities) {
    tensors.in[0] = problem.target_probs.data();
    tensors.in[1] = problem.products.data();
  }
  run_on(op, layout, way, tensors);
  expect_same_in_every_order(gradient);
  check_gradient(problem, gradient, [&](int64_t row) { return grad(row); });
}

template <typename T, typename Element, TargetKind Kind>
void linear_cross_entropy(const Layout& layout, const Way& way, const Offsets& offsets,
                          const Options& options) {
  const Problem<T, Element> problem(layout, options, offsets);
  check_forward<T, Element, Kind>(problem, way, offsets);
  check_backward<T, Element, Kind>(problem, way, offsets);
}

const Options kOptions[] = {
    {},
    {.weighted = true, .z_loss = 0.1},
    {.weighted = true, .label_smoothing = 0.1, .scale = 0.5, .softcap = 5},
    {.label_smoothing = 0.1, .z_loss = 0.1},
    {.probabilities = true, .weighted = true, .softcap = 5, .z_loss = 0.1},
};

// In an order that isn't in step with anything else's.
constexpr size_t kChoices[] = {0, 1, 2, 3, 4, 2};

template <typename T, typename Element>
void over_layouts(const char* name) {
  for (const Layout& layout : layouts()) {
    if (layout.inner != 1) continue;
    for (const Way& way : ways(layout)) {
      const Offsets at = one_of(offsets<T>());
      const size_t choice = one_of(kChoices);
      const Options& options = kOptions[choice];
      describe("%s %s %s options=%d offsets %d, %d, %d", name, to_string(layout).c_str(), way.name,
               int(choice), int(at.first), int(at.second), int(at.output));
      if (options.probabilities) {
        linear_cross_entropy<T, Element, TargetKind::Probabilities>(layout, way, at, options);
      } else if (options.label_smoothing != 0) {
        linear_cross_entropy<T, Element, TargetKind::SmoothedIndex>(layout, way, at, options);
      } else {
        linear_cross_entropy<T, Element, TargetKind::Index>(layout, way, at, options);
      }
    }
  }
}

const Test test("linear_cross_entropy", [] {
  over_layouts<float, float>("float32");
  over_layouts<float, Widened<BFloat16>>("float32 to bfloat16");
#if !defined(__SANITIZE_THREAD__)  // the barriers are the same, and each takes minutes
  over_layouts<float, Widened<Half>>("float32 to float16");
  over_layouts<double, double>("float64");
#endif
});

}  // namespace
}  // namespace fastnn::cuda::tests
