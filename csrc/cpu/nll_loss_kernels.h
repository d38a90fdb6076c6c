// nll_loss on raw pointers. One element of each row is read or written, and the loops wait for
// memory: wider vectors would gain nothing, so these are not among the kernels that are compiled
// for each instruction set (simd/). T is PyTorch's storage type; values per row or per class are in
// its accumulation type.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/simd/kernels.h"

namespace fastnn::cpu {

// The operands of the rows' losses; `weight` and `losses` may be null.
template <typename T>
struct NLLRows {
  const T* log_probs;
  RowStrides strides;
  const int64_t* target;
  int64_t classes;
  int64_t ignore_index;
  const accum<T>* weight;
  accum<T>* losses;
};

// The usual case: no class weights, no losses per row, contiguous rows. The less the loop reads per
// row, the more rows' cache misses overlap.
template <typename T>
int64_t sum_plain_nll_rows(const NLLRows<T> rows, int64_t begin, int64_t end,
                           simd::LossSums& sums) {
  int64_t first_bad = simd::kNoBadTarget, count = 0;
  double loss = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = rows.target[i];
    if (t >= 0 && t < rows.classes && t != rows.ignore_index) {
      loss -= accum<T>(rows.log_probs[i * rows.strides.outer + t * rows.strides.classes]);
      ++count;
    } else if (t != rows.ignore_index) {
      first_bad = std::min(first_bad, i);
    }
  }
  sums = {.loss = loss, .weight = double(count)};
  return first_bad;
}

// Adds the rows [begin, end) to `sums`; returns the first whose target is out of range.
template <typename T>
int64_t sum_nll_rows(const NLLRows<T>& rows, int64_t begin, int64_t end, simd::LossSums& sums) {
  using A = accum<T>;
  if (!rows.weight && !rows.losses && rows.strides.inner_size == 1) {
    return sum_plain_nll_rows(rows, begin, end, sums);
  }
  simd::LossSums total;
  int64_t first_bad = simd::kNoBadTarget;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = rows.target[i];
    A loss = 0;
    if (t >= 0 && t < rows.classes && t != rows.ignore_index) {
      const A class_weight = rows.weight ? rows.weight[t] : A(1);
      loss = -class_weight * A(rows.log_probs[rows.strides.element(i, t)]);
      total.weight += class_weight;
    } else if (t != rows.ignore_index) {
      first_bad = std::min(first_bad, i);
    }
    if (rows.losses) rows.losses[i] = loss;
    total.loss += loss;
  }
  sums = total;
  return first_bad;
}

// The operands of the gradient: `grad` holds one value, or one per row, and `scale` multiplies it.
template <typename T>
struct NLLGradient {
  Layout layout;
  const int64_t* target;
  int64_t ignore_index;
  const accum<T>* weight;  // may be null
  const accum<T>* grad;
  bool grad_per_row;
  double scale;
  T* grad_input;
  bool is_zero;  // whether grad_input is zero already
};

// Writes the gradient of [first, last) of the layout's outer dimension; returns the first row whose
// target is out of range.
template <typename T>
int64_t write_nll_gradient(const NLLGradient<T>& args, int64_t first, int64_t last) {
  using A = accum<T>;
  const auto [outer, classes, inner] = args.layout;
  const int64_t block = classes * inner;
  const RowStrides strides = {inner, block, inner, 1};
  T* const dx = args.grad_input;
  if (!args.is_zero) std::memset(dx + first * block, 0, (last - first) * block * sizeof(T));
  for (int64_t i = first * inner; i < last * inner; ++i) {
    const int64_t t = args.target[i];
    if (t == args.ignore_index) continue;
    if (t < 0 || t >= classes) return i;
    const A class_weight = args.weight ? args.weight[t] : A(1);
    const A grad = args.grad[args.grad_per_row ? i : 0] * A(args.scale);
    dx[strides.element(i, t)] = T(-class_weight * grad);
  }
  return simd::kNoBadTarget;
}

}  // namespace fastnn::cpu
