// The tensor lists of any optimizer's step: their checks, dense copies where they are needed, and
// torch's order of steps.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <string_view>
#include <vector>

#include "ops/operands.h"

namespace fastnn {

// An optimizer state, one tensor per parameter, and its name in the schema.
struct StateList {
  const char* name;
  at::TensorList tensors;
};

// Entry i of each list belongs to parameter i. Parameters and states are written to.
struct TensorLists {
  at::TensorList params;
  at::TensorList grads;
  c10::SmallVector<StateList, 2> states;
  bool writes_grads = false;

  // The entries [first, last).
  TensorLists slice(size_t first, size_t last) const;
};

// Whether the kernels can step a parameter, with this gradient or state. Strides may be arbitrary.
bool can_step(const at::Tensor& param);
bool can_step_grad(const at::Tensor& param, const at::Tensor& grad);
bool can_step_state(const at::Tensor& param, const at::Tensor& state);

// Whether a parameter's state may have this dtype: the parameter's own or its accumulation dtype.
bool is_state_dtype(at::ScalarType dtype, const at::Tensor& param);

// Raises, in the name of the operator `op`, unless every list matches the parameters.
void check_tensor_lists(std::string_view op, const TensorLists& lists);

// Raises unless `scalar`, the argument `name`, is missing or has one element.
void check_scalar(std::string_view op, const char* name, const std::optional<at::Tensor>& scalar);

// Whether the tensors of parameter i are dense blocks, all in the same order.
bool are_flat(const TensorLists& lists, size_t i);

// One parameter's tensors, each as one dense block in the parameter's order; a copy if it isn't
// laid out so.
struct FlatTensors {
  at::Tensor param;
  at::Tensor grad;
  c10::SmallVector<at::Tensor, 2> states;

  FlatTensors(const TensorLists& lists, size_t i);

  // Copies the results of a step on copies back into the lists' tensors.
  void copy_back(const TensorLists& lists, size_t i) const;
};

// The gradient's data. Read access leaves copy-on-write memory shared.
template <typename T>
T* grad_data(const at::Tensor& grad, bool is_written) {
  return is_written ? data<T>(grad) : const_cast<T*>(const_data<T>(grad));
}

// Lists that own their tensors, all on one device and each list of one dtype.
struct TensorGroup {
  std::vector<at::Tensor> params;
  std::vector<at::Tensor> grads;
  c10::SmallVector<std::vector<at::Tensor>, 2> states;

  // The same tensors as lists, with the names of the lists that they come from.
  TensorLists lists_like(const TensorLists& whole) const;
};

// The groups are in the order of their first parameters.
std::vector<TensorGroup> group_by_device_and_dtype(const TensorLists& lists);

// Whether two tensors that are written to share memory: a parameter listed twice, or two views of
// one tensor.
bool any_share_memory(const TensorLists& lists);

// Calls step(lists) for all parameters at once or, if some share memory, one by one as torch does:
// each step then sees the results of those before it.
template <typename F>
void step_in_order(const TensorLists& lists, F step) {
  if (!any_share_memory(lists)) {
    step(lists);
    return;
  }
  for (size_t i = 0; i < lists.params.size(); ++i) step(lists.slice(i, i + 1));
}

}  // namespace fastnn
