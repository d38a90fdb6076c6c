// A fused operator's backward as an autograd node, like those that torch generates for its own
// operators. The node of torch::autograd::Function keeps its state in a hash map and in lists,
// which took 14,000 instructions per call, as many as a whole small loss.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <mutex>
#include <optional>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "autograd/node_pointer.h"
#include "autograd/transforms.h"
#include "ops/operands.h"

namespace fastnn {

// How autograd saves these tensors.
template <typename Tensors>
struct SavedAs {
  using type = std::array<torch::autograd::SavedVariable, std::tuple_size_v<Tensors>>;
};
template <>
struct SavedAs<std::vector<at::Tensor>> {
  using type = std::vector<torch::autograd::SavedVariable>;
};

// `Op` describes the backward:
//   name                the name that profilers, anomaly mode and grad_fn show
//   Tensors             the tensors to save, absent ones undefined: std::array, or std::vector if
//                       their number varies
//   kOutputs            which of them are the forward's result; false beyond its end
//   give_history(tensors, grad_output, edges, options)
//                       optional, for a backward that is differentiated itself: links tensors that
//                       the forward computed without a graph to the node's edges
//   Options             std::tuple of the numbers to save
//   backward(grad_output, tensors, options, needs_input_grad)
//                       returns the gradients of the node's inputs; it owns the tensors, which may
//                       have no other owner if the graph isn't retained
template <typename Op>
class BackwardNode : public torch::autograd::Node {
 public:
  using variable_list = torch::autograd::variable_list;

  void save(const typename Op::Tensors& tensors, const typename Op::Options& options) {
    if constexpr (kVaries) saved_.resize(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) saved_[i] = {tensors[i], is_output(i)};
    options_ = options;
  }

  std::string name() const override {
    return Op::name;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    // Before anything that may throw: a later call may retain the graph.
    const bool releases = std::exchange(releasing_thread_, {}) == std::this_thread::get_id();
    auto tensors = unpack_saved();
    give_history(tensors, grads[0]);
    if (releases) reset_saved();
    return backward(grads[0], std::move(tensors), options_, needs_input_grad());
  }

  // The engine calls this right before apply, on the same thread, unless it retains the graph. The
  // saved tensors are then released before their last use, so that it may overwrite them.
  void will_release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    releasing_thread_ = std::this_thread::get_id();
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    reset_saved();
  }

  // For compiled autograd: its cache key, and the call that it puts in its graph.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(std::string(Op::name));
    for (size_t i = 0; i < saved_.size(); ++i) args.collect(saved_[i], is_output(i));
    std::apply([&](const auto&... option) { (args.collect(option), ...); }, options_);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    namespace compiled = torch::dynamo::autograd;
    for (auto& variable : saved_) saved.before(variable);
    compiled::PackedArgs args;
    args.pack(pack_saved());
    std::apply([&](const auto&... option) { (args.pack(option), ...); }, options_);
    args.pack(needs_input_grad());

    std::vector<at::TypePtr> schema;
    for (const auto& value : args.vec()) schema.push_back(value.type());
    const auto& compiler = compiled::getPyCompilerInterface();
    const std::string function =
        compiler->bind_function(saved.get_py_compiler(), Op::name, apply_packed, schema,
                                /*is_custom_function=*/true, /*is_traceable=*/true);
    const auto metadata =
        compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            compiled::get_input_metadata(next_edges()));
    variable_list results = compiler->call_function(saved.get_py_compiler(), "apply_functional",
                                                    function, grads, args.vec(), metadata);
    for (auto& variable : saved_) saved.after(variable);
    return results;
  }

 private:
  static constexpr bool kVaries = std::is_same_v<typename Op::Tensors, std::vector<at::Tensor>>;

  static constexpr bool is_output(size_t i) {
    return i < Op::kOutputs.size() && Op::kOutputs[i];
  }
  void give_history(typename Op::Tensors& tensors, const at::Tensor& grad_output) const {
    if constexpr (requires { &Op::give_history; }) {
      if (!grad_output.defined() || !backward_must_be_composite(grad_output)) return;
      Op::give_history(tensors, grad_output, next_edges(), options_);
    }
  }
  static typename Op::Tensors with_room_for(size_t count) {
    typename Op::Tensors tensors;
    if constexpr (kVaries) tensors.resize(count);
    return tensors;
  }

  static variable_list backward(const at::Tensor& grad_output, typename Op::Tensors&& tensors,
                                const typename Op::Options& options,
                                const std::vector<bool>& needs_input_grad) {
    if (!grad_output.defined()) return variable_list(needs_input_grad.size());
    return Op::backward(grad_output, std::move(tensors), options, needs_input_grad);
  }

  static variable_list apply_packed(const variable_list& grads,
                                    const std::vector<at::IValue>& values) {
    torch::dynamo::autograd::PackedArgs args(values);
    const auto list = args.unpack<variable_list>();
    auto tensors = with_room_for(list.size());
    std::copy(list.begin(), list.end(), tensors.begin());
    typename Op::Options options;
    std::apply(
        [&](auto&... option) { ((option = args.unpack<std::decay_t<decltype(option)>>()), ...); },
        options);
    return backward(grads[0], std::move(tensors), options, args.unpack<std::vector<bool>>());
  }

  typename Op::Tensors unpack_saved() {
    auto tensors = with_room_for(saved_.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      // A saved result holds no reference to its node, as that would be a cycle: pass it here.
      tensors[i] = is_output(i) ? saved_[i].unpack(pointer_to(*this)) : saved_[i].unpack();
    }
    return tensors;
  }

  void reset_saved() {
    for (auto& variable : saved_) variable.reset_data();
  }

  variable_list pack_saved() {
    const auto tensors = unpack_saved();
    return {tensors.begin(), tensors.end()};
  }

  std::vector<bool> needs_input_grad() const {
    std::vector<bool> needs(num_outputs());
    for (size_t i = 0; i < needs.size(); ++i) needs[i] = task_should_compute_output(i);
    return needs;
  }

  typename SavedAs<typename Op::Tensors>::type saved_;
  typename Op::Options options_;
  std::thread::id releasing_thread_;  // default-constructed if no release is pending
};

// Whether the gradient may overwrite `kept`: this is the only reference to its memory, and no mode
// or tensor subclass is involved that would have to see the write.
inline bool may_replace(const at::Tensor& kept, const at::Tensor& grad) {
  return kept.use_count() == 1 && kept.storage().use_count() == 1 &&
         !at::isTensorSubclassLike(kept) && !at::isTensorSubclassLike(grad);
}

// Makes the node of a result of these inputs; call it before computing the result, so that nodes
// are numbered in the order of the calls.
template <typename Op, typename... Inputs>
NodePointer<BackwardNode<Op>> make_backward_node(const Inputs&... inputs) {
  auto node = make_node<BackwardNode<Op>>();
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

// Makes `output` the result that the node differentiates.
template <typename Op>
void record(const NodePointer<BackwardNode<Op>>& node, const at::Tensor& output,
            const typename Op::Tensors& tensors, const typename Op::Options& options) {
  torch::autograd::set_history(output, node);
  node->save(tensors, options);
}

}  // namespace fastnn
