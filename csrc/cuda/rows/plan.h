// Chooses, on the host, how the rows of a tensor are mapped to threads.
// The reasons: docs/performance.md, "Bounds of the CUDA kernels".
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <variant>

#include "cuda/integers.cuh"
#include "ops/layout.h"

namespace fastnn::cuda {

enum class Path {
  Subwarp,  // 2^k lanes per row; a block holds a tile of rows in shared memory
  Warp,     // a warp per row
  Block,    // a block per row
  Split,    // several blocks per row, in two launches
  Strided,  // classes aren't contiguous: one or a few threads per row, neighbours on neighbours
};

// What the choice depends on besides the layout.
struct RowTraits {
  int64_t element_bytes;
  int64_t state_bytes;  // of a thread's state of its part of a row
  int tensors;          // operands of the input's layout that a tile holds
  bool maps;            // whether an output of that layout is written
  bool rereads;         // whether an operand is read twice, and worth keeping in shared memory
  bool has_threads_to_reread;  // whether it has the threads for that
  bool sums;                   // whether each block leaves a partial sum, which one block adds up
  // The most shared memory per block that the GPU grants on request. No result depends on it.
  int64_t device_shared_bytes = 48 * 1024;
};

// A plan for each path. Kernels loop over the rows in strides of the grid, which has `blocks`
// blocks; if the rows add to a loss, each block leaves a partial sum.
struct SubwarpPlan {
  int64_t blocks;
  int64_t tile_rows;     // rows in shared memory at once
  int64_t shared_bytes;  // for a tile of every operand
  int lanes;             // per row
};
struct WarpPlan {
  int64_t blocks;
  int64_t cache_bytes;  // shared memory for the first operand of a block's rows, or 0
};
struct BlockPlan {
  int64_t blocks;
  int64_t cache_bytes;  // the same for the block's row
  int threads;
};
struct SplitPlan {
  int64_t reduce_blocks;  // of the first launch
  int64_t blocks;         // of the second
  int64_t slices;         // blocks per row
  int64_t slice_size;     // classes per block
  int threads;
};
struct StridedPlan {
  int64_t blocks;
  int64_t shared_bytes;  // for the threads' states
  int64_t slice_size;    // classes per thread
  int slices;            // threads per row
  int rows_at_once;      // per block
};
using Plan = std::variant<SubwarpPlan, WarpPlan, BlockPlan, SplitPlan, StridedPlan>;

// The number of blocks that leave a partial sum, for an operator that sums.
inline int64_t summing_blocks(const Plan& plan) {
  return std::visit([](const auto& of_path) { return of_path.blocks; }, plan);
}

// The 48 KiB that every GPU grants a block without a request, less what the kernels declare for
// their reductions. A launch with more fails.
inline constexpr int64_t kReductionBytes = 2 * 1024;
inline constexpr int64_t kSharedBytes = 48 * 1024 - kReductionBytes;
// The longest row of which a multiprocessor's shared memory (228 KiB, less the overhead per block)
// holds two. The block of a longer row runs alone, with the threads of two.
inline constexpr int64_t kHalfOfSharedBytes = 112 * 1024 - kReductionBytes;
// The grid's limit; and the most blocks that leave partial sums: a few waves of a large GPU, and
// one number for all GPUs, so that a loss has the same bits on each.
inline constexpr int64_t kMaxBlocks = INT32_MAX;
inline constexpr int64_t kMaxSummingBlocks = 4096;
inline constexpr int kSubwarpThreads = 128;
inline constexpr int kWarpThreads = 128;
inline constexpr int kWarpTeams = kWarpThreads / 32;  // warps, and rows at once, per block
inline constexpr int kMaxRowThreads = 512;            // Block, Strided
inline constexpr int kMaxCachedRowThreads = 1024;     // Block, if it runs alone
inline constexpr int kMaxSplitThreads = 256;

inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return std::max(low, std::min(value, high));
}

// The smallest power of two that is at least n.
inline int64_t power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

inline Path choose_path(const Layout& layout, int64_t element_bytes) {
  if (layout.inner != 1) return Path::Strided;
  const int64_t row_bytes = layout.classes * element_bytes;
  if (layout.classes <= 256) return Path::Subwarp;
  // Fewer rows than a large GPU has multiprocessors, or so few waves that idle multiprocessors in
  // the last one matter.
  if (row_bytes >= 64 * 1024 && layout.rows() < 128) return Path::Split;
  if (row_bytes > 256 * 1024 && layout.rows() < 256) return Path::Split;
  if (row_bytes <= 4096 && layout.rows() >= 1024) return Path::Warp;
  return Path::Block;
}

namespace plans {

inline int64_t blocks_for(int64_t wanted, const RowTraits& traits) {
  return clamp(wanted, 1, traits.sums ? kMaxSummingBlocks : kMaxBlocks);
}

// At most four classes per lane, unless there are more than 128. Tiles of about 8 KiB hide the
// latency of their loads; with few rows they are smaller, so that more blocks have work.
inline SubwarpPlan subwarp(const Layout& layout, const RowTraits& traits) {
  const int lanes = int(clamp(power_of_two(ceil_div<int64_t>(layout.classes, 4)), 1, 32));
  const int64_t row_bytes = std::max<int64_t>(layout.classes * traits.element_bytes, 1);
  const int64_t rows_at_once = kSubwarpThreads / lanes;
  const int64_t by_size = std::max<int64_t>(8192 / row_bytes / rows_at_once, 1) * rows_at_once;
  // A few iterations of one block take less time than a launch that adds the sums of several.
  constexpr int64_t kTurnsOfOneBlock = 4;
  const int64_t turns = std::max<int64_t>(ceil_div<int64_t>(layout.rows(), rows_at_once), 1);
  const int64_t by_rows = traits.sums && turns <= kTurnsOfOneBlock
                              ? turns * rows_at_once
                              : ceil_div<int64_t>(turns, 1024) * rows_at_once;
  const int64_t tile_rows = std::min(by_size, by_rows);
  // Each tile starts as far past a 16-byte boundary as it does in global memory.
  const int64_t tile_bytes = ceil_div<int64_t>(tile_rows * row_bytes, 16) * 16 + 16;
  return {.blocks = blocks_for(ceil_div<int64_t>(layout.rows(), tile_rows), traits),
          .tile_rows = tile_rows,
          .shared_bytes = tile_bytes * traits.tensors,
          .lanes = lanes};
}

// The shared memory for the first operand of `rows` rows; 0 if it isn't wanted or doesn't fit.
inline int64_t cache_bytes(const Layout& layout, const RowTraits& traits, int64_t rows,
                           int64_t most) {
  const int64_t row_bytes = ceil_div<int64_t>(layout.classes * traits.element_bytes, 16) * 16;
  return traits.rereads && row_bytes * rows <= most ? row_bytes * rows : 0;
}

inline WarpPlan warp(const Layout& layout, const RowTraits& traits) {
  return {.blocks = blocks_for(ceil_div<int64_t>(layout.rows(), kWarpTeams), traits),
          .cache_bytes = cache_bytes(layout, traits, kWarpTeams, kSharedBytes)};
}

// About four vectors per thread.
inline int row_threads(int64_t classes, int64_t element_bytes) {
  return int(clamp(power_of_two(classes * element_bytes / 16 / 4), 128, kMaxRowThreads));
}

inline BlockPlan block(const Layout& layout, const RowTraits& traits) {
  const bool alone = traits.has_threads_to_reread && traits.element_bytes < 8 &&
                     layout.classes * traits.element_bytes > kHalfOfSharedBytes;
  return {
      .blocks = blocks_for(layout.rows(), traits),
      .cache_bytes = cache_bytes(layout, traits, 1, traits.device_shared_bytes - kReductionBytes),
      .threads = alone ? kMaxCachedRowThreads : row_threads(layout.classes, traits.element_bytes)};
}

// Slices of 16 KiB or more, which are 64 bytes per thread, in about a thousand blocks altogether.
// A forced plan has three, so that tests see several with a small tensor.
inline SplitPlan split(const Layout& layout, const RowTraits& traits, bool forced) {
  const int64_t by_size = layout.classes * traits.element_bytes / (16 * 1024);
  const int64_t by_rows = ceil_div<int64_t>(1024, std::max<int64_t>(layout.rows(), 1));
  const int64_t wanted = forced ? 3 : clamp(by_size, 1, by_rows);
  // In whole vectors, so that a slice's operands are co-aligned if the rows are.
  const int64_t size =
      std::max<int64_t>(ceil_div<int64_t>(ceil_div<int64_t>(layout.classes, wanted), 16) * 16, 16);
  const int64_t slices = std::max<int64_t>(ceil_div<int64_t>(layout.classes, size), 1);
  return {.reduce_blocks = clamp(layout.rows() * slices, 1, kMaxBlocks),
          .blocks = blocks_for(layout.rows() * (traits.maps ? slices : 1), traits),
          .slices = slices,
          .slice_size = size,
          .threads = std::min(row_threads(size, traits.element_bytes), kMaxSplitThreads)};
}

// One thread per row if that gives enough threads, else up to 16, with 8 classes or more each.
inline StridedPlan strided(const Layout& layout, const RowTraits& traits) {
  int slices = 1;
  while (slices < 16 && layout.rows() * slices < (1 << 16) && layout.classes >= 16 * slices) {
    slices *= 2;
  }
  const int rows_at_once = slices == 1 ? 256 : 32;
  return {.blocks = blocks_for(ceil_div<int64_t>(layout.rows(), rows_at_once), traits),
          .shared_bytes = slices == 1 ? 0 : rows_at_once * slices * traits.state_bytes,
          .slice_size = ceil_div<int64_t>(layout.classes, slices),
          .slices = slices,
          .rows_at_once = rows_at_once};
}

}  // namespace plans

// `forced` is for tests. It is ignored if the classes aren't contiguous or a row is too long for a
// tile.
inline Plan plan_rows(const Layout& layout, const RowTraits& traits,
                      std::optional<Path> forced = std::nullopt) {
  Path path = choose_path(layout, traits.element_bytes);
  if (forced && layout.inner == 1 && *forced != Path::Strided) path = *forced;
  switch (path) {
    case Path::Subwarp: {
      const SubwarpPlan plan = plans::subwarp(layout, traits);
      if (plan.shared_bytes > kSharedBytes) return plans::block(layout, traits);
      return plan;
    }
    case Path::Warp:
      return plans::warp(layout, traits);
    case Path::Block:
      return plans::block(layout, traits);
    case Path::Split:
      return plans::split(layout, traits, forced.has_value());
    case Path::Strided:
      return plans::strided(layout, traits);
  }
  return plans::block(layout, traits);
}

}  // namespace fastnn::cuda
