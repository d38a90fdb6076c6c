"""Modules that run a Linear and the ReLU behind it as one operator where nothing sees the halves.

The layers stay PyTorch's own. Their container gets a class that looks at them at each call: a layer
that is hooked, exchanged, parametrized or compiled is run by itself from then on, and a layer that
the program runs alone is the stock layer.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Linear, Module, Parameter, ReLU, Sequential
from torch.nn import functional as F

from fastnn import _torch
from fastnn.functional import linear_relu

_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)


class Block(NamedTuple):
    """A class with a method that runs a Linear and, on its output alone, an activation."""

    module: str
    name: str
    method: str
    linear: str
    activation: str


_HF = "transformers.models."
_BLOCKS = (
    Block("torch.nn", "TransformerEncoderLayer", _torch.FEED_FORWARD, "linear1", "activation"),
    Block("torch.nn", "TransformerDecoderLayer", _torch.FEED_FORWARD, "linear1", "activation"),
    Block("timm.layers", "Mlp", "forward", "fc1", "act"),
    Block(
        _HF + "bert.modeling_bert", "BertIntermediate", "forward", "dense", "intermediate_act_fn"
    ),
    Block(_HF + "t5.modeling_t5", "T5DenseActDense", "forward", "wi", "act"),
)


# ---- what runs in a row --------------------------------------------------------------------------


def linears_run_by(container: Module) -> list[tuple[str, Module, object]]:
    """The Linears that a container runs, each with its path from there and what runs next."""
    kind = stock_class(type(container))
    block = _block_of(kind)
    if _torch.has_own_forward(container) or (block and block.method in vars(container)):
        return []
    if block:
        linear = getattr(container, block.linear, None)
        follower = getattr(container, block.activation, None)
        return [(block.linear, linear, follower)] if isinstance(linear, Linear) else []
    row = [*_row(container), ("", None)] if _runs_a_row(kind) else []
    return [
        (path, module, follower)
        for (path, module), (_, follower) in pairwise(row)
        if isinstance(module, Linear)
    ]


def _row(sequential: Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and modules that a Sequential runs in a row, with those of Sequentials inside of it."""
    for name, module in _torch.submodules(sequential).items():
        if (
            isinstance(module, Sequential)
            and _runs_a_row(type(module))
            and not _torch.is_observed(module)
        ):
            yield from _row(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def _runs_a_row(kind: type) -> bool:
    """Whether a class calls its children one after another, as nn.Sequential does."""
    return (
        issubclass(kind, Sequential)
        and kind.forward in (Sequential.forward, _run_row)
        and kind.__iter__ is Sequential.__iter__
        and _torch.call_methods(kind) == _torch.call_methods(Module)
    )


def _block_of(kind: type) -> Block | None:
    """The block whose methods a class has unchanged."""
    for block in _BLOCKS:
        known = getattr(sys.modules.get(block.module), block.name, None)
        if known is not None and issubclass(kind, known):
            same = (
                getattr(kind, name, None) is getattr(known, name, kind)
                for name in ("forward", block.method)
            )
            same_call = _torch.call_methods(kind) == _torch.call_methods(Module)
            return block if same_call and all(same) else None
    return None


def is_relu(follower: object) -> bool:
    """Whether what runs next is PyTorch's ReLU, a module or a function."""
    return type(follower) is ReLU or follower in _RELU_FUNCTIONS


def why_apart(linear: Module, follower: object) -> str:
    """Why a Linear and what is run behind it can't be one operator now; empty where they can."""
    if type(linear) is not Linear:
        return "a subclass of Linear, whose forward may be its own"
    if not is_relu(follower):
        name = getattr(follower, "__name__", type(follower).__name__)
        return (
            f"followed by {name}, not by ReLU"
            if follower
            else "nothing follows it in its Sequential"
        )
    if _torch.is_observed(linear):
        return "hooks or a forward of its own on it"
    if isinstance(follower, Module) and _torch.is_observed(follower):
        return "hooks or a forward of its own on the ReLU behind it"
    parameters, own = _torch.parameters(linear), vars(linear)
    for name in ("weight", "bias"):
        if name not in parameters or name in own:
            return f"its {name} is no parameter of its own"
        # The compiler exports tensors of its own classes.
        if type(parameters[name]) not in _PLAIN and not is_compiling():
            return f"its {name} is no plain parameter"
    return ""


_PLAIN = (Parameter, Tensor, type(None))


def why_all_apart() -> str:
    """Why no container may run anything fused now, nor the modules of another by themselves."""
    if _torch.has_global_hooks():
        return "hooks on all modules"
    if is_compiling():  # which sees what is called, and can't trace the rest
        return ""
    if _torch.has_modes():
        return "a mode sees PyTorch's functions"
    if _in_use() != _STOCK:
        return "PyTorch's functions are replaced, as by torch.fx"
    return ""


def _in_use() -> tuple[Callable[..., Any], ...]:
    """What a row of modules calls."""
    called = (Sequential.forward, Linear.forward, ReLU.forward, F.linear, F.relu, torch.relu)
    return (*called, *_torch.call_methods(Linear), *_torch.call_methods(ReLU))


# None for what has been replaced before fastnn was imported: nothing is that.
_STOCK = tuple(one if _torch.is_its_own(one) else None for one in _in_use())


# ---- how it is run -------------------------------------------------------------------------------


def _run_row(self: Sequential, input: Any) -> Any:
    if why_all_apart():
        return Sequential.forward(self, input)
    linear = None  # waits for what is run next
    for _, module in _row(self):
        if linear is not None:
            if not why_apart(linear, module):
                input, linear = _run_pair(linear, input), None
                continue
            input, linear = linear(input), None
        if type(module) is Linear:
            linear = module
        else:
            input = module(input)
    return input if linear is None else linear(input)


def _run_pair(linear: Linear, input: Tensor) -> Tensor:
    parameters = _torch.parameters(linear)
    return linear_relu(input, parameters["weight"], parameters["bias"])


class _WithoutReLU:
    """A block as its own method sees it: the Linear applies the ReLU, the activation nothing."""

    def __init__(self, module: Module, block: Block) -> None:
        self._module = module
        setattr(self, block.linear, functools.partial(_run_pair, getattr(module, block.linear)))
        setattr(self, block.activation, lambda input: input)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _run_block(method: Callable[..., Any], block: Block) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: Module, *args: Any, **kwargs: Any) -> Any:
        linear, activation = getattr(self, block.linear), getattr(self, block.activation)
        apart = why_apart(linear, activation) or why_all_apart()
        return method(self if apart else _WithoutReLU(self, block), *args, **kwargs)

    return run


# ---- its class -----------------------------------------------------------------------------------


class Fused(Module):
    """Beside a container's own class; copies and pickles of the container have it too."""

    def __init_subclass__(cls) -> None:
        """Not the program's own: this is no class of the program's."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        reduced = super().__reduce_ex__(2)
        if isinstance(reduced, str) or getattr(reduced[0], "__name__", "") != "__newobj__":
            return reduced  # the program's own way; what it makes is not fused
        return _new, (stock_class(type(self)),), *reduced[2:]

    def __prepare_scriptable__(self) -> Module:
        """What torch.jit.script reads instead: its compiler knows PyTorch's own class."""
        stock = _torch.copy_with_own_children(self)
        stock.__class__ = stock_class(type(self))
        return stock


def _new(stock: type) -> Module:
    """An object without attributes yet, which pickle and copy give it."""
    return object.__new__(fused_class(stock))


def fused_class(stock: type) -> type:
    """The class that runs the pairs of a container as one operator; other classes as they are."""
    block = _block_of(stock)
    return _fused_class(stock, block) if block or _runs_a_row(stock) else stock


@functools.cache
def _fused_class(stock: type, block: Block | None) -> type:
    method, run = "forward", _run_row
    if block is not None:
        method, run = block.method, _run_block(getattr(stock, block.method), block)
    # Tools tell PyTorch's modules by the package of their class.
    namespace = {method: run, "__module__": stock.__module__}
    return type(f"Fused{stock.__name__}", (Fused, stock), namespace)


def stock_class(kind: type) -> type:
    """The class that a container had before it was fused, and torch perhaps made another of it."""
    fused = next((base for base in kind.__mro__ if Fused in base.__bases__), None)
    return kind if fused is None else fused.__bases__[1]
