// An optimizer's step on the CPU: one parallel region over all tensors, in chunks that fit a cache.
// Nothing here knows which optimizer it is.
#pragma once

#include <vector>

#include "cpu/launch.h"
#include "ops/tensor_lists.h"

namespace fastnn::cpu {

// One parameter's tensors and their memory: in the parallel region copy-on-write memory, which is
// copied when a pointer to write to it is taken, may not be copied.
struct SteppedTensors {
  FlatTensors tensors;
  void* param;
  void* grad;
  c10::SmallVector<void*, 2> states;

  SteppedTensors(const TensorLists& lists, size_t i)
      : tensors(lists, i),
        param(data<void>(tensors.param)),
        grad(grad_data<void>(tensors.grad, lists.writes_grads)) {
    for (const at::Tensor& state : tensors.states) states.push_back(data<void>(state));
  }
};

// A piece of one parameter's tensors: what one call of a kernel takes.
struct Chunk {
  const SteppedTensors* of;
  int64_t begin;
  int64_t size;
};

inline std::vector<Chunk> split(const std::vector<SteppedTensors>& all) {
  constexpr int64_t kChunk = 1 << 14;  // elements: 192 KiB of float parameter, gradient and state
  std::vector<Chunk> chunks;
  for (const SteppedTensors& of : all) {
    const int64_t n = of.tensors.param.numel();
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      chunks.push_back({&of, begin, std::min(kChunk, n - begin)});
    }
  }
  return chunks;
}

// Calls step(chunk) for all that there is to step, in one parallel region, where no two tensors
// share memory; else in one for each parameter.
template <typename F>
void step_chunks(const TensorLists& all_lists, F step) {
  step_in_order(all_lists, [&](const TensorLists& lists) {
    std::vector<SteppedTensors> stepped;
    stepped.reserve(lists.params.size());
    for (size_t i = 0; i < lists.params.size(); ++i) stepped.emplace_back(lists, i);
    const std::vector<Chunk> chunks = split(stepped);
    int64_t elements = 0;
    for (const Chunk& chunk : chunks) elements += chunk.size;
    const int64_t chunk_size = chunks.empty() ? 1 : elements / int64_t(chunks.size());
    at::parallel_for(0, chunks.size(), grain(chunk_size), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) step(chunks[i]);
    });
    for (size_t i = 0; i < stepped.size(); ++i) stepped[i].tensors.copy_back(lists, i);
  });
}

}  // namespace fastnn::cpu
