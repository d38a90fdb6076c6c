// One parallel region for a step of any optimizer on the CPU, in chunks that fit a cache.
#pragma once

#include <memory>
#include <vector>

#include "cpu/launch.h"
#include "cpu/strided_runs.h"
#include "ops/tensor_lists.h"

namespace fastnn::cpu {

// One parameter's tensors and their memory. The pointers are taken before the parallel region, as
// taking one to write to copy-on-write memory copies that.
struct SteppedTensors {
  at::ScalarType dtype;
  c10::SmallVector<at::ScalarType, 2> state_dtypes;
  int64_t numel;
  // The parameter, its states and its gradient, if each is one run of memory in the same order.
  c10::SmallVector<void*, 3> runs;
  std::unique_ptr<StridedRuns> strided;  // otherwise

  SteppedTensors(const TensorLists& lists, size_t i)
      : dtype(lists.params[i].scalar_type()), numel(lists.params[i].numel()) {
    const at::Tensor& param = lists.params[i];
    const at::Tensor& grad = lists.grads[i];
    for (const StateList& state : lists.states) {
      state_dtypes.push_back(state.tensors[i].scalar_type());
    }
    if (are_flat(lists, i)) {
      runs.push_back(data<void>(param));
      for (const StateList& state : lists.states) runs.push_back(data<void>(state.tensors[i]));
      runs.push_back(grad_data<void>(grad, lists.writes_grads));
    } else if (numel != 0) {
      std::vector<at::Tensor> written = {param}, read;
      for (const StateList& state : lists.states) written.push_back(state.tensors[i]);
      if (lists.writes_grads) {
        written.push_back(grad);
      } else {
        // A gradient in the parameter's own memory is read as it was before the step.
        read.push_back(grad.is_alias_of(param) ? grad.clone() : grad);
      }
      strided = std::make_unique<StridedRuns>(written, read);
    }
  }
};

// A piece of one parameter's tensors.
struct Chunk {
  const SteppedTensors* of;
  int64_t begin;
  int64_t size;
};

// The arguments of one call of a kernel: elements [begin, begin + size) of the parameter, its
// states and its gradient.
class SteppedRun {
 public:
  SteppedRun(const SteppedTensors& of, void* const* runs, int64_t begin, int64_t size)
      : of(of), size(size), runs_(runs), begin_(begin) {
  }

  const SteppedTensors& of;
  int64_t size;

  template <typename T>
  T* param() const {
    return static_cast<T*>(runs_[0]) + begin_;
  }
  template <typename T>
  T* state(size_t i) const {
    return static_cast<T*>(runs_[1 + i]) + begin_;
  }
  template <typename T>
  T* grad() const {
    return static_cast<T*>(runs_[1 + of.state_dtypes.size()]) + begin_;
  }

 private:
  void* const* runs_;
  int64_t begin_;
};

// Calls step(run) for all of a chunk.
template <typename F>
void step_chunk(const Chunk& chunk, F step) {
  const SteppedTensors& of = *chunk.of;
  if (!of.strided) return step(SteppedRun(of, of.runs.data(), chunk.begin, chunk.size));
  of.strided->for_each(chunk.begin, chunk.begin + chunk.size,
                       [&](void* const* runs, int64_t n) { step(SteppedRun(of, runs, 0, n)); });
}

inline std::vector<Chunk> split(const std::vector<SteppedTensors>& all) {
  constexpr int64_t kChunk = 1 << 14;  // elements: 192 KiB of float parameter, gradient and state
  std::vector<Chunk> chunks;
  for (const SteppedTensors& of : all) {
    for (int64_t begin = 0; begin < of.numel; begin += kChunk) {
      chunks.push_back({&of, begin, std::min(kChunk, of.numel - begin)});
    }
  }
  return chunks;
}

// Calls step(run) for all tensors, in one parallel region or, if some share memory, in one for each
// parameter.
template <typename F>
void step_tensors(const TensorLists& all_lists, F step) {
  step_in_order(all_lists, [&](const TensorLists& lists) {
    std::vector<SteppedTensors> stepped;
    stepped.reserve(lists.params.size());
    for (size_t i = 0; i < lists.params.size(); ++i) stepped.emplace_back(lists, i);
    const std::vector<Chunk> chunks = split(stepped);
    int64_t elements = 0;
    for (const Chunk& chunk : chunks) elements += chunk.size;
    const int64_t chunk_size = chunks.empty() ? 1 : elements / int64_t(chunks.size());
    at::parallel_for(0, chunks.size(), grain(chunk_size), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) step_chunk(chunks[i], step);
    });
  });
}

}  // namespace fastnn::cpu
