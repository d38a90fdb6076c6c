#include "ops/tensor_lists.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "ops/checks.h"

namespace fastnn {

TensorLists TensorLists::slice(size_t first, size_t last) const {
  TensorLists part = *this;
  part.params = params.slice(first, last - first);
  part.grads = grads.slice(first, last - first);
  for (StateList& state : part.states) state.tensors = state.tensors.slice(first, last - first);
  return part;
}

bool can_step(const at::Tensor& param) {
  // A subclass may keep its data elsewhere or intercept torch's own operators. The dispatcher can't
  // pass a lazily negated, conjugated or zero tensor in a list that is written to.
  return has_kernels(param) && !param.is_meta() && !param.is_neg() && !param.is_conj() &&
         !param._is_zerotensor() && !param.unsafeGetTensorImpl()->is_python_dispatch();
}

bool can_step_grad(const at::Tensor& param, const at::Tensor& grad) {
  return can_step(grad) && grad.scalar_type() == param.scalar_type() &&
         grad.sym_sizes() == param.sym_sizes();
}

bool can_step_state(const at::Tensor& param, const at::Tensor& state) {
  return can_step(state) && is_state_dtype(state.scalar_type(), param) &&
         state.sym_sizes() == param.sym_sizes();
}

bool is_state_dtype(at::ScalarType dtype, const at::Tensor& param) {
  return dtype == param.scalar_type() || dtype == accumulate_dtype(param);
}

namespace {

// Raises unless `tensor`, entry i of the list `name`, matches its parameter; its dtype may also be
// `or_dtype`.
void check_entry(std::string_view op, const char* name, size_t i, const at::Tensor& tensor,
                 const at::Tensor& param, at::ScalarType or_dtype) {
  const at::ScalarType dtype = param.scalar_type();
  TORCH_CHECK(tensor.device() == param.device(), op, ": expected ", name, "[", i,
              "] on its parameter's device ", param.device(), ", but it is on ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == dtype || tensor.scalar_type() == or_dtype, op, ": expected ",
              name, "[", i, "] to have its parameter's dtype ", dtype,
              or_dtype == dtype ? "" : c10::str(" or ", or_dtype), ", but got ",
              tensor.scalar_type());
  TORCH_CHECK(tensor.layout() == at::kStrided, op, ": expected ", name, "[", i,
              "] to be dense, but got layout ", tensor.layout());
  TORCH_CHECK(tensor.sizes() == param.sizes(), op, ": expected ", name, "[", i,
              "] to have its parameter's shape ", param.sizes(), ", but got ", tensor.sizes());
}

void check_list(std::string_view op, const char* name, at::TensorList tensors,
                at::TensorList params, bool is_state = false) {
  TORCH_CHECK(tensors.size() == params.size(), op, ": expected as many ", name, " as params (",
              params.size(), "), but got ", tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& param = params[i];
    check_entry(op, name, i, tensors[i], param,
                is_state ? accumulate_dtype(param) : param.scalar_type());
  }
}

// Raises if a stride of 0 puts several elements in one place: all but one result would be lost.
void check_writable(std::string_view op, const char* name, at::TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK(at::has_internal_overlap(tensors[i]) != at::MemOverlap::Yes, op,
                ": expected each element of ", name, "[", i, "], which is written to, to ",
                "have its own place, but several refer to a single memory location: shape ",
                tensors[i].sizes(), " with strides ", tensors[i].strides());
  }
}

// Whether both are dense blocks in the same order.
bool are_runs_alike(const at::Tensor& param, const at::Tensor& tensor) {
  return param.is_non_overlapping_and_dense() && tensor.strides() == param.strides();
}

// The tensor as one dense block in the parameter's order: itself if it is laid out so, else a copy.
at::Tensor in_order_of(const at::Tensor& param, const at::Tensor& tensor) {
  if (are_runs_alike(param, tensor)) return tensor;
  return at::empty_like(param, tensor.options()).copy_(tensor);
}

void copy_if_other(const at::Tensor& flat, const at::Tensor& tensor) {
  if (!flat.is_same(tensor)) tensor.copy_(flat);
}

// The address range of a tensor's elements.
std::pair<const char*, const char*> extent(const at::Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const char* begin = const_data<char>(tensor);
  return {begin, begin + (last + 1) * tensor.element_size()};
}

bool are_alike(const at::Tensor& a, const at::Tensor& b) {
  return a.device() == b.device() && a.scalar_type() == b.scalar_type();
}

// Whether entry i has the group's device and dtypes.
bool has_room(const TensorGroup& group, const TensorLists& lists, size_t i) {
  if (!are_alike(group.params[0], lists.params[i])) return false;
  for (size_t s = 0; s < lists.states.size(); ++s) {
    if (!are_alike(group.states[s][0], lists.states[s].tensors[i])) return false;
  }
  return true;
}

}  // namespace

void check_tensor_lists(std::string_view op, const TensorLists& lists) {
  const at::TensorList params = lists.params;
  check_list(op, "params", params, params);
  for (const auto& param : params) {
    TORCH_CHECK(is_supported_dtype(param.scalar_type()), op, ": expected params of dtype ",
                "float64, float32, bfloat16 or float16, but got ", param.scalar_type());
  }
  check_list(op, "grads", lists.grads, params);
  for (const StateList& state : lists.states) {
    check_list(op, state.name, state.tensors, params, /*is_state=*/true);
  }
  check_writable(op, "params", params);
  if (lists.writes_grads) check_writable(op, "grads", lists.grads);
  for (const StateList& state : lists.states) check_writable(op, state.name, state.tensors);
}

void check_scalar(std::string_view op, const char* name, const std::optional<at::Tensor>& scalar) {
  TORCH_CHECK(!scalar || scalar->numel() == 1, op, ": expected ", name,
              " to have one element, but got shape ", scalar->sizes());
}

bool are_flat(const TensorLists& lists, size_t i) {
  const at::Tensor& param = lists.params[i];
  return are_runs_alike(param, param) && are_runs_alike(param, lists.grads[i]) &&
         std::all_of(lists.states.begin(), lists.states.end(), [&](const StateList& state) {
           return are_runs_alike(param, state.tensors[i]);
         });
}

FlatTensors::FlatTensors(const TensorLists& lists, size_t i)
    : param(in_order_of(lists.params[i], lists.params[i])),
      grad(in_order_of(lists.params[i], lists.grads[i])) {
  for (const StateList& state : lists.states) {
    states.push_back(in_order_of(lists.params[i], state.tensors[i]));
  }
}

void FlatTensors::copy_back(const TensorLists& lists, size_t i) const {
  copy_if_other(param, lists.params[i]);
  if (lists.writes_grads) copy_if_other(grad, lists.grads[i]);
  for (size_t s = 0; s < states.size(); ++s) copy_if_other(states[s], lists.states[s].tensors[i]);
}

TensorLists TensorGroup::lists_like(const TensorLists& whole) const {
  TensorLists lists = whole;
  lists.params = params;
  lists.grads = grads;
  for (size_t s = 0; s < states.size(); ++s) lists.states[s].tensors = states[s];
  return lists;
}

std::vector<TensorGroup> group_by_device_and_dtype(const TensorLists& lists) {
  std::vector<TensorGroup> groups;
  for (size_t i = 0; i < lists.params.size(); ++i) {
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const TensorGroup& g) { return has_room(g, lists, i); });
    if (group == groups.end()) {
      group = groups.emplace(groups.end());
      group->states.resize(lists.states.size());
    }
    group->params.push_back(lists.params[i]);
    group->grads.push_back(lists.grads[i]);
    for (size_t s = 0; s < lists.states.size(); ++s) {
      group->states[s].push_back(lists.states[s].tensors[i]);
    }
  }
  return groups;
}

bool any_share_memory(const TensorLists& lists) {
  std::vector<std::pair<const char*, const char*>> extents;
  const auto add = [&](at::TensorList list) {
    for (const at::Tensor& tensor : list) {
      if (tensor.numel() != 0) extents.push_back(extent(tensor));
    }
  };
  add(lists.params);
  for (const StateList& state : lists.states) add(state.tensors);
  std::sort(extents.begin(), extents.end());
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].first < extents[i - 1].second) return true;
  }
  return false;
}

}  // namespace fastnn
