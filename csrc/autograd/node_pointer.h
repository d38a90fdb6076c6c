// The pointer type of autograd's nodes: intrusive since torch 2.13, std::shared_ptr before.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/version.h>

#include <memory>

namespace fastnn {

#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13

template <typename Node>
using NodePointer = c10::intrusive_ptr<Node>;

template <typename Node>
NodePointer<Node> make_node() {
  return c10::make_intrusive<Node>();
}

// Another reference to a node that already has an owner.
inline NodePointer<torch::autograd::Node> pointer_to(torch::autograd::Node& node) {
  return NodePointer<torch::autograd::Node>::unsafe_reclaim_from_nonowning(&node);
}

#else

template <typename Node>
using NodePointer = std::shared_ptr<Node>;

template <typename Node>
NodePointer<Node> make_node() {
  // deleteNode frees a long chain of nodes without recursion, which would overflow the stack.
  return NodePointer<Node>(new Node(), torch::autograd::deleteNode);
}

// Another reference to a node that already has an owner.
inline NodePointer<torch::autograd::Node> pointer_to(torch::autograd::Node& node) {
  return node.shared_from_this();
}

#endif

}  // namespace fastnn
