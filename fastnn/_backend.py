"""``torch.compile(model, backend="fastnn")``: puts our operators into the graph of any forward.

Dynamo, which traces the forward, finds this backend through the package's entry point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fastnn import functional
from fastnn._operators import OPERATORS

_RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}


def _log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Takes the arguments of torch.log_softmax."""
    return functional.log_softmax(input, dim, dtype=dtype)


_FUNCTIONS: dict[Callable[..., Any] | str, Callable[..., Any]] = {
    **{operator.stock: getattr(functional, operator.name) for operator in OPERATORS},
    torch.log_softmax: _log_softmax,
    torch.special.log_softmax: _log_softmax,
    "log_softmax": _log_softmax,
}


def fastnn(graph_module: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """A backend for torch.compile that runs the graph eagerly with our operators in it.

    Args:
        graph_module: the traced graph: functions of torch and methods of tensors.
        example_inputs: unused; the operators take any shape.

    Returns:
        The graph as a function.
    """
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            _put_operators_into(module.graph)
            module.recompile()
    return graph_module.forward


def _put_operators_into(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target in _FUNCTIONS and "out" not in node.kwargs:
            node.op, node.target = "call_function", _FUNCTIONS[node.target]
        elif node.target in _RELUS and (linear := _linear_before(node)):
            # It takes the Linear's place: the nodes in between may change the Linear's input.
            linear.target = functional.linear_relu
            node.replace_all_uses_with(linear)
            graph.erase_node(node)


def _linear_before(relu: fx.Node) -> fx.Node | None:
    """The Linear whose output only this ReLU uses, run under the same modes."""
    node = relu.args[0] if relu.args else relu.kwargs.get("input")
    if not isinstance(node, fx.Node) or node.target is not functional.linear or len(node.users) > 1:
        return None
    between = node.next
    while between is not relu:
        # Nodes that enter or leave no_grad, autocast and the like produce no value.
        if between.meta.get("example_value") is None:
            return None
        between = between.next
    return node
