#include "cpu/column_sums.h"

#include <algorithm>
#include <vector>

#include "cpu/launch.h"

namespace fastnn::cpu {
namespace {

// Sums over chunks of rows that depend only on the matrix's sizes: the result has the same bits on
// any number of threads.
class ChunkSums {
 public:
  ChunkSums(int64_t chunks, int64_t cols) : chunks_(chunks), cols_(cols), sums_(chunks * cols) {
  }
  double* at(int64_t chunk, int64_t col) {
    return sums_.data() + chunk * cols_ + col;
  }
  template <typename T>
  void add_up(T* result) {
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
      for (int64_t c = 0; c < cols_; ++c) sums_[c] += *at(chunk, c);
    }
    dispatch_scalars(kDtype<T>, "linear_backward", [&]<typename Scalar>() {
      auto* to = reinterpret_cast<Scalar*>(result);
      for (int64_t c = 0; c < cols_; ++c) to[c] = Scalar(chunks_ == 0 ? 0 : sums_[c]);
    });
  }

 private:
  int64_t chunks_;
  int64_t cols_;
  std::vector<double> sums_;
};

// Calls block(first, sums, rows, cols) for the blocks of a matrix, where `first` is the index of
// the first element. It adds the sums over rows to `sums`, which is null if they aren't wanted.
template <typename T, typename F>
void sum_blocks(T* result, int64_t rows, int64_t cols, F block) {
  constexpr int64_t kLeastRows = 64, kMostChunks = 16;
  const int64_t strip = std::min(cols, simd::kColumnSums);
  const int64_t strips = cols == 0 ? 0 : ceil_div(cols, strip);
  const int64_t chunk = std::max({kLeastRows, grain(strip), ceil_div(rows, kMostChunks)});
  const int64_t chunks = ceil_div(rows, chunk);
  ChunkSums sums(result == nullptr ? 0 : chunks, cols);
  at::parallel_for(0, chunks * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / strips * chunk, col = i % strips * strip;
      block(row * cols + col, result == nullptr ? nullptr : sums.at(i / strips, col),
            std::min(chunk, rows - row), std::min(strip, cols - col));
    }
  });
  if (result != nullptr) sums.add_up(result);
}

}  // namespace

template <typename T>
void column_sums(T* sums, const T* grad, int64_t rows, int64_t cols) {
  sum_blocks(sums, rows, cols, [&](int64_t first, double* block, int64_t height, int64_t width) {
    kernels<T>().column_sums(block, grad + first, height, width, cols);
  });
}

template <typename T>
void relu_backward(T* grad_linear, T* sums, const T* grad, const T* output, int64_t rows,
                   int64_t cols) {
  sum_blocks(sums, rows, cols, [&](int64_t first, double* block, int64_t height, int64_t width) {
    kernels<T>().relu_backward(grad_linear + first, block, grad + first, output + first, height,
                               width, cols);
  });
}

#define FASTNN_INSTANTIATE(T)                                \
  template void column_sums(T*, const T*, int64_t, int64_t); \
  template void relu_backward(T*, T*, const T*, const T*, int64_t, int64_t);
FASTNN_INSTANTIATE(double)
FASTNN_INSTANTIATE(float)
FASTNN_INSTANTIATE(simd::bfloat16)
FASTNN_INSTANTIATE(simd::float16)
#undef FASTNN_INSTANTIATE

}  // namespace fastnn::cpu
