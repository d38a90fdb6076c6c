"""Modules that run their Linear layers and the ReLUs after them as one operator, unless something
observes the values in between.

The layers stay PyTorch's own. Their container gets a class that checks them at each call: a layer
that has been hooked, replaced, parametrized or compiled runs by itself from then on, and a layer
that the program calls directly is the stock layer.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Linear, Module, Parameter, ReLU, Sequential
from torch.nn import functional as F

from fastnn import _torch
from fastnn.functional import linear, linear_relu, mlp

_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)


class Block(NamedTuple):
    """A class with a method that runs a Linear and passes its output only to an activation."""

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


def linears_run_by(container: Module) -> list[tuple[str, Module, str]]:
    """The Linears that a container runs, each with its path there and the reason to leave it."""
    kind = stock_class(type(container))
    block = _block_of(kind)
    if _torch.has_own_forward(container) or (block and block.method in vars(container)):
        return []
    if block:
        linear = getattr(container, block.linear, None)
        follower = getattr(container, block.activation, None)
        if not isinstance(linear, Linear):
            return []
        return [(block.linear, linear, _why_apart(linear, follower))]
    row = row_of(container) if runs_a_row(kind) else ()
    return [(path, module, _why_left(module)) for path, module in row if isinstance(module, Linear)]


def is_fused(container: Module) -> bool:
    """Whether the container's class runs layers through our operators."""
    # The class of a scripted module has no forward.
    return isinstance(container, Fused) or getattr(type(container), "forward", None) is run_row


def can_be_fused(container: Module) -> bool:
    """Whether it runs a layer that could be fused; hooks are checked at each call, not here."""
    kind = stock_class(type(container))
    block = _block_of(kind)
    return any(
        type(linear) is Linear and (not block or is_relu(getattr(container, block.activation)))
        for _, linear, _ in linears_run_by(container)
    )


def row_of(sequential: Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and modules that a Sequential runs in order, nested Sequentials included."""
    for name, module in _torch.submodules(sequential).items():
        if (
            isinstance(module, Sequential)
            and runs_a_row(type(module))
            and not _torch.is_observed(module)
        ):
            yield from row_of(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def runs_a_row(kind: type) -> bool:
    """Whether a class calls its children one after another, as nn.Sequential does."""
    return (
        issubclass(kind, Sequential)
        and kind.forward in (Sequential.forward, run_row)
        and kind.__iter__ is Sequential.__iter__
        and _torch.call_methods(kind) == _torch.call_methods(Module)
    )


def _block_of(kind: type) -> Block | None:
    """The block that a class derives from without changing its methods."""
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
    """Whether an activation is PyTorch's ReLU, as a module or a function."""
    return type(follower) is ReLU or follower in _RELU_FUNCTIONS


def _why_apart(linear: Module, follower: object) -> str:
    """Why a block's Linear and its activation can't be one operator now; empty if they can."""
    if not is_relu(follower):
        name = getattr(follower, "__name__", type(follower).__name__)
        return f"followed by {name}, not by ReLU"
    why = _why_left(linear)
    if not why and isinstance(follower, Module) and _torch.is_observed(follower):
        return "hooks or a forward of its own on the ReLU behind it"
    return why


def _why_left(linear: Module) -> str:
    """Why our operator can't run a Linear now; empty if it can."""
    if type(linear) is not Linear:
        return "a subclass of Linear, whose forward may be its own"
    return why_not_plain(linear)


def why_not_plain(linear: Module) -> str:
    """Why a Linear is more than its weight and bias now; empty if it isn't."""
    if _torch.is_observed(linear):
        return "hooks or a forward of its own on it"
    parameters, own = _torch.parameters(linear), vars(linear)
    for name in ("weight", "bias"):
        if name not in parameters or name in own:
            return f"its {name} is not one of its parameters"
        # torch.export uses tensor classes of its own.
        if type(parameters[name]) not in _PLAIN and not is_compiling():
            return f"its {name} is no plain parameter"
    return ""


_PLAIN = (Parameter, Tensor, type(None))


def why_all_apart() -> str:
    """Why no container may fuse anything now; empty if it may."""
    if _torch.has_global_hooks():
        return "hooks on all modules"
    if is_compiling():  # Dynamo traces the calls themselves, and can't trace the checks below
        return ""
    if _torch.has_modes():
        return "a torch function or dispatch mode is active"
    if _in_use() != _STOCK:
        return "PyTorch's functions have been replaced, for example by torch.fx"
    return ""


def _in_use() -> tuple[Callable[..., Any], ...]:
    """The functions that a row of modules calls."""
    called = (Sequential.forward, Linear.forward, ReLU.forward, F.linear, F.relu, torch.relu)
    return (*called, *_torch.call_methods(Linear), *_torch.call_methods(ReLU))


# None, which equals no function, for one that was replaced before fastnn was imported.
_STOCK = tuple(one if _torch.is_its_own(one) else None for one in _in_use())


# ---- how it is run -------------------------------------------------------------------------------


def run_row(self: Sequential, input: Any) -> Any:
    """The forward of a fused ``Sequential``: runs Linears and ReLUs in a row as one operator."""
    if why_all_apart():
        return Sequential.forward(self, input)
    chain: list[Linear] = []
    activations: list[str | None] = []
    for _, module in row_of(self):
        kind = type(module)
        if kind is Linear and not _why_left(module):
            chain.append(module)
            activations.append(None)
        elif kind is ReLU and chain and activations[-1] is None and not _torch.is_observed(module):
            activations[-1] = "relu"
        else:
            if chain:
                input = _run_chain(chain, activations, input)
                chain, activations = [], []
            input = module(input)
    return _run_chain(chain, activations, input) if chain else input


run_row.__qualname__ = Sequential.forward.__qualname__  # which Python's errors show


def _run_chain(chain: list[Linear], activations: list[str | None], input: Tensor) -> Tensor:
    parameters = [_torch.parameters(linear) for linear in chain]
    weights, biases = [own["weight"] for own in parameters], [own["bias"] for own in parameters]
    if len(chain) > 1:
        return mlp(input, weights, biases, activations)
    return (linear_relu if activations[0] else linear)(input, weights[0], biases[0])


def _run_pair(layer: Linear, input: Tensor) -> Tensor:
    return _run_chain([layer], ["relu"], input)


class _WithoutReLU:
    """A block as its method sees it: the Linear includes the ReLU, the activation does nothing."""

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
        apart = _why_apart(linear, activation) or why_all_apart()
        return method(self if apart else _WithoutReLU(self, block), *args, **kwargs)

    return run


# ---- its class -----------------------------------------------------------------------------------


class Fused(Module):
    """Marks the class of a fused container; copies and pickles of the container keep it."""

    def __init_subclass__(cls) -> None:
        """Skips the user class's own __init_subclass__ hook."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        reduced = super().__reduce_ex__(2)
        if isinstance(reduced, str) or getattr(reduced[0], "__name__", "") != "__newobj__":
            return reduced  # the user class's own reduction; what it rebuilds is not fused
        return _new, (stock_class(type(self)),), *reduced[2:]

    def __prepare_scriptable__(self) -> Module:
        """What torch.jit.script compiles instead: it only knows PyTorch's own class."""
        return as_stock(self, stock_class(type(self)))


def as_stock(module: Module, kind: type[Module]) -> Module:
    """A copy with another class, over the same children."""
    stock = _torch.copy_with_own_children(module)
    stock.__class__ = kind
    return stock


def _new(stock: type) -> Module:
    """An object without attributes, which pickle and copy then fill in."""
    return object.__new__(fused_class(stock))


def fused_class(stock: type) -> type:
    """The class that runs a container's layers through our operators, or ``stock`` itself."""
    block = _block_of(stock)
    return _fused_class(stock, block) if block or runs_a_row(stock) else stock


@functools.cache
def _fused_class(stock: type, block: Block | None) -> type:
    method, run = "forward", run_row
    if block is not None:
        method, run = block.method, _run_block(getattr(stock, block.method), block)
    # Tools recognise PyTorch's modules by the package of their class.
    namespace = {method: run, "__module__": stock.__module__}
    return type(f"Fused{stock.__name__}", (Fused, stock), namespace)


def stock_class(kind: type) -> type:
    """The class of a container before it was fused, even if torch has subclassed it since."""
    fused = next((base for base in kind.__mro__ if Fused in base.__bases__), None)
    return kind if fused is None else fused.__bases__[1]
