// Shared by the launchers of nll_loss and cross_entropy: targets, and sums over rows that are the
// same on any number of threads.
#pragma once

#include <atomic>
#include <limits>

#include "cpu/launch.h"
#include "ops/checks.h"

namespace fastnn::cpu {

// The lowest position of a target out of range, over all threads.
class FirstBadTarget {
 public:
  void update(int64_t position) {
    int64_t known = position_.load(std::memory_order_relaxed);
    while (position < known && !position_.compare_exchange_weak(known, position)) {}
  }
  // Called after the parallel region: nothing may be thrown in it.
  void raise_if_any(const int64_t* target, int64_t classes, int64_t ignore_index) const {
    const int64_t position = position_.load();
    if (position != simd::kNoBadTarget) raise_bad_target(target[position], classes, ignore_index);
  }

 private:
  std::atomic<int64_t> position_{simd::kNoBadTarget};
};

// Calls f(begin, end, sums) over rows in chunks whose size depends on the work alone, and adds the
// chunks' sums in order: the result has the same bits on any number of threads.
template <typename F>
simd::LossSums sum_over_rows(int64_t rows, int64_t elements_per_row, F f) {
  const int64_t chunk = grain(elements_per_row);
  const int64_t chunks = ceil_div(rows, chunk);
  std::vector<simd::LossSums> sums(chunks);
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      f(i * chunk, std::min((i + 1) * chunk, rows), sums[i]);
    }
  });
  simd::LossSums total;
  for (const auto& sum : sums) {
    total.loss += sum.loss;
    total.weight += sum.weight;
  }
  return total;
}

inline at::Tensor scalar_tensor(double value, at::ScalarType dtype) {
  const at::Tensor result = empty_result({}, dtype);
  dispatch_scalars(dtype, "scalar_tensor", [&]<typename T>() { *data<T>(result) = T(value); });
  return result;
}

// Converts values per row or per class to the kernels' accumulation dtype; a single number without
// an operator's call, which costs as much as a small loss.
inline at::Tensor in_accumulate_dtype(const at::Tensor& tensor) {
  const at::ScalarType dtype = accumulate_dtype(tensor);
  if (tensor.scalar_type() == dtype) return tensor;
  if (tensor.dim() != 0) return tensor.to(dtype);
  double value = 0;
  dispatch_scalars(tensor.scalar_type(), "in_accumulate_dtype",
                   [&]<typename T>() { value = double(*const_data<T>(tensor)); });
  return scalar_tensor(value, dtype);
}

inline std::optional<at::Tensor> class_weight_of(const LossOptions& options) {
  if (!options.weight) return std::nullopt;
  return in_accumulate_dtype(options.weight->contiguous());
}

inline at::Tensor reduced_loss(const simd::LossSums& sums, const LossOptions& options,
                               at::ScalarType dtype) {
  double loss = sums.loss;
  if (options.is_mean()) {
    // NaN over nothing; smoothing's share of the loss does not vanish with the targets' weights.
    loss = sums.weight == 0 ? std::numeric_limits<double>::quiet_NaN() : loss / sums.weight;
  }
  return scalar_tensor(loss, dtype);
}

// The reciprocal of a total weight; NaN if that is 0.
inline double reciprocal(double total) {
  return total == 0 ? std::numeric_limits<double>::quiet_NaN() : 1 / total;
}

// The factor of each row's gradient: 'mean' has divided by the total weight.
inline double row_grad_scale(const at::Tensor& total_weight, const LossOptions& options) {
  if (!options.is_mean()) return 1;
  const double total = total_weight.scalar_type() == at::kDouble ? *const_data<double>(total_weight)
                                                                 : *const_data<float>(total_weight);
  return reciprocal(total);
}

}  // namespace fastnn::cpu
