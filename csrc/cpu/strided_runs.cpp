#include "cpu/strided_runs.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>

namespace fastnn::cpu {
namespace {

// Elements of a run: the runs of a few tensors fit the L1 cache.
constexpr int64_t kRun = 1024;
// Shorter rows aren't worth a call each: several make a run.
constexpr int64_t kShortRow = 32;
// If one tensor's rows run across another's, a run takes this many elements of each row, so that
// both tensors' cache lines are fully used while they are in the cache.
constexpr int64_t kAcross = 64;

// Part of a tensor's rows, with strides in bytes.
struct Rows {
  char* data;
  int64_t element_size;
  int64_t col_stride;
  int64_t row_stride;
  int64_t cols;
  int64_t rows;

  bool are_one_run() const {
    return col_stride == element_size && (rows == 1 || row_stride == cols * element_size);
  }
  // The same rows, with adjacent elements joined into wider ones.
  Rows in_fewest_elements() const {
    constexpr int64_t kWidest = 16;
    Rows of = *this;
    while (of.col_stride == of.element_size && of.cols % 2 == 0 && of.element_size < kWidest) {
      of.element_size *= 2;
      of.col_stride *= 2;
      of.cols /= 2;
    }
    return of;
  }
};

// Elements copied in one iteration, as their addresses don't depend on one another.
constexpr int64_t kAtOnce = 4;

// One row or column of `Rows`, and its place in their run.
struct Line {
  char* in_rows;
  int64_t rows_stride;
  char* in_run;
  int64_t run_stride;
  int64_t size;

  // Calls copy(in_rows, in_run) for each element of kSize bytes.
  template <int64_t kSize, typename Copy>
  void for_each(Copy copy) const {
    if (rows_stride == 2 * kSize && run_stride == kSize) {
      // With constant strides the compiler copies several at once.
      for (int64_t i = 0; i < size; ++i) copy(in_rows + i * 2 * kSize, in_run + i * kSize);
      return;
    }
    int64_t i = 0;
    for (; i + kAtOnce <= size; i += kAtOnce) {
      char* const from = in_rows + i * rows_stride;
      char* const to = in_run + i * run_stride;
#pragma GCC unroll 4
      for (int64_t k = 0; k < kAtOnce; ++k) copy(from + k * rows_stride, to + k * run_stride);
    }
    for (; i < size; ++i) copy(in_rows + i * rows_stride, in_run + i * run_stride);
  }
};

// Calls copy(in_rows, in_run) for each element, in memory order unless that makes the lines short.
// Not inlined: its loops need all registers.
template <int64_t kSize, typename Copy>
[[gnu::noinline, gnu::flatten]] void for_each_element(const Rows& of, char* run, Copy copy) {
  const int64_t run_row_stride = of.cols * kSize;
  const bool by_cols = of.rows > 1 && (of.cols < kAtOnce || of.row_stride < of.col_stride);
  for (int64_t r = 0; !by_cols && r < of.rows; ++r) {
    Line{of.data + r * of.row_stride, of.col_stride, run + r * run_row_stride, kSize, of.cols}
        .template for_each<kSize>(copy);
  }
  for (int64_t c = 0; by_cols && c < of.cols; ++c) {
    Line{of.data + c * of.col_stride, of.row_stride, run + c * kSize, run_row_stride, of.rows}
        .template for_each<kSize>(copy);
  }
}

// Copies between rows and the run that they make: calls copy(in_rows, in_run, size) for each
// element with a constant size, as a memcpy call per element would cost more than the step.
template <typename Copy>
void copy_elements(const Rows& rows, void* run, Copy copy) {
  const Rows of = rows.in_fewest_elements();
  const auto copy_all = [&]<int64_t kSize>() {
    for_each_element<kSize>(of, static_cast<char*>(run), [&](char* in_rows, char* in_run) {
      copy(in_rows, in_run, std::integral_constant<int64_t, kSize>());
    });
  };
  switch (of.element_size) {
    case 2:
      return copy_all.template operator()<2>();
    case 4:
      return copy_all.template operator()<4>();
    case 8:
      return copy_all.template operator()<8>();
    default:
      return copy_all.template operator()<16>();
  }
}
void gather(const Rows& from, void* run) {
  copy_elements(from, run,
                [](char* in_rows, char* in_run, auto size) { std::memcpy(in_run, in_rows, size); });
}
void scatter(const Rows& to, void* run) {
  copy_elements(to, run,
                [](char* in_rows, char* in_run, auto size) { std::memcpy(in_rows, in_run, size); });
}

}  // namespace

StridedRuns::StridedRuns(at::TensorList written, at::TensorList read) {
  at::TensorIteratorConfig config;
  config.set_check_mem_overlap(false).check_all_same_dtype(false).resize_outputs(false);
  for (const at::Tensor& tensor : written) config.add_owned_output(tensor);
  for (const at::Tensor& tensor : read) config.add_owned_const_input(tensor);
  iterator_ = config.build();
}

void StridedRuns::for_each(int64_t begin, int64_t end, Step f) const {
  const int tensors = iterator_.ntensors();
  const auto copies = std::make_unique_for_overwrite<std::array<double, kRun>[]>(tensors);
  c10::SmallVector<Rows, 3> of(tensors);
  c10::SmallVector<void*, 3> runs(tensors);
  const auto step = [&](int64_t size) {
    for (int i = 0; i < tensors; ++i) {
      const bool in_place = of[i].are_one_run();
      runs[i] = in_place ? of[i].data : static_cast<void*>(copies[i].data());
      if (!in_place) gather(of[i], runs[i]);
    }
    f(runs.data(), size);
    for (int i = 0; i < iterator_.noutputs(); ++i) {
      if (runs[i] != of[i].data) scatter(of[i], runs[i]);
    }
  };
  const auto step_rows = [&](char** data, const int64_t* strides, int64_t cols, int64_t rows) {
    const int64_t* const col_stride = strides;
    const int64_t* const row_stride = strides + tensors;
    bool in_place = cols >= kShortRow, lie_across = false;
    for (int i = 0; i < tensors; ++i) {
      in_place &= col_stride[i] == iterator_.element_size(i);
      lie_across |= rows > 1 && row_stride[i] < col_stride[i];
    }
    const int64_t run_cols = std::min(cols, lie_across ? kAcross : kRun);
    const int64_t run_rows = in_place ? 1 : kRun / run_cols;
    for (int64_t r = 0; r < rows; r += run_rows) {
      for (int64_t c = 0; c < cols; c += run_cols) {
        const int64_t r_size = std::min(run_rows, rows - r), c_size = std::min(run_cols, cols - c);
        for (int i = 0; i < tensors; ++i) {
          of[i] = {data[i] + r * row_stride[i] + c * col_stride[i],
                   iterator_.element_size(i),
                   col_stride[i],
                   row_stride[i],
                   c_size,
                   r_size};
        }
        step(r_size * c_size);
      }
    }
  };
  iterator_.serial_for_each(step_rows, {begin, end});
}

}  // namespace fastnn::cpu
