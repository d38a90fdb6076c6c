"""Tensors of classes that don't know our functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.logging_tensor import LoggingTensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map_only

import fastnn
from support.marks import needs_extension
from support.modes import CONTEXTS, FunctionRecorder
from support.operator_cases import CASES
from support.operators import (
    FUNCTIONS,
    TORCH,
    leaves_of,
    memory_of,
    ours,
    value_and_gradients,
)
from support.sample_inputs import OPS, sample_input


class Wrapper(Tensor):
    """Keeps its values in another tensor."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # the compiler's log prints it
        return f"{type(self).__name__}({self.inner})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: object) -> Tensor:
        return cls(inner["inner"])

    # What torch itself needs from any tensor.
    COPIES = (torch.ops.aten.clone.default, torch.ops.aten.detach.default)

    @classmethod
    def on_inner(cls, func: Callable, args: tuple, kwargs: dict | None) -> Any:
        args, kwargs = tree_map_only(cls, lambda wrapper: wrapper.inner, (args, kwargs or {}))
        return func(*args, **kwargs)


class KnowsFunctions(Wrapper):
    """Like weight-only quantised weights: knows torch's functions, and no operator."""

    KNOWN = (F.linear, F.log_softmax, F.nll_loss, F.cross_entropy)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in cls.KNOWN:
            return cls.on_inner(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in cls.COPIES:
            return cls(cls.on_inner(func, args, kwargs))
        raise NotImplementedError(f"{cls.__name__} has no {func}")


class KnowsOperators(Wrapper):
    """Like quantised tensors written in terms of aten's operators."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            raise NotImplementedError(f"{cls.__name__} has no {func}")
        result = cls.on_inner(func, args, kwargs)
        return cls(result) if func in (*cls.COPIES, torch.ops.aten.t.default) else result


class RefusesOurs(Tensor):
    """Like the weights of per-sample gradients: rejects functions that are not torch's."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in map(ours, OPS):
            raise RuntimeError(f"{cls.__name__} cannot handle {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs)


class DoesNotKnowOurs(RefusesOurs):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in map(ours, OPS):
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs)


CLASSES = {
    "KnowsFunctions": KnowsFunctions,
    "KnowsOperators": KnowsOperators,
    "LoggingTensor": LoggingTensor,  # knows every operator
    "RefusesOurs": lambda tensor: tensor.as_subclass(RefusesOurs),
    "DoesNotKnowOurs": lambda tensor: tensor.as_subclass(DoesNotKnowOurs),
}
every_class = pytest.mark.parametrize("kind", CLASSES)


def plain(result: Tensor) -> Tensor:
    """The plain values of a class's result."""
    return result.elem if isinstance(result, LoggingTensor) else result.as_subclass(Tensor)


@every_class
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.capability("saving", "tensor subclasses that know PyTorch's functions or operators")
def test_classes_that_do_not_know_our_functions(implementation, op, context, kind):
    """They get torch's functions, and so its numbers, up to the last bits: torch itself sums label
    smoothing in another order if a class sees its operators."""
    sample = sample_input(op, torch.float32, CASES[op].every_tensor)
    arguments = {**dict(enumerate(sample.args)), **sample.kwargs}
    expected = TORCH[op](*sample.args, **sample.kwargs)
    for key in [key for key, value in arguments.items() if isinstance(value, Tensor)]:
        with context():
            given = {**arguments, key: CLASSES[kind](arguments[key])}
            positional = [given.pop(i) for i in range(len(sample.args))]
            result = plain(ours(op)(*positional, **given))
            torch.testing.assert_close(result, expected, rtol=4e-7, atol=0)


@every_class
@pytest.mark.parametrize("op", OPS)
def test_modes_see_our_function_before_a_class_gets_torchs(op, kind):
    sample = sample_input(op, torch.float32, CASES[op].every_tensor)
    with FunctionRecorder() as recorder:
        given = CLASSES[kind](sample.args[0])
        recorder.called.clear()
        result = ours(op)(given, *sample.args[1:], **sample.kwargs)
    assert recorder.called[0] is ours(op)
    assert torch.equal(plain(result), TORCH[op](*sample.args, **sample.kwargs))


@pytest.mark.parametrize("kind", ["KnowsFunctions", "KnowsOperators", "RefusesOurs"])
def test_frozen_weights_of_such_a_class_in_a_layer(implementation, kind):
    layer = fastnn.nn.LinearReLU(6, 5)
    plain_weight = layer.weight.detach()
    layer.weight = torch.nn.Parameter(CLASSES[kind](plain_weight), requires_grad=False)
    input = torch.randn(4, 6, requires_grad=True)
    wanted = [input, layer.bias]
    gradients = [
        torch.autograd.grad(output.as_subclass(Tensor).square().sum(), wanted)
        for output in (layer(input), TORCH["linear_relu"](input, plain_weight, layer.bias))
    ]
    assert all(torch.equal(plain(mine), theirs) for mine, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["KnowsFunctions", "KnowsOperators", "RefusesOurs"])
@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_class_weights_of_such_a_class_in_a_loss(implementation, op, kind):
    weight, rows, target = torch.rand(3), torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    loss = {"nll_loss": fastnn.nn.NLLLoss, "cross_entropy": fastnn.nn.CrossEntropyLoss}[op]
    result = loss(weight=CLASSES[kind](weight))(rows, target)
    assert torch.equal(plain(result), TORCH[op](rows, target, weight))


@every_class
def test_what_torch_raises_for_a_class_stands_alone(kind):
    weight = CLASSES[kind](torch.randn(5, 3))
    with pytest.raises(RuntimeError) as theirs:
        F.linear(torch.randn(4, 7), weight)
    with pytest.raises(RuntimeError) as mine:
        fastnn.functional.linear_relu(torch.randn(4, 7), weight)
    assert str(mine.value) == str(theirs.value)
    assert mine.value.__context__ is None


@needs_extension
def test_a_mode_alone_changes_no_error():
    with FunctionRecorder(), pytest.raises(RuntimeError, match="linear_relu: expected input's"):
        fastnn.functional.linear_relu(torch.randn(4, 7), torch.randn(5, 3))


COMPILED_CLASSES = {
    "KnowsFunctions": KnowsFunctions,
    "KnowsOperators": KnowsOperators,
    "TwoTensor": lambda tensor: TwoTensor(tensor, 2 * tensor),
}


@needs_extension
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", COMPILED_CLASSES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.capability("compile", "tensor subclasses that know PyTorch's functions or operators")
def test_such_classes_in_one_graph(op, kind):
    sample = sample_input(op, torch.float32, CASES[op].every_tensor)
    given = COMPILED_CLASSES[kind](sample.args[0])

    def compiled(function: Callable[..., Tensor]) -> Tensor:
        call = torch.compile(
            lambda x: function(x, *sample.args[1:], **sample.kwargs),
            backend="aot_eager",
            fullgraph=True,
        )
        return call(given)

    mine, theirs = compiled(ours(op)), compiled(TORCH[op])
    assert type(mine) is type(theirs)
    for part in ("a", "b") if kind == "TwoTensor" else ("data",):
        assert torch.equal(getattr(mine, part), getattr(theirs, part))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("op", OPS)
def test_without_gradients(implementation, op, context):
    sample = sample_input(op, torch.float32, CASES[op].every_tensor)
    leaves = leaves_of(op, sample)
    direct = ours(op)(*sample.args, **sample.kwargs)
    with context():
        result = ours(op)(*leaves, *sample.args[len(leaves) :], **sample.kwargs)
    assert not result.requires_grad
    assert result.grad_fn is None
    assert result.is_inference() == (context is torch.inference_mode)
    assert torch.equal(result, direct)


@pytest.mark.parametrize("op", OPS)
def test_a_function_gives_the_same_bits(op):
    sample = sample_input(op, torch.float32, CASES[op].every_tensor)
    results = value_and_gradients(FUNCTIONS[op].apply, op, sample)
    direct = value_and_gradients(ours(op), op, sample)
    for result, expected in zip(results, direct, strict=True):
        assert torch.equal(result, expected)


@needs_extension
@pytest.mark.parametrize("op", OPS)
def test_the_operator_itself_is_the_function(op):
    """torch.ops.fastnn.<op>, called directly, with autograd."""
    sample = sample_input(op, torch.float32, CASES[op].every_tensor)
    results = value_and_gradients(getattr(torch.ops.fastnn, op), op, sample)
    direct = value_and_gradients(ours(op), op, sample)
    for result, expected in zip(results, direct, strict=True):
        assert torch.equal(memory_of(result), memory_of(expected))
