// The tensors of an optimizer's step, list by list: checked, each laid out as one run of memory,
// and stepped in the order that torch steps them in. Nothing here knows which optimizer it is.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <string_view>
#include <vector>

#include "ops/operands.h"

namespace fastnn {

// What an optimizer remembers of each parameter, under the name that the schema has for it.
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

// Whether a step can take a parameter, and with it this gradient or state; any strides do.
bool can_step(const at::Tensor& param);
bool can_step_grad(const at::Tensor& param, const at::Tensor& grad);
bool can_step_state(const at::Tensor& param, const at::Tensor& state);

// Whether a parameter's state may be of this dtype: the parameter's own, or that which it is
// computed in.
bool is_state_dtype(at::ScalarType dtype, const at::Tensor& param);

// Raises unless every list fits the parameters, in the name of the operator `op`.
void check_tensor_lists(std::string_view op, const TensorLists& lists);

// Raises unless `scalar`, the argument `name`, is missing or has one element.
void check_scalar(std::string_view op, const char* name, const std::optional<at::Tensor>& scalar);

// One parameter's tensors, each as one run of memory in the parameter's order: themselves where
// they lie so, else copies.
struct FlatTensors {
  at::Tensor param;
  at::Tensor grad;
  c10::SmallVector<at::Tensor, 2> states;

  FlatTensors(const TensorLists& lists, size_t i);

  // What was stepped in copies, back into the lists' tensors.
  void copy_back(const TensorLists& lists, size_t i) const;
};

// The gradient's memory. Where it is only read it may be shared, copy-on-write, and stays so.
template <typename T>
T* grad_data(const at::Tensor& grad, bool is_written) {
  return is_written ? data<T>(grad) : const_cast<T*>(const_data<T>(grad));
}

// Lists that hold their tensors, of one device, and of one dtype each.
struct TensorGroup {
  std::vector<at::Tensor> params;
  std::vector<at::Tensor> grads;
  c10::SmallVector<std::vector<at::Tensor>, 2> states;

  // As lists with the names of those that they come from.
  TensorLists lists_like(const TensorLists& whole) const;
};

// In the order of their first parameters.
std::vector<TensorGroup> group_by_device_and_dtype(const TensorLists& lists);

// Whether two tensors that are written to share memory: a parameter listed twice, or two views of
// one tensor.
bool any_share_memory(const TensorLists& lists);

// Calls step(lists) for all parameters at once; or, where some share memory, for one after the
// other, as torch steps them: each sees what the one before has written.
template <typename F>
void step_in_order(const TensorLists& lists, F step) {
  if (!any_share_memory(lists)) {
    step(lists);
    return;
  }
  for (size_t i = 0; i < lists.params.size(); ++i) step(lists.slice(i, i + 1));
}

}  // namespace fastnn
