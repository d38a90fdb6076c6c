"""Looks into ``forward`` methods with torch.fx, for the ReLU calls that follow a Linear's.

``rewrite`` gives a module the forward of its trace, less the ReLUs behind each ``LinearReLU``: by a
class made for it, a subclass of its own, so that it stays the same object. Copies and pickles hold
the class it had, and are rewritten when they are made.
"""

from __future__ import annotations

import inspect

import torch
from torch import fx
from torch.nn import functional as F

from fastnn import nn

RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_RELU_METHODS = ("relu", "relu_")


class Untraceable(Exception):
    """A module's forward can't be replaced by its trace; the message ends "forward, which ..."."""


def relu_calls(module: torch.nn.Module) -> list[tuple[str, str | None]]:
    """Finds the Linear layers that a module's forward calls, each with the ReLU after it.

    Returns: for each call the layer's path from the module, and the name of the node of a ReLU
    that alone takes its output, or None.
    Errors: :class:`Untraceable`, with the reason.
    """
    graph = _trace(module)
    calls = []
    for node in graph.nodes:
        if _is_call_of(node, module, torch.nn.Linear):
            relu = next(iter(node.users), None) if len(node.users) == 1 else None
            found = relu is not None and _is_relu(relu, module)
            calls.append((node.target, relu.name if found else None))
    return calls


def rewrite(module: torch.nn.Module) -> None:
    """Takes the ReLUs behind each LinearReLU out of a module's forward."""
    stock = _stock_class(module)
    module.__class__ = stock
    graph = _trace(module)
    for node in list(graph.nodes):
        if _is_relu(node, module) and _is_call_of(node.args[0], module, nn.LinearReLU):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    forward = type(fx.GraphModule(module, graph)).forward
    module.__class__ = type(f"Fused{stock.__name__}", (_Rewritten, stock), {"forward": forward})


def restore(module: torch.nn.Module) -> None:
    """Gives a rewritten module the class it had."""
    module.__class__ = _stock_class(module)


# ---- the class of a rewritten module -------------------------------------------------------------


class _Rewritten:
    """Beside a module's own class: how it is copied and pickled."""

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(2)
        return _to_be_rewritten, (_stock_class(self),), *state

    def __setstate__(self, state):
        super().__setstate__(state)
        rewrite(self)


def _to_be_rewritten(stock: type) -> torch.nn.Module:
    """An object without attributes yet, which its state will rewrite."""
    rewritten = type(f"Fused{stock.__name__}", (_Rewritten, stock), {})
    return rewritten.__new__(rewritten)


def _stock_class(module: torch.nn.Module) -> type:
    return type(module).__bases__[1] if isinstance(module, _Rewritten) else type(module)


# ---- tracing -------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Records a module's own forward; what its children do is theirs."""

    # In-place changes of buffers are recorded too; otherwise they would be made while tracing.
    proxy_buffer_attributes = True

    def is_leaf_module(self, module: torch.nn.Module, path: str) -> bool:
        return True


def _trace(module: torch.nn.Module) -> fx.Graph:
    """Traces a forward, if a trace shows all that it does."""
    _check_signature(module)
    graph = _record(module, module.training)
    # What depends on the mode would be fixed to the present one.
    if str(graph) != str(_record(module, not module.training)):
        raise Untraceable("does another thing in training than in evaluation")
    return graph


def _check_signature(module: torch.nn.Module) -> None:
    if isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)):
        raise Untraceable("is compiled already")
    if type(module).__module__.startswith("torch.nn."):
        raise Untraceable("is PyTorch's own")
    if "forward" in vars(module):
        raise Untraceable("has been replaced")
    for parameter in inspect.signature(module.forward).parameters.values():
        plain = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if not plain or parameter.default is not parameter.empty:
            raise Untraceable(f"has an optional argument, {parameter.name}")


def _record(module: torch.nn.Module, training: bool) -> fx.Graph:
    before, mode = dict(vars(module)), module.training
    module.training = training
    try:
        graph = _Tracer().trace(module)
    except Exception as error:
        message = next(iter(str(error).splitlines()), "")
        raise Untraceable(f"torch.fx can't trace ({type(error).__name__}: {message})") from error
    finally:
        after = dict(vars(module)) | {"training": mode}
        vars(module).clear()
        vars(module).update(before)
    if any(name.startswith("_tensor_constant") for name in after.keys() - before.keys()):
        raise Untraceable("makes tensors that don't depend on its input")
    if after.keys() != before.keys() or any(after[name] is not before[name] for name in before):
        raise Untraceable("changes attributes of its module")
    return graph


def _is_call_of(node: object, module: torch.nn.Module, kind: type) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and isinstance(module.get_submodule(node.target), kind)
    )


def _is_relu(node: fx.Node, module: torch.nn.Module) -> bool:
    """Whether a node is a ReLU that can be taken out; its one tensor is its first argument."""
    if not node.args:
        return False
    if node.op == "call_module":
        relu = module.get_submodule(node.target)
        return type(relu) is torch.nn.ReLU and not any(
            (relu._forward_hooks, relu._forward_pre_hooks, relu._backward_hooks)
        )
    functions = RELU_FUNCTIONS if node.op == "call_function" else _RELU_METHODS
    return node.op in ("call_function", "call_method") and node.target in functions
