// Tiled matrix product with an epilogue. A tile of the output keeps its sums in registers: at each
// step along the depth, the left operand's value for each row is broadcast and multiplied by a row
// of the right operand's panel. Packing into panels transposes and converts the operands; a left
// operand that needs neither is read in place.
#pragma once

#include <algorithm>

#include "cpu/simd/dot_gemm.h"
#include "cpu/simd/gemm_epilogue.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/narrow_gemm.h"
#include "cpu/simd/vec.h"

namespace fastnn::simd::FASTNN_SIMD_TARGET {

// A tile has at most kTileRows rows of kTileVecs vectors: its sums, a row of the panel and a
// broadcast value fill the 16 vector registers, or AVX-512's 32.
constexpr int64_t kTileRows = kVectorBytes == 64 ? 8 : 6;
constexpr int64_t kTileVecs = kVectorBytes == 64 ? 3 : 2;
template <typename A>
constexpr int64_t kTileCols = kTileVecs * kLanes<A>;

// The depth is split into blocks of at most this size: a panel of the right operand then stays in
// the L1 cache, and a sum's rounding errors grow with the block, not with the depth. Partial sums
// are kept in the output or in scratch memory. A multiple of every vector's lanes.
constexpr int64_t kGemmDepth = kVectorBytes == 64 ? 208 : 200;
static_assert(kGemmDepth % kLanes<float> == 0 && kGemmDepth % kLanes<double> == 0);

// The number of panels of the right operand that are packed at once. With fewer, the pages of its
// rows would be visited more often; more would evict the left operand from the cache.
constexpr int64_t kGroup = 8;

// ---- ranges ----

// A range in the fewest parts of at most `most`, but at least one. Parts are as equal as possible
// and, except for the last, multiples of `unit`. They are counted in whole units, so that none
// exceeds `most`: scratch memory has no room for more.
struct Split {
  Range all;
  int64_t unit;
  int64_t parts;
  int64_t units_each;
  int64_t longer;  // the number of parts with one more unit

  Split(Range all, int64_t most, int64_t unit) : all(all), unit(unit) {
    const int64_t units = ceil_div(size(all), unit), most_units = most / unit;
    parts = std::max<int64_t>(1, ceil_div(units, most_units));
    units_each = units / parts;
    longer = units % parts;
  }
  Range operator[](int64_t i) const {
    return {start(i), start(i + 1)};
  }
  int64_t start(int64_t i) const {
    return std::min(all.end, all.begin + (i * units_each + std::min(i, longer)) * unit);
  }
};

// ---- tiles ----

// sums = a @ b, or sums += a @ b, with a's element (r, p) at a[r * a_row + p * a_step].
template <typename A>
struct GemmTile {
  const A* a;
  int64_t a_row;
  int64_t a_step;
  const A* b;
  int64_t b_step;
  int64_t depth;
  A* sums;
  int64_t stride;
  bool add;
};

template <typename A, int64_t Rows, int64_t Vecs>
FASTNN_KERNEL void multiply_tile(const GemmTile<A>& tile) {
  const auto [a_begin, a_row, a_step, b_begin, b_step, depth, to, stride, add] = tile;
  vec<A> sums[Rows][Vecs] = {};
  const A* a = a_begin;
  const A* b = b_begin;
  for (int64_t p = 0; p < depth; ++p) {
    vec<A> row[Vecs];
#pragma GCC unroll 8
    for (int64_t v = 0; v < Vecs; ++v) row[v] = load(b + v * kLanes<A>);
#pragma GCC unroll 8
    for (int64_t r = 0; r < Rows; ++r) {
      const vec<A> value = broadcast(a[r * a_row]);
#pragma GCC unroll 8
      for (int64_t v = 0; v < Vecs; ++v) sums[r][v] += value * row[v];
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < Vecs; ++v) {
      A* at = to + r * stride + v * kLanes<A>;
      store(at, add ? load(at) + sums[r][v] : sums[r][v]);
    }
  }
}

template <typename A>
struct TileFunctions {
  void (*of[kTileRows][kTileVecs])(const GemmTile<A>&);
};

template <typename A, size_t... I>
constexpr TileFunctions<A> tile_functions(std::index_sequence<I...>) {
  TileFunctions<A> table{};
  ((table.of[I / kTileVecs][I % kTileVecs] =
        multiply_tile<A, I / kTileVecs + 1, I % kTileVecs + 1>),
   ...);
  return table;
}

template <typename A>
constexpr TileFunctions<A> kTileFunctions =
    tile_functions<A>(std::make_index_sequence<kTileRows * kTileVecs>());

// ---- packing ----

// An operand as lines: the left one's rows or the right one's columns. Element p of line l is
// data[p * stride + l] if `by_depth`, data[l * stride + p] otherwise.
template <typename T>
struct Operand {
  const T* data;
  int64_t stride;
  bool by_depth;
  int64_t lines;
  const T* end;  // past the last element
};

template <typename T>
inline Operand<T> operand(const Matrix<T>& matrix, bool by_depth, int64_t lines, int64_t depth) {
  const int64_t rows = by_depth ? depth : lines, cols = by_depth ? lines : depth;
  const int64_t extent = rows == 0 || cols == 0 ? 0 : (rows - 1) * matrix.stride + cols;
  return {matrix.data, matrix.stride, by_depth, lines, matrix.data + extent};
}

// A panel holds a tile's lines: for each depth, their elements one after the other. It has room to
// spare because whole vectors and squares of vectors are written.
template <typename A>
constexpr int64_t panel_size(int64_t lines, int64_t depth) {
  return lines * depth + (lines + 1) * kLanes<A>;
}

// Copies Vecs vectors of each of `rows` rows, `stride` apart, to rows `to_stride` apart, reading
// nothing past `end`.
template <int64_t Vecs, typename T>
inline void copy_rows(accum<T>* to, int64_t to_stride, const T* from, int64_t stride, int64_t rows,
                      const T* end) {
  constexpr int64_t lanes = kLanes<accum<T>>;
  const auto copy = [&](auto load_vector) {
#pragma GCC unroll 1
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < Vecs; ++v) store(to + v * lanes, load_vector(from + v * lanes));
      from += stride;
      to += to_stride;
    }
  };
  if ((rows - 1) * stride + Vecs * lanes <= end - from) {
    copy([](const T* at) { return load(at); });
  } else {
    copy([&](const T* at) { return load_up_to(at, std::min(lanes, end - at)); });
  }
}

// The same, transposed: one vector of depths from `rows` lines, or from as many as fit a vector.
template <typename T>
inline void copy_square(accum<T>* to, int64_t to_stride, const T* from, int64_t stride,
                        int64_t rows, const T* end) {
  using A = accum<T>;
  constexpr int64_t lanes = kLanes<A>;
  vec<A> square[lanes];
  if (rows >= lanes && (lanes - 1) * stride + lanes <= end - from) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes; ++i) square[i] = load(from + i * stride);
  } else {
#pragma GCC unroll 1
    for (int64_t i = 0; i < lanes; ++i) {
      const T* row = from + std::min(i, rows - 1) * stride;  // any readable memory
      square[i] = load_up_to(row, std::min(lanes, end - row));
    }
  }
  transpose<A>(square);
#pragma GCC unroll 16
  for (int64_t i = 0; i < lanes; ++i) store(to + i * to_stride, square[i]);
}

// Copy the given lines and depths to a panel. Whole vectors write past a row of the panel into the
// next one; copying from the last column to the first overwrites that.
template <typename T>
inline void pack_rows(const Operand<T>& from, Range lines, Range depths, accum<T>* panel) {
  using A = accum<T>;
  const int64_t width = size(lines);
  const T* first = from.data + depths.begin * from.stride + lines.begin;
  if (width == kTileCols<A>) {
    copy_rows<kTileVecs>(panel, width, first, from.stride, size(depths), from.end);
    return;
  }
  for (int64_t c = (width - 1) / kLanes<A> * kLanes<A>; c >= 0; c -= kLanes<A>) {
    copy_rows<1>(panel + c, width, first + c, from.stride, size(depths), from.end);
  }
}

template <typename T>
inline void pack_transposed(const Operand<T>& from, Range lines, Range depths, accum<T>* panel) {
  constexpr int64_t lanes = kLanes<accum<T>>;
  const int64_t width = size(lines);
  for (int64_t p = depths.begin; p < depths.end; p += lanes) {
    for (int64_t c = (width - 1) / lanes * lanes; c >= 0; c -= lanes) {
      const int64_t line = lines.begin + c;
      copy_square(panel + c, width, from.data + line * from.stride + p, from.stride,
                  from.lines - line, from.end);
    }
    panel += lanes * width;
  }
}

// Packs the panels of `split` in the range `parts`, `stride` apart.
template <typename T>
inline void pack(const Operand<T>& from, const Split& split, Range parts, Range depths,
                 accum<T>* to, int64_t stride) {
  // An operand by depth is read a few rows at a time for all panels, as its rows can lie on more
  // pages than the TLB covers; the lines of the other kind are read in one go.
  const int64_t step = from.by_depth ? 16 : std::max<int64_t>(1, size(depths));
  for (int64_t p = depths.begin; p < depths.end; p += step) {
    for (int64_t i = parts.begin; i < parts.end; ++i) {
      const Range lines = split[i];
      const Range rows = {p, std::min(p + step, depths.end)};
      accum<T>* panel = to + (i - parts.begin) * stride + (p - depths.begin) * size(lines);
      from.by_depth ? pack_rows(from, lines, rows, panel)
                    : pack_transposed(from, lines, rows, panel);
    }
  }
}

// ---- blocks ----

template <typename T, typename A = accum<T>>
struct GemmScratch {
  A left[(kGemmRows / kTileRows + 1) * panel_size<A>(kTileRows, kGemmDepth)];
  A right[kGroup * panel_size<A>(kTileCols<A>, kGemmDepth)];
  // The sums of every tile, or only of those at the right edge, where whole vectors don't fit into
  // the output.
  A sums[kGemmRows * (kIsWide<T> ? kTileCols<A> : kGemmCols)];
};

// A block's left operand, as tiles read it: panels, or rows in place.
template <typename A>
struct Left {
  const A* data;
  int64_t stride;  // from panel to panel, or from row to row
  bool in_place;
};

template <typename T, typename Right, typename A = accum<T>>
inline Left<A> prepare_left(const Gemm<T, Right>& g, const Split& rows, Range depths, A* scratch) {
  if constexpr (kIsWide<T>) {
    if (!g.a.transposed && g.depth != 0) {  // with depth 0 there is no memory to point to
      return {g.a.data + rows.all.begin * g.a.stride + depths.begin, g.a.stride, true};
    }
  }
  const int64_t stride = panel_size<A>(kTileRows, size(depths));
  pack(operand(g.a, g.a.transposed, g.rows, g.depth), rows, {0, rows.parts}, depths, scratch,
       stride);
  return {scratch, stride, false};
}

// One block of the depth, with the data that its tiles share.
template <typename T, typename Right, typename A = accum<T>>
struct BlockDepths {
  const Gemm<T, Right>& g;
  const Split& rows;
  Left<A> left;
  int64_t depth;
  bool first;
  bool last;
};

// Computes the tile of these rows and one panel of the right operand. `scratch` has room for the
// sums of the panel's columns in all rows.
template <typename T, typename Right, typename A = accum<T>>
inline void multiply_panel(const BlockDepths<T, Right>& of, int64_t row_part, Range cols,
                           const A* panel, A* scratch) {
  const Gemm<T, Right>& g = of.g;
  const Range rows = of.rows[row_part];
  const int64_t row = rows.begin - of.rows.all.begin, vecs = ceil_div(size(cols), kLanes<A>);
  // A gradient that is consumed at once needs no memory in the output.
  const bool is_used_up = g.step && of.first && of.last;
  const bool sums_in_place = kIsWide<T> && size(cols) == vecs * kLanes<A> && !is_used_up;
  GemmTile<A> tile{.a = of.left.data + of.left.stride * (of.left.in_place ? row : row_part),
                   .a_row = of.left.in_place ? of.left.stride : 1,
                   .a_step = of.left.in_place ? 1 : size(rows),
                   .b = panel,
                   .b_step = size(cols),
                   .depth = of.depth,
                   .sums = scratch + row * vecs * kLanes<A>,
                   .stride = vecs * kLanes<A>,
                   .add = !of.first};
  if constexpr (kIsWide<T>) {
    if (sums_in_place) {
      tile.sums = g.out + rows.begin * g.cols + cols.begin;
      tile.stride = g.cols;
      tile.add |= g.add;
    }
  }
  kTileFunctions<A>.of[size(rows) - 1][vecs - 1](tile);
  const bool finish = of.last && (!sums_in_place || g.bias || g.relu || g.mask || g.step);
  if (finish) finish_tile(g, rows, cols, tile.sums, tile.stride);
}

// The panels of the right operand that are packed together, `stride` apart.
template <typename A>
struct Panels {
  const Split& cols;
  Range parts;
  const A* data;
  int64_t stride;

  const A* at(int64_t part) const {
    return data + (part - parts.begin) * stride;
  }
};

// Panel by panel: each stays in the L1 cache.
template <typename T, typename Right, typename A = accum<T>>
inline void multiply_panels(const BlockDepths<T, Right>& of, const Panels<A>& panels, A* scratch) {
  for (int64_t j = panels.parts.begin; j < panels.parts.end; ++j) {
    const Range cols = panels.cols[j];
    // Narrow outputs keep the sums of every tile; wide ones only those of one panel at a time.
    A* const sums =
        kIsWide<T> ? scratch : scratch + (cols.begin - panels.cols.all.begin) * size(of.rows.all);
    for (int64_t i = 0; i < of.rows.parts; ++i) multiply_panel(of, i, cols, panels.at(j), sums);
  }
}

// One row of tiles after the other, for a gradient that is consumed at once: the parameter is then
// read in longer runs of memory and prefetched a tile ahead.
template <typename T, typename Right, typename A = accum<T>>
inline void step_panels(const BlockDepths<T, Right>& of, const Panels<A>& panels, A* scratch) {
  const auto [begin, end] = panels.parts;
  for (int64_t i = 0; i < of.rows.parts; ++i) {
    for (int64_t j = begin; j < end; ++j) {
      const bool ends_row = j + 1 == end;
      if (!ends_row) prefetch_step(of.g, of.rows[i], panels.cols[j + 1]);
      if (ends_row && i + 1 < of.rows.parts) {
        prefetch_step(of.g, of.rows[i + 1], panels.cols[begin]);
      }
      multiply_panel(of, i, panels.cols[j], panels.at(j), scratch);
    }
  }
}

template <typename T, typename Right>
inline void tiled_gemm(const Gemm<T, Right>& g, const GemmBlock& block, void* memory) {
  using A = accum<T>;
  auto& scratch = *static_cast<GemmScratch<T>*>(memory);
  const Split rows(block.rows, kTileRows, 1);
  const Split cols(block.cols, kTileCols<A>, kLanes<A>);
  const Split blocks({0, g.depth}, kGemmDepth, kLanes<A>);
  const Operand<Right> right = operand(g.b, !g.b.transposed, g.cols, g.depth);
  for (int64_t d = 0; d < blocks.parts; ++d) {
    const Range depths = blocks[d];
    const BlockDepths<T, Right> of{.g = g,
                                   .rows = rows,
                                   .left = prepare_left(g, rows, depths, scratch.left),
                                   .depth = size(depths),
                                   .first = d == 0,
                                   .last = d + 1 == blocks.parts};
    const int64_t stride = panel_size<A>(kTileCols<A>, size(depths));
    for (int64_t group = 0; group < cols.parts; group += kGroup) {
      const Panels<A> panels{.cols = cols,
                             .parts = {group, std::min(group + kGroup, cols.parts)},
                             .data = scratch.right,
                             .stride = stride};
      pack(right, cols, panels.parts, depths, scratch.right, stride);
      g.step&& blocks.parts == 1 ? step_panels(of, panels, scratch.sums)
                                 : multiply_panels(of, panels, scratch.sums);
    }
  }
}

template <typename T>
bool gemm_packs(const Gemm<T>& g) {
  return !is_of_dot_products(g) && !is_narrow(g);
}

template <typename T, typename Right = T>
FASTNN_KERNEL void gemm(const Gemm<T, Right>& g, const GemmBlock& block, void* memory) {
  if constexpr (std::is_same_v<T, Right>) {
    if (is_of_dot_products(g)) return dot_gemm(g, block);
    if (is_narrow(g)) return narrow_gemm(g, block);
  }
  tiled_gemm(g, block, memory);
}

template <typename T>
constexpr int64_t kGemmScratchBytes = sizeof(GemmScratch<T>);

}  // namespace fastnn::simd::FASTNN_SIMD_TARGET
