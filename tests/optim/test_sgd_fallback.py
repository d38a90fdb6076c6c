"""What SGD's fused pass can't do and leaves to torch's own step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

import fastnn
from support.marks import needs_grad_dtype
from support.optimizers import (
    EVERYTHING,
    MOMENTUM,
    OPTIMIZERS,
    OPTIONS,
    Recorder,
    TaggedParameter,
    assert_same_training,
    make_pair,
    make_params,
    momentum_buffer,
    option_name,
    params_of,
    randn,
    set_grads,
    tolerance,
    train,
    transposed,
)


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sparse_gradients_beside_dense_ones(momentum, foreach):
    def run(kind) -> torch.optim.Optimizer:
        embedding = torch.nn.Embedding(10, 3, sparse=True, dtype=torch.float64)
        dense = make_params((3,))[0]
        with torch.no_grad():
            embedding.weight.copy_(randn((10, 3), torch.float64, 5))
        optimizer = kind([embedding.weight, dense], lr=0.1, momentum=momentum, foreach=foreach)
        for step in range(4):
            optimizer.zero_grad()
            rows = embedding(torch.tensor([step, step + 1, step]))
            (rows * dense).sum().backward()
            assert embedding.weight.grad.is_sparse
            optimizer.step()
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    for mine, theirs in zip(params_of(ours), params_of(stock), strict=True):
        # The dense parameter's rounding enters the sparse one's gradients, which are linear in it.
        atol = tolerance(torch.float64, 4, theirs, torch.tensor(10.0))  # no value reaches 10
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=0, atol=atol)


def test_sparse_gradients_with_fused_raise_as_in_torch():
    for kind in OPTIMIZERS:
        embedding = torch.nn.Embedding(4, 3, sparse=True)
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            kind(embedding.parameters(), lr=0.1, fused=True).step()


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_complex_parameters(options):
    ours, stock = (
        kind(make_params((5, 3), dtype=torch.complex128) + make_params((7,)), **options)
        for kind in OPTIMIZERS
    )
    for optimizer in (ours, stock):
        for seed in range(4):
            set_grads(params_of(optimizer), seed)
            grad = params_of(optimizer)[0].grad
            grad.imag = randn(tuple(grad.shape), torch.float64, 500 + seed)
            optimizer.step()
    mine, theirs = params_of(ours)[0].detach(), params_of(stock)[0].detach()
    assert torch.equal(mine, theirs)  # exactly the same ATen calls
    # The real parameter next to it: no value reaches 10 in 4 steps.
    atol = tolerance(torch.float64, 4, torch.tensor(10.0))
    torch.testing.assert_close(params_of(ours)[1], params_of(stock)[1], rtol=0, atol=atol)


def test_complex_parameters_with_fused_raise_as_in_torch():
    for kind in OPTIMIZERS:
        params = make_params((3,), dtype=torch.complex64)
        set_grads(params, 1)
        with pytest.raises(RuntimeError, match="floating point Tensors"):
            kind(params, lr=0.1, fused=True).step()


@needs_grad_dtype
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_gradient_of_another_dtype(options, grad_dtype):
    def run(kind) -> torch.optim.Optimizer:
        params = make_params((5, 3), (7,), dtype=torch.float32)
        params[0].grad_dtype = None  # allows any dtype
        optimizer = kind(params, **options)
        for seed in range(3):
            set_grads(params, seed)
            params[0].grad = params[0].grad.to(grad_dtype)
            optimizer.step()
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    mine, theirs = params_of(ours)[0], params_of(stock)[0]
    assert torch.equal(mine, theirs)  # exactly the same ATen calls
    if options["momentum"]:
        buffers = momentum_buffer(ours, mine), momentum_buffer(stock, theirs)
        assert buffers[0].dtype == buffers[1].dtype
        assert torch.equal(*buffers)


@needs_grad_dtype
def test_gradient_of_another_dtype_with_fused_raises_as_in_torch():
    for kind in OPTIMIZERS:
        params = make_params((3,), dtype=torch.float32)
        params[0].grad_dtype = None
        params[0].grad = torch.ones(3, dtype=torch.bfloat16)
        # torch 2.11 raises the second, when it groups the tensors by dtype.
        message = "expected scalar type|the same device and the same dtype"
        with pytest.raises(RuntimeError, match=message):
            kind(params, **MOMENTUM, fused=True).step()


def negated(value: Tensor) -> Tensor:
    """The value with a lazy minus."""
    lazy = torch.complex(torch.zeros_like(value), -value).conj().imag
    assert lazy.is_neg()
    return lazy


def with_lazy(what: str, optimizer_class, fused: bool | None) -> torch.optim.Optimizer:
    """An optimizer whose second parameter has something lazy."""
    params = make_params((3,), (5,))
    if what == "parameter":
        params[1] = torch.nn.Parameter(negated(params[1].detach()))
    options = {**MOMENTUM, "lr": negated(torch.tensor(0.1)) if what == "lr" else 0.1}
    optimizer = optimizer_class(params, fused=fused, **options)
    set_grads(params, 0)
    if what == "gradient":
        params[1].grad = negated(params[1].grad)
    if what == "zero gradient":
        params[1].grad = torch._efficientzerotensor(
            5, dtype=torch.float64, device=torch.get_default_device()
        )
    if what == "buffer":
        optimizer.state[params[1]]["momentum_buffer"] = negated(randn((5,), torch.float64, 1))
    return optimizer


@pytest.mark.parametrize("what", ["parameter", "gradient", "zero gradient", "buffer", "lr"])
def test_lazy_tensors_are_stepped_as_in_torch(what):
    """The dispatcher passes no lazy tensor to an operator in a list that is written to."""
    ours, stock = (with_lazy(what, kind, fused=None) for kind in OPTIMIZERS)
    for optimizer in (ours, stock):
        for _ in range(3):
            optimizer.step()
    assert_same_training(ours, stock, 3)


@pytest.mark.parametrize("what", ["parameter", "gradient", "zero gradient"])
def test_lazy_tensors_with_fused_raise_as_in_torch(what):
    for kind in OPTIMIZERS:
        optimizer = with_lazy(what, kind, fused=True)
        before = [param.detach().clone() for param in params_of(optimizer)]
        with pytest.raises(RuntimeError, match=r"(?i)negat|zero ?tensors"):
            optimizer.step()
        for param, value in zip(params_of(optimizer), before, strict=True):
            assert torch.equal(param, value)


@pytest.mark.parametrize("elements", [5, 100_000], ids=["one chunk", "several chunks"])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_copy_on_write_tensors(momentum, elements):
    """Tensors that are written to get their own memory; those only read stay shared."""
    sources = [randn((elements,), torch.float32, seed) for seed in range(3)]
    before = [source.clone() for source in sources]

    def run(kind, share: Callable[[Tensor], Tensor]) -> torch.optim.Optimizer:
        param = torch.nn.Parameter(share(sources[0]))
        optimizer = kind([param], lr=0.1, momentum=momentum)
        if momentum:
            optimizer.state[param]["momentum_buffer"] = share(sources[2])
        param.grad = share(sources[1])
        for _ in range(3):
            optimizer.step()
        return optimizer

    ours = run(fastnn.optim.SGD, torch._lazy_clone)
    assert_same_training(ours, run(torch.optim.SGD, torch.clone), 3)
    assert torch._C._is_cow_tensor(params_of(ours)[0].grad)
    assert all(torch.equal(*pair) for pair in zip(sources, before, strict=True))


class WrapperTensor(Tensor):
    """Keeps its data in another tensor; its own storage is empty, like DTensor's."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrapped = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        result = func(*unwrapped[0], **unwrapped[1])
        if func._schema.is_mutable:
            return args[0]
        return tree_map_only(Tensor, cls, result)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_simple_parameter_subclass_beside_plain_parameters(options, fused):
    """Compares with torch's default: its fused=True is wrong where strides differ."""

    def run(kind, fused: bool | None) -> torch.optim.Optimizer:
        tagged = [TaggedParameter(p.detach()) for p in make_params((5, 3), (7,))]
        optimizer = kind([*tagged, *make_params((3,))], fused=fused, **options)
        for seed in range(3):
            set_grads(params_of(optimizer), seed)
            tagged[0].grad = transposed(tagged[0].grad)
            optimizer.step()
        return optimizer

    ours, stock = run(fastnn.optim.SGD, fused), run(torch.optim.SGD, None)
    assert_same_training(ours, stock, 3)


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.capability("saving", "tensor subclasses: `__torch_dispatch__`", operators=["SGD"])
def test_wrapper_subclass(options):
    def run(kind) -> list[Tensor]:
        inner = randn((5, 3), torch.float64, 0)
        wrapped = torch.nn.Parameter(WrapperTensor(inner))
        (plain,) = make_params((7,))
        optimizer = kind([wrapped, plain], **options)
        for seed in range(3):
            wrapped.grad = WrapperTensor(randn((5, 3), torch.float64, 100 + seed))
            plain.grad = randn((7,), torch.float64, 200 + seed)
            optimizer.step()
        return [inner, plain.detach()]

    mine, theirs = (run(kind) for kind in OPTIMIZERS)
    assert not torch.equal(theirs[0], randn((5, 3), torch.float64, 0))
    for a, b in zip(mine, theirs, strict=True):
        atol = tolerance(torch.float64, 3, torch.tensor(10.0))  # no value reaches 10
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_plain_parameter_with_a_wrapped_gradient():
    def run(kind) -> Tensor:
        (param,) = make_params((5, 3))
        param.grad = randn((5, 3), torch.float64, 1)
        optimizer = kind([param], lr=0.1)
        with PretendSubclassGradient(param):
            optimizer.step()
        return param.detach()

    mine, theirs = (run(kind) for kind in OPTIMIZERS)
    atol = tolerance(torch.float64, 1, theirs, torch.ones(1))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


class PretendSubclassGradient:
    """Temporarily makes a parameter's gradient a subclass of Tensor."""

    def __init__(self, param: Tensor) -> None:
        self.param = param

    def __enter__(self) -> None:
        self.param.grad = self.param.grad.as_subclass(SubclassTensor)

    def __exit__(self, *_: object) -> None:
        self.param.grad = None


class SubclassTensor(Tensor):
    """A subclass that uses Tensor's own storage."""


@pytest.mark.capability(
    "saving",
    "modes: `__torch_function__`, `__torch_dispatch__`",
    operators=["SGD"],
)
def test_dispatch_modes_see_the_step():
    ours, stock = make_pair((5, 3), **MOMENTUM)
    train(ours, 1)
    train(stock, 1)
    set_grads(params_of(ours), 2)
    with Recorder() as recorder:
        ours.step()
    assert recorder.mutating
    train(stock, 1, first_seed=2)
    assert_same_training(ours, stock, 2)


@pytest.mark.capability("saving", "fake tensors, the meta device", operators=["SGD"])
def test_fake_tensors():
    with FakeTensorMode():
        model = torch.nn.Linear(3, 2)
        optimizer = fastnn.optim.SGD(model.parameters(), **EVERYTHING)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).sum().backward()
            optimizer.step()
    for param in model.parameters():
        assert isinstance(momentum_buffer(optimizer, param), FakeTensor)


@pytest.mark.capability("saving", "fake tensors, the meta device", operators=["SGD"])
def test_meta_device():
    param = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = fastnn.optim.SGD([param], **EVERYTHING)
    for _ in range(2):
        param.grad = torch.empty(3, device="meta")
        optimizer.step()
    assert momentum_buffer(optimizer, param).is_meta
