#include "cuda/log_softmax_kernels.cuh"

#include "rows.h"

namespace fastnn::cuda::tests {
namespace {

// `center`: the logits' mean. Only their differences count, and must keep their digits.
template <typename T>
void log_softmax(const Layout& layout, const Way& way, const Offsets& offsets, double center,
                 bool masked) {
  auto input = random_buffer<T>(elements(layout), offsets.first, center - 20, center + 20);
  if (masked) mask_some(input, layout);
  using Op = LogSoftmaxRows<T>;
  const Plan plan = plan_of<Op>(layout, way);
  Buffer<Wide<T>> output(input.size(), offsets.output);
  run_rows(Op{}, plan, layout, {{input.data(), nullptr}, output.data()});
  expect_same_in_every_order(output);
  for (int64_t row = 0; row < layout.rows(); ++row) {
    const LogSumExp lse = log_sum_exp(input, layout, row);
    for (int64_t c = 0; c < layout.classes; ++c) {
      const int64_t i = element(layout, row, c);
      expect_close<Wide<T>>("output", i, output(i), lse.log_softmax(input(i)),
                            roundings_of_row(layout), lse.scale(input(i)));
    }
  }
}

template <typename T>
void log_softmax_backward(const Layout& layout, const Way& way, const Offsets& offsets) {
  const auto grad = random_buffer<Wide<T>>(elements(layout), offsets.first);
  const auto output = random_buffer<Wide<T>>(elements(layout), offsets.second, -8, 0);
  using Op = LogSoftmaxBackwardRows<T>;
  const Plan plan = plan_of<Op>(layout, way);
  Buffer<T> grad_input(grad.size(), offsets.output);
  run_rows(Op{}, plan, layout, {{grad.data(), output.data()}, grad_input.data()});
  expect_same_in_every_order(grad_input);
  for (int64_t row = 0; row < layout.rows(); ++row) {
    double sum = 0, magnitude = 0;
    for (int64_t c = 0; c < layout.classes; ++c) {
      sum += grad(element(layout, row, c));
      magnitude += std::abs(grad(element(layout, row, c)));
    }
    for (int64_t c = 0; c < layout.classes; ++c) {
      const int64_t i = element(layout, row, c);
      const double softmax = std::exp(output(i));
      expect_close<T>("grad_input", i, static_cast<T>(grad_input(i)), grad(i) - softmax * sum,
                      roundings_of_row(layout), std::abs(grad(i)) + softmax * magnitude);
    }
  }
}

const Test test("log_softmax", [] {
  const auto test_dtype = []<typename T>() {
    for (const Layout& layout : layouts()) {
      for (const Way& way : ways(layout)) {
        const Offsets at = one_of(offsets<T>());
        describe("%s %s %s offsets %d, %d, %d", kName<T>, to_string(layout).c_str(), way.name,
                 int(at.first), int(at.second), int(at.output));
        const double center = at.first == 0 ? 0 : 3000;
        log_softmax<T>(layout, way, at, center, /*masked=*/at.first == 0);
        log_softmax_backward<T>(layout, way, at);
      }
    }
  };
  for_each_dtype(test_dtype);
  test_dtype.template operator()<Widened<BFloat16>>();
});

// Rows that fit into shared memory on request; that would fit only without what the reductions
// need; and of which a multiprocessor would hold only one.
const Test long_row("log_softmax of a long row", [] {
  const Way block{"block", Path::Block};
  for (const int64_t kibibytes : {48, 64, 111}) {
    describe("%d KiB", int(kibibytes));
    const Layout layout{1, kibibytes * 256, 1};
    log_softmax<float>(layout, block, {}, /*center=*/0, /*masked=*/false);
    log_softmax_backward<float>(layout, block, {});
  }
});

}  // namespace
}  // namespace fastnn::cuda::tests
