// Kernels over the rows (of classes) of a tensor, written once for all operators.
// What bounds them: docs/performance.md, "Bounds of the CUDA kernels".
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/integers.cuh"
#include "cuda/rows/operator.cuh"
#include "cuda/rows/plan.h"
#include "cuda/rows/reduce.cuh"
#include "cuda/vec.cuh"

namespace fastnn::cuda {

// Blocks per multiprocessor that the kernels leave registers for: 64 to 80 per thread, or 128 for
// float64. By itself the compiler takes fewer, and spills some.
template <typename T>
inline constexpr int kRowBlocks = sizeof(T) == 8 ? 1 : 2;
// The most threads of a block per row: for four bytes and less they take all the registers that two
// blocks of half as many would.
template <typename T>
inline constexpr int kMaxTeamThreads = sizeof(T) == 8 ? kMaxRowThreads : kMaxCachedRowThreads;
template <typename T>
inline constexpr int kSplitBlocks = sizeof(T) == 8 ? 2 : 3;
template <typename T>
inline constexpr int kWarpBlocks = sizeof(T) == 8 ? 4 : 6;
template <typename T>
inline constexpr int kSubwarpBlocks = sizeof(T) == 8 ? 4 : 6;

// Operands of the rows' layout; unused ones are null.
template <typename T, typename Out = T>
struct Tensors {
  const T* in[2];
  Out* out;

  __device__ Tensors operator+(int64_t offset) const {
    return {{in[0] ? in[0] + offset : nullptr, in[1] ? in[1] + offset : nullptr},
            out ? out + offset : nullptr};
  }
};
template <typename Op>
using TensorsOf = Tensors<typename Op::T, OutputOf<Op>>;

// Each block's sums go to memory, where finish_loss_kernel adds them up, unless there is one block.
template <typename Op>
__device__ void store_sums(const Op& op, const LossSums& sums, LossSums* of_block) {
  if constexpr (Op::kSums) {
    const LossSums total = reduce_block(sums);
    if (threadIdx.x != 0) return;
    if (gridDim.x == 1) {
      op.conclude(total);
    } else {
      of_block[blockIdx.x] = total;
    }
  }
}

// ---- a contiguous row ----

// The threads that share a row (or a slice of one).
struct Team {
  unsigned rank;
  unsigned size;
};

// Whether each operand's vectors are at a 16-byte boundary wherever the first operand's are.
struct Aligned {
  bool in[2];
  bool out;

  template <int kInputs, typename T, typename Out>
  __device__ static Aligned of(const Tensors<T, Out>& at) {
    if constexpr (kInputs == 0) return {{true, true}, true};
    return {{true, kInputs < 2 || co_aligned(at.in[0], at.in[1])},
            co_aligned(at.in[0], static_cast<const Out*>(at.out))};
  }
  __device__ bool all() const {
    return in[1] && out;
  }
};

// Whether a vector of the first operand is stored in `cache` or loaded from it. The same thread
// does both, so no barrier is needed.
enum class Cache { None, Store, Load };

template <Cache kCache, typename T>
__device__ Vec<T> load_first(const T* p, Vec<T>* cache) {
  if (kCache == Cache::Load && cache) return *cache;
  return load_vec(p, /*aligned=*/true);
}

// Calls f(classes, x, place) for all classes of a contiguous row, with the operands' elements
// x[operand][j]; place(results) stores as many results. kCopies: also copies the first operand.
template <int kInputs, int kVectors, Cache kCache, bool kCopies, typename T, typename Out,
          typename F>
__device__ void for_each_class(const Tensors<T, Out>& at, int64_t first_class, const Peel& peel,
                               const Team& team, std::type_identity_t<Vec<T>>* cache, F f) {
  using A = accum<T>;
  constexpr int kOperands = kInputs == 0 ? 1 : kInputs;
  const Aligned aligned = Aligned::of<kInputs>(at);

  // Vectors v, v + team.size, ..., kCount of them: all are loaded before the first is used.
  const auto vecs = [&]<int kCount>(unsigned v, const Aligned& are) {
    const auto each = [&](auto use) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        const unsigned i = v + u * team.size;
        use(u, i, peel.vec(i));
      }
    };
    Vec<T> raw[kOperands][kCount];
    each([&](int u, unsigned i, int64_t c) {
      if constexpr (kInputs > 0)
        raw[0][u] = load_first<kCache>(at.in[0] + c, cache ? cache + i : nullptr);
      if constexpr (kInputs > 1) raw[1][u] = load_vec(at.in[1] + c, are.in[1]);
    });
    if constexpr (kCache == Cache::Store) {
      if (cache) each([&](int u, unsigned i, int64_t) { cache[i] = raw[0][u]; });
    }
    each([&](int u, unsigned, int64_t c) {
      if constexpr (kCopies) store_vec(at.out + c, are.out, raw[0][u]);
      A x[kOperands][kVecSize<T>];
#pragma unroll
      for (int k = 0; k < kInputs; ++k) to_accum(raw[k][u], x[k]);
      f(Classes{first_class + c, 1}, x, [&](const A(&results)[kVecSize<T>]) {
        store_vec(at.out + c, are.out, from_accum<Out>(results));
      });
    });
  };
  if (aligned.all()) {
    constexpr Aligned kAligned{{true, true}, true};
    constexpr int kCount = kVectors / kOperands;
    const auto there_are = [&](int n, unsigned v) { return v + (n - 1) * team.size < peel.vecs; };
    unsigned v = team.rank;
    for (; there_are(kCount, v); v += kCount * team.size)
      vecs.template operator()<kCount>(v, kAligned);
    // The rest are loaded at once too: one by one, each would wait for memory.
    if (kCount > 3 && there_are(3, v)) {
      vecs.template operator()<3>(v, kAligned);
    } else if (kCount > 2 && there_are(2, v)) {
      vecs.template operator()<2>(v, kAligned);
    } else if (there_are(1, v)) {
      vecs.template operator()<1>(v, kAligned);
    }
  } else {
    for (unsigned v = team.rank; v < peel.vecs; v += team.size) {
      vecs.template operator()<1>(v, aligned);
    }
  }

  for (unsigned i = team.rank; i < peel.singles(); i += team.size) {
    const int64_t c = peel.single(i);
    A x[kOperands][1];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) x[k][0] = to_accum(at.in[k][c]);
    if constexpr (kCopies) at.out[c] = at.in[0][c];
    f(Classes{first_class + c, 1}, x, [&](const A(&results)[1]) { at.out[c] = Out(results[0]); });
  }
}

// The output of a row that is skipped: its operands, which may be NaN, aren't read.
struct PlaceZeros {
  template <typename A, int N, typename Place>
  __device__ void operator()(Classes, const A (&)[1][N], const Place& place) const {
    const A zeros[N] = {};
    place(zeros);
  }
};

// The state of the classes [first_class, first_class + n) that this thread reads, and a copy.
template <typename Op, typename T>
__device__ auto reduce_part(const Op& op, const typename Op::Row& row, const TensorsOf<Op>& at,
                            int64_t first_class, int64_t n, const Team& team, Vec<T>* cache) {
  auto state = Op::State::none();
  if constexpr (Op::kReduceInputs > 0) {
    const Peel peel = Peel::of(at.in[0], n);
    for_each_class<Op::kReduceInputs, Op::kVectors, Cache::Store, Op::kCopies>(
        at, first_class, peel, team, cache,
        [&](Classes classes, const auto& x, const auto&) { op.reduce(state, row, classes, x); });
  }
  return state;
}

template <typename Op, typename T>
__device__ void map_part(const Op& op, const typename Op::Row& row, const TensorsOf<Op>& at,
                         int64_t first_class, int64_t n, const Team& team, Vec<T>* cache) {
  if constexpr (Op::kMaps) {
    using Out = OutputOf<Op>;
    const Out* out = at.out;
    if (op.skips(row)) {
      const Tensors<Out> alone{{nullptr, nullptr}, at.out};
      for_each_class<0, Op::kVectors, Cache::None, false>(alone, first_class, Peel::of(out, n),
                                                          team, nullptr, PlaceZeros());
      return;
    }
    const Peel peel = Op::kMapInputs > 0 ? Peel::of(at.in[0], n) : Peel::of(out, n);
    for_each_class<Op::kMapInputs, Op::kVectors, Cache::Load, false>(
        at, first_class, peel, team, cache,
        [&]<typename A, int K, int N>(Classes classes, const A(&x)[K][N], const auto& place) {
          A results[N];
          op.map(row, classes, x, results);
          place(results);
        });
  }
}

// A warp or a block per row. `cached` says whether each team has dynamic shared memory for a row of
// the first operand.
template <typename Op, bool kWarp>
__global__ void __launch_bounds__(kWarp ? kWarpThreads : kMaxTeamThreads<typename Op::T>,
                                  kWarp ? kWarpBlocks<typename Op::T> : 1)
    team_rows_kernel(Op op, TensorsOf<Op> tensors, int64_t rows, int64_t classes, bool cached,
                     LossSums* sums_of_block) {
  using T = typename Op::T;
  FASTNN_DYNAMIC_SHARED(Vec<T>, caches);
  if (op.is_done()) return;
  op.start();
  const int warp = int(threadIdx.x) / 32;
  const int64_t teams = kWarp ? kWarpTeams : 1;
  const int64_t team_index = kWarp ? warp : 0;
  const Team team{kWarp ? threadIdx.x % 32 : threadIdx.x, kWarp ? 32u : blockDim.x};
  Vec<T>* cache = kRereads<Op> && cached
                      ? caches + team_index * ceil_div<int64_t>(classes, kVecSize<T>)
                      : nullptr;

  LossSums sums = LossSums::none();
  for (int64_t row = blockIdx.x * teams + team_index; row < rows; row += gridDim.x * teams) {
    const TensorsOf<Op> at = tensors + row * classes;
    typename Op::Row known{};
    op.begin(known, row);
    if constexpr (Op::kReduceInputs > 0) {
      auto state = reduce_part(op, known, at, 0, classes, team, cache);
      if (team.rank == 0) op.read_ahead(known, row);
      state = kWarp ? reduce_lanes(state, 32) : reduce_block(state);
      op.finish(known, state, row);
    }
    if (team.rank == 0) op.report(known, row, sums);
    map_part(op, known, at, 0, classes, team, cache);
  }
  store_sums(op, sums, sums_of_block);
}

// ---- several blocks per row ----

// Block b reduces slice b % slices of row b / slices and stores its state.
template <typename Op>
__global__ void __launch_bounds__(kMaxSplitThreads, kSplitBlocks<typename Op::T>)
    split_reduce_kernel(Op op, TensorsOf<Op> tensors, int64_t rows, int64_t classes, int64_t slices,
                        int64_t slice_size, typename Op::State* states) {
  const Team team{threadIdx.x, blockDim.x};
  for (int64_t i = blockIdx.x; i < rows * slices; i += gridDim.x) {
    const int64_t row = i / slices, first = i % slices * slice_size;
    const int64_t n = min_of(classes - first, slice_size);
    const auto at = tensors + (row * classes + first);
    typename Op::Row known{};
    op.begin(known, row);
    const auto state =
        reduce_block(reduce_part<Op, typename Op::T>(op, known, at, first, n, team, nullptr));
    if (threadIdx.x == 0) states[i] = state;
  }
}

// Each warp merges the row's states for itself, in the same order; then the block writes its slice.
// An operator without an output has one warp per row instead.
template <typename Op>
__global__ void __launch_bounds__(kMaxSplitThreads, kSplitBlocks<typename Op::T>)
    split_finish_kernel(Op op, TensorsOf<Op> tensors, int64_t rows, int64_t classes, int64_t slices,
                        int64_t slice_size, const typename Op::State* states,
                        LossSums* sums_of_block) {
  if (op.is_done()) return;
  op.start();
  const Team team{threadIdx.x, blockDim.x};
  const int64_t blocks_per_row = Op::kMaps ? slices : 1;
  LossSums sums = LossSums::none();
  for (int64_t i = blockIdx.x; i < rows * blocks_per_row; i += gridDim.x) {
    const int64_t row = i / blocks_per_row, slice = i % blocks_per_row;
    typename Op::Row known{};
    op.begin(known, row);
    if constexpr (Op::kReduceInputs > 0) {
      if (slice == 0 && threadIdx.x == 0) op.read_ahead(known, row);
      auto state = Op::State::none();
      for (int64_t s = threadIdx.x % 32; s < slices; s += 32) state.merge(states[row * slices + s]);
      op.finish(known, reduce_lanes(state, 32), row);
    }
    if (slice == 0 && threadIdx.x == 0) op.report(known, row, sums);
    const int64_t first = slice * slice_size;
    const int64_t n = min_of(classes - first, slice_size);
    map_part<Op, typename Op::T>(op, known, tensors + (row * classes + first), first, n, team,
                                 nullptr);
  }
  store_sums(op, sums, sums_of_block);
}

// ---- several rows per warp ----

// What results replace operands in.
template <typename Op>
using TileOf = std::conditional_t<(sizeof(OutputOf<Op>) > sizeof(typename Op::T)), OutputOf<Op>,
                                  typename Op::T>;

// A tile is a run of whole rows in shared memory, as far past a 16-byte boundary as it is in global
// memory. Global memory is read and written in vectors whatever the rows' alignment, except for the
// few elements at the tile's ends.
template <typename T, typename Tile>
__device__ Tile* load_tile(const T* from, int64_t n, Tile* memory) {
  const Peel peel = Peel::of(from, n);
  Tile* tile = memory + elements_past_boundary(from);
  for (int64_t v = threadIdx.x; v < peel.vecs; v += blockDim.x) {
    const int64_t i = peel.vec(v);
    *reinterpret_cast<Vec<Tile>*>(tile + i) = converted<Tile>(load_vec(from + i, /*aligned=*/true));
  }
  for (int64_t s = threadIdx.x; s < peel.singles(); s += blockDim.x) {
    tile[peel.single(s)] = Tile(from[peel.single(s)]);
  }
  return tile;
}

template <typename T, typename Out>
__device__ void store_tile(Out* to, int64_t n, const T* tile) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) to[i] = Out(tile[i]);
}

template <typename T>
__device__ void store_tile(T* to, int64_t n, const T* tile) {
  const Peel peel = Peel::of(static_cast<const T*>(to), n);
  const bool aligned = co_aligned(tile, static_cast<const T*>(to));
  for (int64_t v = threadIdx.x; v < peel.vecs; v += blockDim.x) {
    const int64_t i = peel.vec(v);
    *reinterpret_cast<Vec<T>*>(to + i) = load_vec(tile + i, aligned);
  }
  for (int64_t s = threadIdx.x; s < peel.singles(); s += blockDim.x) {
    to[peel.single(s)] = tile[peel.single(s)];
  }
}

// Calls f(classes, x, place) for a lane's classes of a row in shared memory: every lanes-th one, so
// that neighbouring lanes read neighbouring words. Results replace the first operand's elements,
// which no other lane reads.
template <int kInputs, typename T, typename F>
__device__ void for_each_class_in_tile(T* const (&row)[2], int64_t classes, int lane, int lanes,
                                       F f) {
  using A = accum<T>;
  constexpr int kOperands = kInputs == 0 ? 1 : kInputs;
  const auto several = [&]<int kCount>(std::integral_constant<int, kCount>, int64_t c) {
    A x[kOperands][kCount];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[k][j] = to_accum(row[k][c + j * lanes]);
    }
    f(Classes{c, lanes}, x, [&](const A(&results)[kCount]) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) row[0][c + j * lanes] = T(results[j]);
    });
  };
  int64_t c = lane;
  for (; c + 3 * lanes < classes; c += 4 * lanes) several(std::integral_constant<int, 4>(), c);
  for (; c < classes; c += lanes) several(std::integral_constant<int, 1>(), c);
}

// 2^k lanes per row. Dynamic shared memory holds `tile_rows` rows of each operand, or of the output
// if there is none.
template <typename Op>
__global__ void __launch_bounds__(kSubwarpThreads, kSubwarpBlocks<typename Op::T>)
    subwarp_rows_kernel(Op op, TensorsOf<Op> tensors, int64_t rows, int64_t classes, int lanes,
                        int64_t tile_rows, LossSums* sums_of_block) {
  using T = typename Op::T;
  using Tile = TileOf<Op>;
  FASTNN_DYNAMIC_SHARED(Vec<Tile>, shared);
  if (op.is_done()) return;
  op.start();
  constexpr int kInputs = Op::kMapInputs > Op::kReduceInputs ? Op::kMapInputs : Op::kReduceInputs;
  Tile* const memory = reinterpret_cast<Tile*>(shared);
  const int64_t tile_stride =
      (ceil_div<int64_t>(tile_rows * classes, kVecSize<T>) + 1) * kVecSize<T>;
  const int lane = int(threadIdx.x) & (lanes - 1);
  const int64_t team = int(threadIdx.x) / lanes, teams = kSubwarpThreads / lanes;

  LossSums sums = LossSums::none();
  for (int64_t first = blockIdx.x * tile_rows; first < rows; first += gridDim.x * tile_rows) {
    const int64_t count = min_of(rows - first, tile_rows);
    const int64_t n = count * classes;
    const TensorsOf<Op> at = tensors + first * classes;
    Tile* tiles[2] = {nullptr, nullptr};
    if constexpr (kInputs == 0) tiles[0] = memory + elements_past_boundary(at.out);
#pragma unroll
    for (int k = 0; k < kInputs; ++k) tiles[k] = load_tile(at.in[k], n, memory + k * tile_stride);
    __syncthreads();  // rows are read by other threads than those that loaded them

    for (int64_t r = team; r < count; r += teams) {
      Tile* const row[2] = {tiles[0] + r * classes, tiles[1] + (kInputs > 1 ? r * classes : 0)};
      typename Op::Row known{};
      op.begin(known, first + r);
      if constexpr (Op::kReduceInputs > 0) {
        auto state = Op::State::none();
        for_each_class_in_tile<Op::kReduceInputs>(
            row, classes, lane, lanes,
            [&](Classes c, const auto& x, const auto&) { op.reduce(state, known, c, x); });
        if (lane == 0) op.read_ahead(known, first + r);
        op.finish(known, reduce_lanes(state, lanes), first + r);
      }
      if (lane == 0) op.report(known, first + r, sums);
      if constexpr (Op::kMaps) {
        const bool skips = op.skips(known);
        for_each_class_in_tile<Op::kMapInputs>(
            row, classes, lane, lanes,
            [&]<typename A, int K, int N>(Classes c, const A(&x)[K][N], const auto& place) {
              A results[N] = {};
              if (!skips) op.map(known, c, x, results);
              place(results);
            });
      }
    }
    __syncthreads();  // all results are there, and no thread reads what the next tile replaces
    if constexpr (Op::kMaps || Op::kCopies) {
      store_tile(tensors.out + first * classes, n, tiles[0]);
      __syncthreads();  // before the next tile replaces results that another thread stores
    }
  }
  store_sums(op, sums, sums_of_block);
}

// ---- rows whose classes aren't contiguous ----

// Classes that a thread takes at a time, so that their loads are in flight together: equal
// registers per dtype. The same in both passes, as a sum over other groups of classes would round
// differently.
template <typename Op>
inline constexpr int kClassesAtOnce = 8 * Op::kVectors / int(sizeof(accum<typename Op::T>)) /
                                      std::max({1, Op::kReduceInputs, Op::kMapInputs});

// Calls f(classes, x, place) for classes [begin, end) of a row whose classes are `inner` apart.
template <int kInputs, int kUnroll, bool kCopies, typename T, typename Out, typename F>
__device__ void for_each_class_apart(const Tensors<T, Out>& at, int64_t inner, int64_t begin,
                                     int64_t end, F f) {
  using A = accum<T>;
  constexpr int kOperands = kInputs == 0 ? 1 : kInputs;
  const auto several = [&]<int kCount>(std::integral_constant<int, kCount>, int64_t c) {
    A x[kOperands][kCount];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[k][j] = to_accum(at.in[k][(c + j) * inner]);
    }
    if constexpr (kCopies) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) at.out[(c + j) * inner] = T(x[0][j]);
    }
    f(Classes{c, 1}, x, [&](const A(&results)[kCount]) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) at.out[(c + j) * inner] = Out(results[j]);
    });
  };
  int64_t c = begin;
  for (; c + kUnroll <= end; c += kUnroll) several(std::integral_constant<int, kUnroll>(), c);
  for (; c < end; ++c) several(std::integral_constant<int, 1>(), c);
}

// A thread per row, or one for each of the `slices` of its classes. Neighbouring threads have
// neighbouring rows, whose elements of one class are neighbours (except where an inner run ends).
template <typename Op>
__global__ void __launch_bounds__(kMaxRowThreads, kRowBlocks<typename Op::T>)
    strided_rows_kernel(Op op, TensorsOf<Op> tensors, int64_t rows, int64_t classes, int64_t inner,
                        int slices, int64_t slice_size, LossSums* sums_of_block) {
  using State = typename Op::State;
  constexpr int kUnroll = kClassesAtOnce<Op>;
  FASTNN_DYNAMIC_SHARED(State, states);
  if (op.is_done()) return;
  op.start();
  const int rows_at_once = int(blockDim.x) / slices;
  const int column = int(threadIdx.x) % rows_at_once;
  const int slice = int(threadIdx.x) / rows_at_once;
  const int64_t begin = min_of(slice * slice_size, classes);
  const int64_t end = min_of(classes, begin + slice_size);

  LossSums sums = LossSums::none();
  // All threads of the block iterate, with or without a row: there are barriers inside.
  for (int64_t base = int64_t(blockIdx.x) * rows_at_once; base < rows;
       base += int64_t(gridDim.x) * rows_at_once) {
    const int64_t row = base + column;
    const bool active = row < rows;
    const TensorsOf<Op> at = tensors + (active ? row / inner * classes * inner + row % inner : 0);
    typename Op::Row known{};
    if (active) op.begin(known, row);
    if constexpr (Op::kReduceInputs > 0) {
      State state = State::none();
      if (active) {
        for_each_class_apart<Op::kReduceInputs, kUnroll, Op::kCopies>(
            at, inner, begin, end,
            [&](Classes c, const auto& x, const auto&) { op.reduce(state, known, c, x); });
        if (slice == 0) op.read_ahead(known, row);
      }
      if (slices > 1) {
        states[threadIdx.x] = state;
        __syncthreads();
        // Each thread for itself, in the same order.
        state = states[column];
        for (int s = 1; s < slices; ++s) state.merge(states[s * rows_at_once + column]);
        __syncthreads();  // before the next rows' states replace these
      }
      if (active) op.finish(known, state, row);
    }
    if (!active) continue;
    if (slice == 0) op.report(known, row, sums);
    if constexpr (Op::kMaps) {
      if (op.skips(known)) {
        for_each_class_apart<0, kUnroll, false>(at, inner, begin, end, PlaceZeros());
        continue;
      }
      for_each_class_apart<Op::kMapInputs, kUnroll, false>(
          at, inner, begin, end,
          [&]<typename A, int K, int N>(Classes c, const A(&x)[K][N], const auto& place) {
            A results[N];
            op.map(known, c, x, results);
            place(results);
          });
    }
  }
  store_sums(op, sums, sums_of_block);
}

}  // namespace fastnn::cuda
