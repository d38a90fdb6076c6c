"""fastnn.optim.SGD against torch.optim.SGD, and against SGD's formula in float64."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import io
import math
import pickle
import re
import warnings
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.profiler import profile
from torch.utils._pytree import tree_map_only

import fastnn
from support.marks import needs_extension, needs_grad_dtype
from support.optimizers import (
    DTYPES,
    EVERYTHING,
    HALF,
    MOMENTUM,
    OPTIMIZERS,
    OPTIONS,
    ExactRun,
    OperatorNames,
    OwnStep,
    Recorder,
    TaggedParameter,
    assert_same_training,
    assert_within,
    compute_dtype,
    contiguous,
    flat,
    layout_grads,
    layout_params,
    make_pair,
    make_params,
    momentum_buffer,
    option_name,
    params_of,
    randn,
    set_grads,
    set_layout_grads,
    sliced,
    threads,
    through_pickle,
    through_torch_save,
    tolerance,
    train,
    transposed,
)


@pytest.fixture(autouse=True)
def _torch_steps_parameter_by_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does by default on the CPU. On a GPU its default is foreach, which writes to the
    gradients (Nesterov's) and takes parameters that share memory for several."""
    module = importlib.import_module("torch.optim.sgd")  # torch.optim hides it
    monkeypatch.setattr(module, "_default_to_fused_or_foreach", lambda *_, **__: (False, False))


def grad_scaler(**options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(torch.get_default_device().type, **options)


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_long_run_stays_within_rounding_of_formula_and_torch(options, dtype):
    ours, stock = (kind(layout_params(dtype), **options) for kind in OPTIMIZERS)
    start = flat(params_of(ours))
    exact = ExactRun(start, dtype, compute_dtype(dtype))
    stock_exact = ExactRun(start, dtype, dtype)  # torch rounds every intermediate
    # The formula itself is evaluated in float64: its own error counts where ours is float64 too.
    oracle = ExactRun(start, torch.float64, torch.float64)
    for seed in range(50):
        grad = flat(layout_grads(dtype, seed))
        for run in (exact, stock_exact, oracle):
            run.step(grad, **options)
        for optimizer in (ours, stock):
            set_layout_grads(params_of(optimizer), seed)
            optimizer.step()
        # At each step: the first have seen the fewest roundings and allow the least.
        mine, theirs = flat(params_of(ours)), flat(params_of(stock))
        assert_within(mine, exact.param, exact.param_error + oracle.param_error)
        assert_within(mine, theirs, exact.param_error + stock_exact.param_error)
        if options["momentum"]:
            buffers = flat([momentum_buffer(ours, p) for p in params_of(ours)])
            assert_within(buffers, exact.buffer, exact.buffer_error + oracle.buffer_error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_takes_any_layout(dtype):
    """torch's fused=True is silently wrong where strides differ: the peer is its default."""
    ours = fastnn.optim.SGD(layout_params(dtype), fused=True, **EVERYTHING)
    stock = torch.optim.SGD(layout_params(dtype), **EVERYTHING)
    for optimizer in (ours, stock):
        for seed in range(4):
            set_layout_grads(params_of(optimizer), seed)
            optimizer.step()
    assert_same_training(ours, stock, 4)


def test_two_hundred_steps_of_float32():
    ours, stock = make_pair((13, 11), (29,), **EVERYTHING)
    for optimizer in (ours, stock):
        train(optimizer, 200)
    assert_same_training(ours, stock, 200)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_powers_of_two(dtype):
    """Vector widths, unrolled blocks and cache-sized chunks all end at some power of two."""
    sizes = [(max(2**k + d, 0),) for k in range(16) for d in (-1, 0, 1)]
    ours, stock = (kind(make_params(*sizes, dtype=dtype), **EVERYTHING) for kind in OPTIMIZERS)
    for optimizer in (ours, stock):
        train(optimizer, 3)
    assert_same_training(ours, stock, 3)


def test_many_small_parameters():
    ours, stock = make_pair(*[(i % 7,) for i in range(400)], **MOMENTUM)
    for optimizer in (ours, stock):
        train(optimizer, 3)
    assert_same_training(ours, stock, 3)


@pytest.mark.capability(
    "precision", "parameters of several dtypes in one optimizer", operators=["SGD"]
)
def test_mixed_dtypes_in_one_group():
    def params() -> list[Tensor]:
        return [p for dtype in DTYPES for p in make_params((5, 3), (17,), dtype=dtype)]

    ours, stock = (kind(params(), **EVERYTHING) for kind in OPTIMIZERS)
    for optimizer in (ours, stock):
        train(optimizer, 10)
    assert_same_training(ours, stock, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_infinite_and_nan_values_go_where_torch_puts_them(value, options, dtype):
    """A decay of 0 must leave the parameter out of the gradient: 0 * inf would be NaN."""

    def run(kind) -> Tensor:
        params = [torch.nn.Parameter(torch.tensor([value, 1.0, 1.0], dtype=dtype))]
        optimizer = kind(params, **options)
        for _ in range(2):
            params[0].grad = torch.tensor([1.0, value, 1.0], dtype=dtype)
            optimizer.step()
        return params[0].detach()

    mine, theirs = (run(kind) for kind in OPTIMIZERS)
    # Two steps; infinities and NaNs must be the very same.
    atol = tolerance(dtype, 2, theirs[2:], torch.ones(1))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_same_bits_on_one_and_two_threads(options):
    def run(thread_count: int) -> list[Tensor]:
        params = make_params((300, 1001), (5,), (70_001,), dtype=torch.float32)
        with threads(thread_count):
            train(fastnn.optim.SGD(params, **options), 3)
        return params

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)


def test_memory_between_a_views_elements_is_untouched():
    base = torch.full((6, 10), 7.0)
    param = torch.nn.Parameter(base[1::2, 1:9:3])
    optimizer = fastnn.optim.SGD([param], **MOMENTUM)
    train(optimizer, 3)
    inside = torch.zeros(6, 10, dtype=torch.bool)
    inside[1::2, 1:9:3] = True
    assert bool((base[~inside] == 7).all())
    assert not bool((base[inside] == 7).any())


def test_neighbouring_views_of_one_buffer():
    """Flattened parameters: each is a slice of the same memory."""

    def run(kind) -> Tensor:
        buffer = randn((100,), torch.float64, 0)
        params = [torch.nn.Parameter(piece) for piece in buffer.split([33, 1, 66])]
        train(kind(params, **EVERYTHING), 5)
        return buffer

    mine, theirs = (run(kind) for kind in OPTIMIZERS)
    assert not torch.equal(mine, randn((100,), torch.float64, 0))
    atol = tolerance(torch.float64, 5, theirs, torch.tensor(10.0))  # no buffer exceeds 10
    torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


def test_overlapping_parameter_raises_as_in_torch():
    for kind in OPTIMIZERS:
        param = torch.nn.Parameter(torch.ones(1).expand(3))
        param.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match="single memory location"):
            kind([param], lr=0.1).step()
        assert param[0].item() == 1


# --- construction ---------------------------------------------------------------------------------


def test_signature_is_torchs():
    *ours, added = inspect.signature(fastnn.optim.SGD).parameters.values()
    stock = inspect.signature(torch.optim.SGD).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in stock
    ]
    assert (added.name, added.default) == ("float32_momentum", False)
    assert added.kind is inspect.Parameter.KEYWORD_ONLY
    steps = [inspect.signature(kind.step).parameters.values() for kind in OPTIMIZERS]
    assert [(p.name, p.default) for p in steps[0]] == [(p.name, p.default) for p in steps[1]]


def test_is_torchs_optimizer_with_torchs_groups_and_defaults():
    ours, stock = make_pair((2,), **EVERYTHING)
    assert isinstance(ours, torch.optim.SGD)
    assert ours.defaults == stock.defaults
    assert ours.param_groups[0].keys() == stock.param_groups[0].keys()
    assert repr(ours) == repr(stock)
    assert ours.state_dict() == stock.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -0.1},
        {"lr": torch.tensor(-0.1)},
        {"lr": torch.ones(2)},
        {"momentum": -0.1},
        {"weight_decay": -0.1},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"fused": True, "differentiable": True},
        {"fused": True, "foreach": True},
        {"betas": (0.9, 0.99)},
    ],
    ids=str,
)
def test_bad_options_raise_as_in_torch(options):
    with pytest.raises(Exception) as stock:
        torch.optim.SGD(make_params((2,)), **options)
    message = re.escape(str(stock.value))
    with pytest.raises(type(stock.value), match=f"^{message}$"):
        fastnn.optim.SGD(make_params((2,)), **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: [],
        lambda p: p,
        lambda p: ["weight"],
        lambda p: [p * 2],
        lambda p: [{"params": [p]}, {"params": [p]}],
        lambda p: [("weight", p), p],
    ],
    ids=["empty", "tensor", "string", "non-leaf", "in two groups", "half named"],
)
def test_bad_params_raise_as_in_torch(make: Callable[[Tensor], object]):
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(Exception) as stock:
        torch.optim.SGD(make(param), lr=0.1)
    message = re.escape(str(stock.value))
    with pytest.raises(type(stock.value), match=f"^{message}$"):
        fastnn.optim.SGD(make(param), lr=0.1)


@pytest.mark.parametrize("layout", [contiguous, sliced, transposed])
@pytest.mark.parametrize("options", [{"lr": 0.1}, MOMENTUM, EVERYTHING], ids=option_name)
def test_parameter_twice_in_a_group_warns_and_steps_twice(options, layout):
    """One parallel pass over all parameters would race here, copies of them would get lost."""

    def run(kind) -> torch.optim.Optimizer:
        shared = torch.nn.Parameter(layout(randn((500, 600), torch.float64, 0)))
        (other,) = make_params((3,))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = kind([shared, other, shared], **options)
        with threads(2):
            train(optimizer, 4)
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert_same_training(ours, stock, 2 * 4)


@pytest.mark.parametrize("shift", [0, 1000])
@pytest.mark.parametrize("options", [{"lr": 0.1}, MOMENTUM, EVERYTHING], ids=option_name)
def test_parameters_that_share_memory_step_one_after_the_other(options, shift):
    """Weights tied by their ``.data``: two parameters, one memory, or overlapping pieces of it."""

    def run(kind) -> torch.optim.Optimizer:
        memory = randn((300_000 + shift,), torch.float64, 0)
        first, second = memory[:300_000], memory[shift:]
        optimizer = kind([torch.nn.Parameter(first), torch.nn.Parameter(second)], **options)
        with threads(2):
            train(optimizer, 4)
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert_same_training(ours, stock, 2 * 4)


def test_named_parameters():
    model = torch.nn.Linear(3, 2)
    ours = fastnn.optim.SGD(model.named_parameters(), **MOMENTUM)
    assert ours.param_groups[0]["param_names"] == ["weight", "bias"]
    train(ours, 2)
    assert ours.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    stock = torch.optim.SGD(torch.nn.Linear(3, 2).named_parameters(), **MOMENTUM)
    stock.load_state_dict(ours.state_dict())
    assert len(stock.state) == 2


# --- options that change while training -----------------------------------------------------------

SCHEDULERS = {
    "StepLR": lambda optimizer: StepLR(optimizer, step_size=3, gamma=0.5),
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    # Sets lr and momentum anew at each step.
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=12),
}


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, lr):
    ours, stock = (
        kind(make_params((5, 3), (7,)), lr=copy.deepcopy(lr), momentum=0.9) for kind in OPTIMIZERS
    )
    for optimizer in (ours, stock):
        scheduler = SCHEDULERS[name](optimizer)
        for seed in range(10):
            train(optimizer, 1, first_seed=seed)
            scheduler.step()
    assert float(ours.param_groups[0]["lr"]) == float(stock.param_groups[0]["lr"]) != 0.1
    assert_same_training(ours, stock, 10)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lr_may_be_a_tensor_and_change_in_place(shape, dtype):
    ours, stock = (
        kind(make_params((5, 3)), lr=torch.full(shape, 0.1, dtype=dtype), momentum=0.9)
        for kind in OPTIMIZERS
    )
    for optimizer in (ours, stock):
        train(optimizer, 2)
        optimizer.param_groups[0]["lr"].fill_(0.03)
        train(optimizer, 2, first_seed=10)
    assert_same_training(ours, stock, 4)


def test_weight_decay_may_be_a_tensor():
    ours, stock = make_pair((5, 3), lr=0.1, weight_decay=torch.tensor(0.5))
    for optimizer in (ours, stock):
        train(optimizer, 3)
    assert_same_training(ours, stock, 3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", 0.02),
        ("momentum", 0.5),
        ("momentum", 0),  # an int, and no momentum any more
        ("dampening", 0.7),
        ("weight_decay", 0.3),
        ("nesterov", True),
        ("maximize", True),
        ("foreach", True),
    ],
)
def test_options_are_read_at_each_step(option, value):
    options = {**EVERYTHING, "dampening": 0.0} if option == "nesterov" else EVERYTHING
    ours, stock = make_pair((5, 3), (7,), **options)
    for optimizer in (ours, stock):
        train(optimizer, 3)
        optimizer.param_groups[0][option] = value
        train(optimizer, 3, first_seed=10)
    assert_same_training(ours, stock, 6)


def test_momentum_switched_off_and_on_again_finds_its_buffer():
    ours, stock = make_pair((5, 3), (7,), **EVERYTHING)
    train(ours, 2)
    before = [momentum_buffer(ours, p).clone() for p in params_of(ours)]
    train(stock, 2)
    for optimizer in (ours, stock):
        optimizer.param_groups[0]["momentum"] = 0.0
        train(optimizer, 2, first_seed=10)
    for param, buffer in zip(params_of(ours), before, strict=True):
        assert torch.equal(momentum_buffer(ours, param), buffer)
    for optimizer in (ours, stock):
        optimizer.param_groups[0]["momentum"] = 0.9
        train(optimizer, 2, first_seed=20)
    assert_same_training(ours, stock, 6)


def test_momentum_switched_on_later_starts_with_the_first_step_rule():
    ours, stock = make_pair((5, 3), (7,), lr=0.1, dampening=0.5)
    for optimizer in (ours, stock):
        train(optimizer, 2)
        assert all("momentum_buffer" not in optimizer.state[p] for p in params_of(optimizer))
        optimizer.param_groups[0]["momentum"] = 0.9
        train(optimizer, 1, first_seed=10)
    for param in params_of(ours):
        assert torch.equal(momentum_buffer(ours, param), param.grad)  # undampened
    for optimizer in (ours, stock):
        train(optimizer, 2, first_seed=20)
    assert_same_training(ours, stock, 5)


@pytest.mark.parametrize("fused", [None, True])
def test_late_first_gradient_starts_with_the_first_step_rule(fused):
    """torch's own fused=True raises here, so that the peer is its default."""
    ours = fastnn.optim.SGD(make_params((4,), (4,)), fused=fused, **EVERYTHING)
    stock = torch.optim.SGD(make_params((4,), (4,)), **EVERYTHING)
    for optimizer in (ours, stock):
        early, late = params_of(optimizer)
        for seed in range(3):
            set_grads([early], seed)
            optimizer.step()
        assert momentum_buffer(optimizer, late) is None
        train(optimizer, 1, first_seed=10)
        decayed = late.grad + 0.01 * make_params((4,), (4,))[1]
        # One product and one sum away from the formula, computed likewise in float64.
        atol = tolerance(torch.float64, 1, decayed)
        torch.testing.assert_close(momentum_buffer(optimizer, late), decayed, rtol=0, atol=atol)
        train(optimizer, 3, first_seed=20)
    assert_same_training(ours, stock, 7)


def test_parameter_without_gradient_is_left_alone():
    ours, stock = make_pair((4,), (4,), **EVERYTHING)
    for optimizer in (ours, stock):
        train(optimizer, 2)
        idle = params_of(optimizer)[1]
        before = idle.detach().clone(), momentum_buffer(optimizer, idle).clone()
        set_grads(params_of(optimizer), 10)
        idle.grad = None
        optimizer.step()
        assert torch.equal(idle, before[0])
        assert torch.equal(momentum_buffer(optimizer, idle), before[1])
        train(optimizer, 2, first_seed=20)
    assert_same_training(ours, stock, 5)


def test_step_without_any_gradient_does_nothing():
    ours, _ = make_pair((4,), (0,), **EVERYTHING)
    ours.step()
    assert torch.equal(params_of(ours)[0], make_params((4,))[0])
    assert all(not state for state in ours.state.values())


def test_groups_have_options_of_their_own():
    def make(kind) -> torch.optim.Optimizer:
        first, second, third, frozen = make_params((5, 3), (7,), (2, 2), (3,))
        frozen.requires_grad_(False)
        groups = [
            {"params": [first, frozen], "lr": 0.01, "nesterov": True, "dampening": 0.0},
            {"params": [second], "momentum": 0.0, "maximize": True},
            {"params": [third], "weight_decay": 0.3, "foreach": True},
        ]
        return kind(groups, **EVERYTHING)

    ours, stock = (make(kind) for kind in OPTIMIZERS)
    for optimizer in (ours, stock):
        for seed in range(5):
            set_grads([p for p in params_of(optimizer) if p.requires_grad], seed)
            optimizer.step()
    assert_same_training(ours, stock, 5)
    assert torch.equal(params_of(ours)[1], make_params((), (), (), (3,))[3])


def test_group_added_while_training():
    ours, stock = make_pair((5, 3), **EVERYTHING)
    for optimizer in (ours, stock):
        train(optimizer, 2)
        optimizer.add_param_group({"params": make_params((7,), (2,)), "lr": 0.02})
        train(optimizer, 3, first_seed=10)
    assert ours.param_groups[1].keys() == stock.param_groups[1].keys()
    assert_same_training(ours, stock, 5)


@pytest.mark.parametrize(
    "choice",
    [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}],
    ids=str,
)
def test_foreach_and_fused_change_nothing(choice):
    results = []
    for chosen in ({}, choice):
        params = make_params((5, 3), (7,))
        train(fastnn.optim.SGD(params, **chosen, **EVERYTHING), 4)
        results.append(params)
    for default, chosen in zip(*results, strict=True):
        assert torch.equal(default, chosen)


# --- what the user may change between steps -------------------------------------------------------


def replace_data(optimizer: torch.optim.Optimizer) -> None:
    for param in params_of(optimizer):
        param.data = param.data * 2


def replace_data_by_another_layout(optimizer: torch.optim.Optimizer) -> None:
    for param in params_of(optimizer):
        param.data = transposed(param.data)


def replace_a_parameter(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(randn((3,), torch.float64, 99))


def replace_a_buffer(optimizer: torch.optim.Optimizer) -> None:
    param = params_of(optimizer)[0]
    optimizer.state[param]["momentum_buffer"] = torch.ones_like(param)


def remove_a_buffer(optimizer: torch.optim.Optimizer) -> None:
    del optimizer.state[params_of(optimizer)[0]]["momentum_buffer"]


def empty_a_buffer(optimizer: torch.optim.Optimizer) -> None:
    """As checkpoints of older torch hold it before the first step."""
    optimizer.state[params_of(optimizer)[0]]["momentum_buffer"] = None


def clear_state(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def reload_own_state(optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def fill_a_parameter(optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        params_of(optimizer)[0].fill_(3.0)


@pytest.mark.parametrize(
    "change",
    [
        replace_data,
        replace_data_by_another_layout,
        replace_a_parameter,
        replace_a_buffer,
        remove_a_buffer,
        empty_a_buffer,
        clear_state,
        reload_own_state,
        fill_a_parameter,
    ],
    ids=lambda change: change.__name__,
)
def test_nothing_stale_is_kept_between_steps(change):
    ours, stock = make_pair((5, 3), (7,), **EVERYTHING)
    for optimizer in (ours, stock):
        train(optimizer, 3)
        change(optimizer)
        train(optimizer, 3, first_seed=10)
    assert_same_training(ours, stock, 6)


@pytest.mark.capability("saving", "`.to(dtype)`, `half`, `bfloat16`", operators=["SGD"])
def test_parameters_converted_in_place_follow_their_new_dtype():
    def run(kind) -> torch.optim.Optimizer:
        model = torch.nn.Linear(3, 2)
        model.load_state_dict(
            {"weight": randn((2, 3), torch.float32, 0), "bias": randn((2,), torch.float32, 1)}
        )
        optimizer = kind(model.parameters(), lr=0.1)
        train(optimizer, 2)
        model.double()
        train(optimizer, 2, first_seed=10)
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    for mine, theirs in zip(params_of(ours), params_of(stock), strict=True):
        assert mine.dtype == torch.float64
        # The first two steps were in float32.
        atol = tolerance(torch.float32, 2, theirs, theirs.grad)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


@pytest.mark.capability("saving", "lazy parameters", operators=["SGD"])
def test_lazy_parameters():
    """Uninitialised while the optimizer is made, of another class once they have a shape."""

    def run(kind) -> torch.optim.Optimizer:
        model = torch.nn.LazyLinear(2, dtype=torch.float64)
        optimizer = kind(model.parameters(), **MOMENTUM)
        optimizer.step()
        model(torch.ones(1, 3, dtype=torch.float64))
        with torch.no_grad():
            for i, param in enumerate(model.parameters()):
                param.copy_(randn(tuple(param.shape), torch.float64, i))
        train(optimizer, 3)
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert_same_training(ours, stock, 3)


def test_first_buffer_does_not_share_memory_with_the_gradient():
    ours, stock = make_pair((5, 3), **MOMENTUM)
    for optimizer in (ours, stock):
        train(optimizer, 1)
        params_of(optimizer)[0].grad.fill_(100.0)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    assert_same_training(ours, stock, 2)


def test_buffer_stays_the_same_tensor():
    ours, _ = make_pair((5, 3), **MOMENTUM)
    train(ours, 1)
    buffer = momentum_buffer(ours, params_of(ours)[0])
    train(ours, 2)
    assert momentum_buffer(ours, params_of(ours)[0]) is buffer


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_step_leaves_gradients_untouched(options):
    params = layout_params(torch.float32)
    optimizer = fastnn.optim.SGD(params, **options)
    for seed in range(2):
        set_layout_grads(params, seed)
        grads = [param.grad for param in params]
        before = [grad.clone() for grad in grads]
        optimizer.step()
        for param, grad, copied in zip(params, grads, before, strict=True):
            assert param.grad is grad
            assert torch.equal(grad, copied)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    ours, stock = make_pair((5, 3), **EVERYTHING)
    for optimizer in (ours, stock):
        train(optimizer, 2)
        optimizer.zero_grad(set_to_none=set_to_none)
        assert (params_of(optimizer)[0].grad is None) == set_to_none
        optimizer.step()  # along the decay and the old momentum alone, or not at all
        train(optimizer, 1, first_seed=10)
    assert_same_training(ours, stock, 4)


def test_gradient_clipping():
    def run(kind) -> torch.optim.Optimizer:
        optimizer = kind(make_params((5, 3), (7,)), **MOMENTUM)
        for seed in range(5):
            set_grads(params_of(optimizer), seed)
            norm = torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.5)
            assert norm > 0.5
            optimizer.step()
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert_same_training(ours, stock, 5)


# --- autograd -------------------------------------------------------------------------------------


def test_parameters_stay_leaves():
    ours, _ = make_pair((5, 3), **MOMENTUM)
    train(ours, 2)
    (param,) = params_of(ours)
    assert param.is_leaf
    assert param.requires_grad
    assert not momentum_buffer(ours, param).requires_grad


def test_backward_through_a_stepped_parameter_raises():
    """The step bumps the version counters, without which this gradient would be silently wrong."""
    for kind in OPTIMIZERS:
        weight = torch.nn.Parameter(torch.ones(3))
        x = torch.ones(3, requires_grad=True)
        loss = (x * weight).sum()
        weight.grad = torch.ones(3)
        kind([weight], lr=0.1).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_gradients_with_a_graph():
    def run(kind) -> torch.optim.Optimizer:
        optimizer = kind(make_params((5, 3)), **MOMENTUM)
        (param,) = params_of(optimizer)
        for _ in range(3):
            (param.grad,) = torch.autograd.grad((param**3).sum(), param, create_graph=True)
            optimizer.step()
            assert not momentum_buffer(optimizer, param).requires_grad
            assert param.grad_fn is None
            param.grad = param.grad.detach()
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert_same_training(ours, stock, 3)


@pytest.mark.parametrize(
    ("momentum", "lr_requires_grad"),
    # Not all three: torch overwrites the buffer that the gradient of lr needs.
    [(0.0, True), (0.9, False)],
)
@pytest.mark.capability("autograd", "`differentiable=True`", operators=["SGD"])
def test_differentiable_step(momentum, lr_requires_grad):
    def run(kind) -> list[Tensor]:
        start = randn((4,), torch.float64, 0).requires_grad_()
        grad = randn((4,), torch.float64, 1).requires_grad_()
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=lr_requires_grad)
        param = start.clone()
        optimizer = kind([param], lr=lr, momentum=momentum, differentiable=True)
        for _ in range(2):
            param.grad = grad * 2
            optimizer.step()
        (param**2).sum().backward()
        return [start.grad, grad.grad] + ([lr.grad] if lr_requires_grad else [])

    mine, theirs = (run(kind) for kind in OPTIMIZERS)
    for a, b in zip(mine, theirs, strict=True):
        assert bool((b != 0).all())
        assert torch.equal(a, b)  # the very same ATen calls


# --- closure, hooks, profiler ---------------------------------------------------------------------


def test_closure_runs_once_with_gradients_and_its_loss_is_returned():
    for kind in OPTIMIZERS:
        (param,) = make_params((3,))
        optimizer = kind([param], lr=0.1)
        calls = []

        def closure(param=param, optimizer=optimizer, calls=calls) -> Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = (param * 2).sum()
            loss.backward()
            return loss

        expected = make_params((3,))[0].detach() - 0.1 * 2
        with torch.no_grad():
            loss = optimizer.step(closure)
        assert calls == [True]
        assert loss.item() == (make_params((3,))[0] * 2).sum().item()
        # One step of two roundings at most on either side.
        torch.testing.assert_close(
            param.detach(), expected, rtol=0, atol=tolerance(torch.float64, 1, expected)
        )


def test_step_returns_none_without_closure():
    ours, _ = make_pair((3,), lr=0.1)
    set_grads(params_of(ours), 1)
    assert ours.step() is None


def test_step_hooks_run_and_may_change_the_gradients():
    def run(kind) -> tuple[torch.optim.Optimizer, list[str]]:
        optimizer = kind(make_params((3,)), **MOMENTUM)
        events: list[str] = []

        def halve_gradients(optimizer, args, kwargs) -> None:
            events.append("pre")
            for param in params_of(optimizer):
                param.grad.mul_(0.5)

        handles = [
            optimizer.register_step_pre_hook(halve_gradients),
            optimizer.register_step_post_hook(lambda *_: events.append("post")),
            register_optimizer_step_pre_hook(lambda *_: events.append("global pre")),
            register_optimizer_step_post_hook(lambda *_: events.append("global post")),
        ]
        train(optimizer, 2)
        for handle in handles:
            handle.remove()
        train(optimizer, 1, first_seed=10)
        return optimizer, events

    (ours, our_events), (stock, stock_events) = (run(kind) for kind in OPTIMIZERS)
    assert our_events == stock_events
    assert sorted(set(our_events)) == ["global post", "global pre", "post", "pre"]
    assert_same_training(ours, stock, 3)


@pytest.mark.parametrize("by_name", [False, True])
def test_step_hooks_see_the_arguments_as_the_caller_wrote_them_and_may_replace_them(by_name):
    def run(kind) -> list:
        (param,) = make_params((3,))
        optimizer = kind([param], lr=0.1)
        seen = []

        def double_the_loss(optimizer, args, kwargs):
            seen.append((args[1:], kwargs))
            if by_name:
                return args, {"closure": lambda: 2 * kwargs["closure"]()}
            return (optimizer, lambda: 2 * args[1]()), kwargs

        optimizer.register_step_pre_hook(double_the_loss)
        optimizer.register_step_post_hook(lambda _, args, kwargs: seen.append((len(args), kwargs)))
        loss = optimizer.step(closure=three) if by_name else optimizer.step(three)
        seen[1] = (seen[1][0], sorted(seen[1][1]))
        return [loss, *seen]

    def three() -> int:
        return 3

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert ours == stock
    if by_name:
        assert ours == [6, ((), {"closure": three}), (1, ["closure"])]
    else:
        assert ours == [6, ((three,), {}), (2, [])]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {"closer": None}), ((None, 1), {}), ((None,), {"closure": None})]
)
def test_step_refuses_unknown_arguments_as_torch_does(args, kwargs, hooked):
    messages = []
    for kind in OPTIMIZERS:
        optimizer = kind(make_params((3,)), lr=0.1)
        if hooked:
            optimizer.register_step_pre_hook(lambda *_: None)
        with pytest.raises(TypeError) as error:
            optimizer.step(*args, **kwargs)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith("SGD.step() ")


def optimizers_with_steps_of_their_own() -> dict[str, type]:
    """Made anew for each test, as the first optimizer of a class changes the class."""

    class OwnStep(fastnn.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Inherited(OwnStep):
        pass

    class OwnStepOverInherited(Inherited):
        def step(self, closure=None):
            return super().step(closure=closure)

    class TwoSteps(fastnn.optim.SGD):
        def step(self, closure=None):
            super().step()
            return super().step(closure)

    class WithMarks(OwnStep):
        @functools.wraps(OwnStep.step)
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    class Mixin:
        def step(self, closure=None):
            return super().step(closure)

    class Mixed(Mixin, fastnn.optim.SGD):
        pass

    class RunsHooksItself(fastnn.optim.SGD):
        @torch.optim.Optimizer.profile_hook_step
        def step(self, closure=None):
            return super().step(closure)

        step.hooked = True

    return {cls.__name__: cls for cls in vars().values() if issubclass(cls, fastnn.optim.SGD)}


def as_it_is(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer


def under_schedulers(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    StepLR(optimizer, step_size=10)
    StepLR(optimizer, step_size=10)
    return optimizer


def with_its_step_replaced(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.step = functools.partial(type(optimizer).step, optimizer)
    return optimizer


def taken_over(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    params = params_of(optimizer)
    return type(optimizer).from_torch(under_schedulers(torch.optim.SGD(params, lr=0.1)))


def with_another_class(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Whose step torch has not seen: it looks at a class as it makes an optimizer of it."""

    class Other(type(optimizer)):
        def step(self, closure=None):
            return super().step(closure)

    optimizer.__class__ = Other
    return optimizer


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("with_parents", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        as_it_is,
        under_schedulers,
        with_its_step_replaced,
        taken_over,
        with_another_class,
        copy.deepcopy,
    ],
)
@pytest.mark.parametrize("name", ["SGD", *optimizers_with_steps_of_their_own()])
def test_a_steps_hooks_run_once(name, change, with_parents, profiled):
    """Whichever of its class's and its parents' steps the first optimizers were made of."""
    cls = optimizers_with_steps_of_their_own().get(name, fastnn.optim.SGD)
    if with_parents:
        for parent in cls.__mro__:
            if issubclass(parent, torch.optim.SGD):
                parent(make_params((3,)))
    params = make_params((3,))
    expected = params[0].detach().clone()
    optimizer = change(cls(params, lr=0.1))
    events = []

    def halve_gradients(optimizer, args, kwargs) -> None:
        events.append("pre")
        for param in params_of(optimizer):
            param.grad.mul_(0.5)

    handles = [
        optimizer.register_step_pre_hook(halve_gradients),
        optimizer.register_step_post_hook(lambda *_: events.append("post")),
        register_optimizer_step_post_hook(lambda *_: events.append("global post")),
    ]
    params_of(optimizer)[0].grad = torch.ones_like(expected)
    with profile() if profiled else nullcontext() as profiler:
        assert optimizer.step(lambda: 7) == 7
    for handle in handles:
        handle.remove()
    assert events == ["pre", "post", "global post"]
    for _ in range(2 if name == "TwoSteps" else 1):
        expected -= 0.1 * 0.5
    # Each step rounds once or twice, and here the product as well.
    atol = tolerance(torch.float64, 2, expected)
    torch.testing.assert_close(params_of(optimizer)[0].detach(), expected, rtol=0, atol=atol)
    if profiled:
        ranges = [event.key for event in profiler.events() if "Optimizer.step" in event.key]
        assert ranges == [f"Optimizer.step#{type(optimizer).__name__}.step"]


def test_hooks_run_once_around_a_class_whose_step_was_replaced(monkeypatch):
    """With the marks of the old one, or without."""
    cls = optimizers_with_steps_of_their_own()["OwnStep"]
    old = cls(make_params((3,)))
    for decorator in (functools.wraps(cls.step), as_it_is):
        replacement = decorator(lambda self, *args, step=cls.step: step(self, *args))
        monkeypatch.setattr(cls, "step", replacement)
        for optimizer in (old, cls(make_params((3,)))):
            called = []
            optimizer.register_step_post_hook(lambda *_, called=called: called.append(1))
            optimizer.step()
            assert called == [1]
        monkeypatch.undo()


def test_a_step_inside_of_a_step_has_hooks_of_its_own():
    for kind in OPTIMIZERS:
        optimizer = kind(make_params((3,)), lr=0.1)
        called = []
        optimizer.register_step_post_hook(lambda *_, called=called: called.append(1))
        optimizer.step(optimizer.step)
        assert called == [1, 1]


def test_state_dict_hooks():
    ours, _ = make_pair((3,), **MOMENTUM)
    events = []
    ours.register_state_dict_pre_hook(lambda *_: events.append("pre"))
    ours.register_state_dict_post_hook(lambda _, state: events.append("post"))
    ours.register_load_state_dict_pre_hook(lambda *_: events.append("load pre"))
    ours.register_load_state_dict_post_hook(lambda _: events.append("load post"))
    ours.load_state_dict(ours.state_dict())
    assert events == ["pre", "post", "load pre", "load post"]


def test_profiler_shows_the_step_under_torchs_name():
    ours, _ = make_pair((3,), **MOMENTUM)
    set_grads(params_of(ours), 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours.step()
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}


# --- groups and states of other kinds -------------------------------------------------------------


PARAMS_KINDS: dict[str, Callable[[list[Tensor]], object]] = {
    "tuple": tuple,
    "iterator": iter,
    "deque": deque,
    "ParameterList": torch.nn.ParameterList,
    "dict's values": lambda params: dict(enumerate(params)).values(),
    "model.parameters()": lambda params: torch.nn.ParameterList(params).parameters(),
}


@pytest.mark.parametrize("first", ["zero_grad", "step"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("kind_of_params", PARAMS_KINDS)
def test_params_that_are_no_list(kind_of_params, fused, first):
    """What can be read once is empty after the first step, or after zero_grad."""

    def run(kind) -> list[Tensor]:
        params = make_params((5, 3), (7,))
        optimizer = kind(params, **MOMENTUM, fused=fused)
        optimizer.param_groups[0]["params"] = PARAMS_KINDS[kind_of_params](params)
        set_grads(params, 1)
        getattr(optimizer, first)()
        seen = [param.grad is None for param in params]
        for seed in range(2, 5):
            set_grads(params, seed)
            optimizer.step()
        return [*seen, *(param.detach() for param in params)]

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert ours[:2] == stock[:2]
    params = ours[2:]
    changed = not all(map(torch.equal, params, make_params((5, 3), (7,))))
    can_be_read_once = kind_of_params in ("iterator", "model.parameters()")
    assert changed != (can_be_read_once and first == "zero_grad")
    atol = tolerance(torch.float64, 4, *params)
    torch.testing.assert_close(params, stock[2:], rtol=0, atol=atol)


@pytest.mark.parametrize("method", ["step", "zero_grad"])
@pytest.mark.parametrize("params", [None, 1, [1], [None], ["x"]], ids=repr)
def test_params_that_are_no_parameters_raise_as_in_torch(params, method):
    errors = []
    for kind in OPTIMIZERS:
        optimizer = kind(make_params((3,)), lr=0.1)
        optimizer.param_groups[0]["params"] = params
        with pytest.raises((AttributeError, TypeError)) as error:
            getattr(optimizer, method)()
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


class OwnMapping(UserDict):
    """No dict; an entry is made as it is asked for, and is none either."""

    def __missing__(self, key) -> UserDict:
        self[key] = UserDict()
        return self[key]


class OwnDict(dict):
    def __missing__(self, key) -> dict:
        self[key] = {}
        return self[key]


STATES = {
    "own mapping": OwnMapping,
    "own dict": OwnDict,
    "entries of another kind": lambda: defaultdict(UserDict),
    "entries of ordered dicts": lambda: defaultdict(OrderedDict),
}


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("kind_of_state", STATES)
def test_states_of_other_kinds(kind_of_state, options, fused):
    ours, stock = make_pair((5, 3), (7,), **options, fused=fused)
    for optimizer in (ours, stock):
        optimizer.state = STATES[kind_of_state]()
        train(optimizer, 3)
    assert type(ours.state) is type(stock.state)
    assert_same_training(ours, stock, 3)


def test_state_that_makes_no_entries_raises_before_the_step():
    for kind in OPTIMIZERS:
        (param,) = make_params((3,))
        optimizer = kind([param], **MOMENTUM)
        optimizer.state = {}
        set_grads([param], 1)
        with pytest.raises(KeyError):
            optimizer.step()
        assert torch.equal(param, make_params((3,))[0])


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("missing", ["params", *torch.optim.SGD(make_params((3,))).defaults])
def test_group_without_an_option_steps_or_raises_as_in_torch(missing, with_gradient):
    results = []
    for kind in OPTIMIZERS:
        params = make_params((3,))
        optimizer = kind(params, **MOMENTUM)
        optimizer.param_groups[0]["extra"] = object()
        del optimizer.param_groups[0][missing]
        if with_gradient:
            set_grads(params, 1)
        try:
            results.append(optimizer.step())
        except KeyError as error:
            results.append(error.args)
    assert results[0] == results[1] == (None if missing == "differentiable" else (missing,))


def test_the_optimizer_and_no_group_decides_whether_autograd_sees_the_step():
    for kind in OPTIMIZERS:
        for chosen in (False, True):
            (leaf,) = make_params((3,))
            param = leaf.clone() if chosen else leaf
            optimizer = kind([param], lr=0.1, differentiable=chosen)
            optimizer.param_groups[0]["differentiable"] = not chosen
            param.grad = torch.ones_like(param, requires_grad=True)
            optimizer.step()
            if chosen:
                (seen,) = torch.autograd.grad(param.sum(), param.grad)
                # The product of two numbers that both sides round alike.
                assert torch.equal(seen, torch.full_like(param, -0.1))
            else:
                assert param.grad_fn is None


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_option_that_is_a_string_raises_as_in_torch(option):
    """A number in it, such as a command line gives, is none."""
    for kind in OPTIMIZERS:
        params = make_params((3,))
        optimizer = kind(params, lr=0.1)
        optimizer.param_groups[0][option] = "0.1"
        set_grads(params, 1)
        with pytest.raises(TypeError):
            optimizer.step()


# --- saving, loading, copying ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"lr": 0.1}, MOMENTUM, EVERYTHING], ids=option_name)
@pytest.mark.capability(
    "saving",
    "`state_dict` to and from torch's, `strict=True`",
    operators=["SGD"],
)
def test_state_dict_passes_from_torch_to_fastnn_and_back(options, dtype):
    """One training handed from torch to fastnn and back equals one of torch alone."""
    alone = torch.optim.SGD(layout_params(dtype), **options)
    relay = torch.optim.SGD(layout_params(dtype), **options)
    for leg, kind in enumerate([torch.optim.SGD, fastnn.optim.SGD, torch.optim.SGD]):
        state = relay.state_dict()
        relay = kind(params_of(relay), lr=123.0)
        relay.load_state_dict(state)
        for optimizer in (alone, relay):
            for seed in range(10 * leg, 10 * leg + 4):
                set_layout_grads(params_of(optimizer), seed)
                optimizer.step()
    ours, stock = relay.state_dict(), alone.state_dict()
    assert ours["param_groups"] == stock["param_groups"]
    assert ours["state"].keys() == stock["state"].keys()
    assert_same_training(relay, alone, 12)


@pytest.mark.capability(
    "saving",
    "`state_dict` through `torch.load(weights_only=True)`",
    operators=["SGD"],
)
def test_state_dict_of_fastnn_has_torchs_keys_and_loads_weights_only():
    ours, stock = make_pair((5, 3), (7,), **EVERYTHING)
    for optimizer in (ours, stock):
        train(optimizer, 2)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    expected = stock.state_dict()
    assert loaded["param_groups"] == expected["param_groups"]
    assert {i: s.keys() for i, s in loaded["state"].items()} == {
        i: s.keys() for i, s in expected["state"].items()
    }
    fresh = fastnn.optim.SGD([torch.nn.Parameter(p.detach().clone()) for p in params_of(ours)])
    fresh.load_state_dict(loaded)
    for optimizer in (fresh, stock):
        train(optimizer, 2, first_seed=10)
    assert_same_training(fresh, stock, 4)


def test_the_class_keeps_the_name_that_pickles_know_it_by():
    """Whatever module of the package it is written in: those made by another version load."""
    assert pickle.loads(b"cfastnn.optim\nSGD\n.") is fastnn.optim.SGD
    assert pickle.dumps(fastnn.optim.SGD, protocol=0).startswith(b"cfastnn.optim\nSGD\n")


@pytest.mark.parametrize("trained_before", [0, 3])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.capability("saving", "`pickle`, `torch.save`, `copy.deepcopy`", operators=["SGD"])
def test_copies_train_on_their_own(duplicate, trained_before):
    ours, stock = make_pair((5, 3), (7,), **EVERYTHING)
    for optimizer in (ours, stock):
        train(optimizer, trained_before)
    copied = duplicate(ours)
    before = [param.detach().clone() for param in params_of(ours)]
    for optimizer in (copied, stock):
        train(optimizer, 3, first_seed=10)
    assert_same_training(copied, stock, trained_before + 3)
    for param, old in zip(params_of(ours), before, strict=True):
        assert torch.equal(param, old)


def test_state_from_before_newer_options_existed():
    """Old pickles lack options that torch added since; __setstate__ fills them in."""
    ours, stock = make_pair((5, 3), **MOMENTUM)
    for optimizer in (ours, stock):
        train(optimizer, 1)
        state = optimizer.__getstate__()
        for option in ("nesterov", "maximize", "foreach", "differentiable", "fused"):
            del state["param_groups"][0][option]
        optimizer.__setstate__(state)
        train(optimizer, 2, first_seed=10)
    assert ours.param_groups[0].keys() == stock.param_groups[0].keys()
    assert_same_training(ours, stock, 3)


# --- what the fused pass can't serve --------------------------------------------------------------


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
        # The dense parameter's rounding feeds the sparse one's gradients, which are linear in it.
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
    assert torch.equal(mine, theirs)  # the very same ATen calls
    # The real parameter beside it: no value reaches 10 in 4 steps.
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
        params[0].grad_dtype = None  # allows any
        optimizer = kind(params, **options)
        for seed in range(3):
            set_grads(params, seed)
            params[0].grad = params[0].grad.to(grad_dtype)
            optimizer.step()
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    mine, theirs = params_of(ours)[0], params_of(stock)[0]
    assert torch.equal(mine, theirs)  # the very same ATen calls
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
        # torch 2.11 says the second, where it groups the tensors by dtype.
        message = "expected scalar type|the same device and the same dtype"
        with pytest.raises(RuntimeError, match=message):
            kind(params, **MOMENTUM, fused=True).step()


def negated(value: Tensor) -> Tensor:
    """The value, behind a lazy minus."""
    lazy = torch.complex(torch.zeros_like(value), -value).conj().imag
    assert lazy.is_neg()
    return lazy


def with_lazy(what: str, optimizer_class, fused: bool | None) -> torch.optim.Optimizer:
    """An optimizer in whose second parameter something is lazy."""
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
    """The dispatcher hands none of them to an operator in a list that is written to."""
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
    """What is written to gets memory of its own; what is only read stays shared."""
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
    """Keeps its data in another tensor; its own storage is empty, as DTensor's."""

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
    """The peer is torch's default: its fused=True is wrong where strides differ."""

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
    """Makes a parameter's gradient a subclass of Tensor for a while."""

    def __init__(self, param: Tensor) -> None:
        self.param = param

    def __enter__(self) -> None:
        self.param.grad = self.param.grad.as_subclass(SubclassTensor)

    def __exit__(self, *_: object) -> None:
        self.param.grad = None


class SubclassTensor(Tensor):
    """A subclass that lives on Tensor's own storage."""


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


# --- gradient scaling -----------------------------------------------------------------------------


def scaled_training(kind, fused: bool | None, overflowing_steps: set[int], steps: int = 6):
    """Trains under a GradScaler; the loss of some steps overflows. Yields after each step."""
    params = make_params((5, 3), (7,), dtype=torch.float32)
    optimizer = kind(params, fused=fused, **EVERYTHING)
    scaler = grad_scaler(init_scale=2.0**10, growth_interval=2)
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum((p * randn(tuple(p.shape), p.dtype, 100 + step)).sum() for p in params)
        if step in overflowing_steps:
            loss = loss * math.inf
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        yield optimizer


@pytest.mark.parametrize("overflowing_steps", [set(), {0}, {0, 1}, {3}, {0, 2, 5}], ids=str)
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.capability("precision", "training with `GradScaler`", operators=["SGD"])
def test_grad_scaler_trains_as_in_torch(fused, overflowing_steps):
    """torch's fused=True is wrong after a first step that overflows: the peer is its default."""
    runs = zip(
        scaled_training(fastnn.optim.SGD, fused, overflowing_steps),
        scaled_training(torch.optim.SGD, None, overflowing_steps),
        strict=True,
    )
    for steps, (ours, stock) in enumerate(runs, start=1):
        for param in params_of(ours):
            param_state = ours.state.get(param, {})
            if momentum_buffer(stock, params_of(stock)[0]) is None:
                assert "momentum_buffer" not in param_state
        for mine, theirs in zip(params_of(ours), params_of(stock), strict=True):
            buffer = momentum_buffer(stock, theirs)
            # Scales are powers of two: they round nothing. Gradients of N(0, 1) stay below 5.
            atol = tolerance(torch.float32, steps, theirs, buffer, torch.tensor(5.0))
            torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)
            if buffer is not None:
                torch.testing.assert_close(momentum_buffer(ours, mine), buffer, rtol=0, atol=atol)


@pytest.mark.parametrize("fused", [None, True])
def test_skipped_step_leaves_bits_and_state_alone(fused):
    run = scaled_training(fastnn.optim.SGD, fused, {0, 3})
    optimizer = next(run)
    start = make_params((5, 3), (7,), dtype=torch.float32)
    for param, untouched in zip(params_of(optimizer), start, strict=True):
        assert torch.equal(param, untouched)
        assert momentum_buffer(optimizer, param) is None
    next(run), next(run)
    before = [
        (p.detach().clone(), momentum_buffer(optimizer, p).clone()) for p in params_of(optimizer)
    ]
    next(run)
    for param, (old, buffer) in zip(params_of(optimizer), before, strict=True):
        assert torch.equal(param, old)
        assert torch.equal(momentum_buffer(optimizer, param), buffer)


@pytest.mark.parametrize("fused", [None, True])
def test_unscaled_and_clipped_by_hand(fused):
    def run(kind) -> torch.optim.Optimizer:
        params = make_params((5, 3), dtype=torch.float32)
        optimizer = kind(params, fused=fused, **EVERYTHING)
        scaler = grad_scaler(init_scale=2.0**10)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale((params[0] * randn((5, 3), torch.float32, step)).sum()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 0.5)
            scaler.step(optimizer)
            scaler.update()
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert_same_training(ours, stock, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fused_step_divides_gradients_by_the_scale_in_place(momentum, dtype):
    def run(kind) -> torch.optim.Optimizer:
        optimizer = kind(make_params((5, 3), dtype=dtype), lr=0.1, momentum=momentum, fused=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)
        train(optimizer, 2)
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert_same_training(ours, stock, 2)
    mine, theirs = params_of(ours)[0].grad, params_of(stock)[0].grad
    # The last gradient over 3: a division on one side, perhaps a product by 1/3 on the other.
    scaled = randn((5, 3), dtype, 2000)
    assert not torch.equal(mine, scaled)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance(dtype, 1, scaled))


def test_found_inf_skips_every_kind_of_parameter():
    """The parameters that take torch's own path must be skipped too. (Where the kernels skip, which
    is below, there is a buffer.)"""
    tagged = TaggedParameter(torch.ones(3))
    plain = torch.nn.Parameter(torch.ones(3))
    optimizer = fastnn.optim.SGD([tagged, plain], fused=True, **MOMENTUM)
    optimizer.grad_scale = torch.tensor(1.0)
    optimizer.found_inf = torch.tensor(1.0, device="cpu")
    train(optimizer, 1)
    for param in (tagged, plain):
        assert torch.equal(param, torch.ones(3))
        assert momentum_buffer(optimizer, param) is None


@pytest.fixture
def scalars_stay_on_device(monkeypatch):
    """Has the optimizer treat the CPU's tensors as a GPU's: the kernels read them, not the host."""
    monkeypatch.setattr("fastnn.optim._fused._is_on_gpu", torch.is_tensor)


@needs_extension
@pytest.mark.usefixtures("scalars_stay_on_device")
@pytest.mark.parametrize("overflow", [0.0, 1.0])
def test_nothing_waits_for_scalars_on_the_device(overflow):
    (param,) = make_params((5, 3), dtype=torch.float32)
    start = param.detach().clone()
    optimizer = fastnn.optim.SGD([param], lr=torch.tensor(0.25), momentum=0.9, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(overflow)
    param.grad = torch.ones_like(param)
    with OperatorNames() as operators:
        optimizer.step()
    assert "fastnn.sgd_step_.tensor_lr" in operators.names
    assert "aten._local_scalar_dense.default" not in operators.names
    # A gradient of 1 over a scale of 2, times a quarter: no rounding but that of the difference.
    assert torch.equal(param, start if overflow else start - 0.125)


@needs_extension
@pytest.mark.usefixtures("scalars_stay_on_device")
@pytest.mark.parametrize("dampening", [0.0, 0.3])
@pytest.mark.parametrize("overflowing_steps", [{0}, {0, 1}, {3}], ids=str)
def test_a_step_that_the_kernels_skip_is_as_if_it_had_not_been(dampening, overflowing_steps):
    """After a first step so skipped the next is a first one, with dampening too."""
    params = make_params((5, 3), (7,), dtype=torch.float32)
    stock_params = make_params((5, 3), (7,), dtype=torch.float32)
    options = {"momentum": 0.9, "dampening": dampening}
    ours = fastnn.optim.SGD(params, lr=torch.tensor(0.1), fused=True, **options)
    stock = torch.optim.SGD(stock_params, lr=0.1, **options)
    ours.grad_scale = torch.tensor(1.0)
    for step in range(5):
        for index, (mine, theirs) in enumerate(zip(params, stock_params, strict=True)):
            mine.grad = randn(tuple(mine.shape), torch.float32, 100 * step + index)
            theirs.grad = mine.grad.clone()
        ours.found_inf = torch.tensor(float(step in overflowing_steps))
        ours.step()
        if step not in overflowing_steps:
            stock.step()
    for mine, theirs in zip(params, stock_params, strict=True):
        atol = tolerance(torch.float32, 5, theirs, torch.tensor(5.0))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


@needs_extension
@pytest.mark.usefixtures("scalars_stay_on_device")
def test_parameters_of_torchs_own_path_are_skipped_too_where_the_kernels_skip():
    tagged, plain = TaggedParameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = fastnn.optim.SGD([tagged, plain], fused=True, **MOMENTUM)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    train(optimizer, 1)
    for param in (tagged, plain):
        assert torch.equal(param, torch.ones(3))


# --- taking over torch's optimizer ----------------------------------------------------------------


def test_from_torch_goes_on_where_torch_is():
    old, stock = (torch.optim.SGD(make_params((5, 3), (7,)), **EVERYTHING) for _ in range(2))
    train(old, 2)
    buffers = [momentum_buffer(old, param) for param in params_of(old)]
    taken = fastnn.optim.SGD.from_torch(old)
    assert taken is old
    assert type(taken) is fastnn.optim.SGD
    for param, buffer in zip(params_of(taken), buffers, strict=True):
        assert momentum_buffer(taken, param) is buffer
    train(taken, 3, first_seed=3)
    train(stock, 5)
    assert_same_training(taken, stock, 5)
    assert fastnn.optim.SGD.from_torch(taken) is taken


@pytest.mark.parametrize("resumed", [False, True])
def test_from_torch_under_a_scheduler(resumed):
    """It goes on without a warning, after a resume too, which replaces the parameter groups."""
    runs = []
    for take in (fastnn.optim.SGD.from_torch, lambda optimizer: optimizer):
        params = make_params((5, 3), (7,))
        groups = [{"params": params[:1], "lr": 0.2, "name": "body"}, {"params": params[1:]}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        called = []
        optimizer.register_step_post_hook(lambda *_, called=called: called.append("hook"))
        scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
        optimizer = take(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for seed in range(1, 4):
                train(optimizer, 1, first_seed=seed)
                scheduler.step()
                if resumed:
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert called == ["hook"] * 3
        assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.0125]
        assert optimizer.param_groups[0]["name"] == "body"
        runs.append(optimizer)
    assert_same_training(*runs, 3)


def test_from_torch_steps_with_our_operator():
    for scheduled in (False, True):
        (param,) = make_params((5, 3))
        old = torch.optim.SGD([param], **MOMENTUM)
        if scheduled:
            StepLR(old, step_size=1)
        taken = fastnn.optim.SGD.from_torch(old)
        param.grad = torch.ones_like(param)
        with OperatorNames() as operators:
            taken.step()
        expected = "fastnn.sgd_step_.default" if fastnn.is_available() else "aten.add_.Tensor"
        assert expected in operators.names


@pytest.mark.parametrize("wrong", [torch.optim.Adam, OwnStep, None, "SGD"])
def test_from_torch_refuses_what_is_no_sgd(wrong):
    wrong = wrong(make_params((3,))) if isinstance(wrong, type) else wrong
    expected = f"optimizer: expected a torch.optim.SGD, got {type(wrong).__name__}"
    with pytest.raises(TypeError, match=re.escape(expected)):
        fastnn.optim.SGD.from_torch(wrong)


def test_from_torch_refuses_a_replaced_step():
    optimizer = torch.optim.SGD(make_params((3,)))
    optimizer.step = lambda closure=None: None
    with pytest.raises(TypeError, match="optimizer: its step has been replaced"):
        fastnn.optim.SGD.from_torch(optimizer)
    assert type(optimizer) is torch.optim.SGD


@pytest.mark.parametrize("late", [0, 1])
def test_late_first_gradient_of_a_subclass_under_fused(late):
    """torch's fused path takes no list in which only some have a buffer; ours must not meet it."""

    def run(kind, fused: bool | None) -> torch.optim.Optimizer:
        params = [TaggedParameter(p.detach()) for p in make_params((5, 3), (7,))]
        optimizer = kind(params, fused=fused, **EVERYTHING)
        set_grads(params, 0)
        params[late].grad = None
        optimizer.step()
        train(optimizer, 2)
        return optimizer

    ours, stock = run(fastnn.optim.SGD, True), run(torch.optim.SGD, None)
    assert_same_training(ours, stock, 3)


# --- the operator itself, and its reference -------------------------------------------------------

each_step = pytest.mark.parametrize(
    "sgd_step_",
    [torch.ops.fastnn.sgd_step_, fastnn.reference.sgd_step_],
    ids=["operator", "reference"],
)


def good_lists(dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    return {
        name: [randn((3,), dtype, seed), randn((2, 4), dtype, seed + 1)]
        for seed, name in enumerate(["params", "grads", "momentum_buffers"])
    }


def drop_last(tensors: list[Tensor]) -> list[Tensor]:
    return tensors[:1]


def add_one(tensors: list[Tensor]) -> list[Tensor]:
    return [*tensors, torch.ones(2)]


def reshape_last(tensors: list[Tensor]) -> list[Tensor]:
    return [tensors[0], tensors[1].flatten()]


def shrink_last(tensors: list[Tensor]) -> list[Tensor]:
    """A shape that would broadcast."""
    return [tensors[0], tensors[1][:1]]


def cast_last(tensors: list[Tensor]) -> list[Tensor]:
    return [tensors[0], tensors[1].double()]


@each_step
@pytest.mark.parametrize(
    ("dtype", "buffer_dtype"),
    [*zip(DTYPES, DTYPES, strict=True), *((dtype, torch.float32) for dtype in HALF)],
    ids=str,
)
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_op_stays_within_rounding_of_the_formula(options, dtype, buffer_dtype, sgd_step_):
    params = [param.detach() for param in layout_params(dtype)]
    computed = torch.float32 if dtype in HALF else dtype
    buffers = [torch.empty_like(param, dtype=buffer_dtype) for param in params]
    buffers = buffers if options["momentum"] else []
    exact = ExactRun(flat(params), dtype, computed, buffer_dtype)
    oracle = ExactRun(flat(params), torch.float64, torch.float64)  # the formula's own error
    for seed in range(3):
        grads = layout_grads(dtype, seed)
        for run in (exact, oracle):
            run.step(flat(grads), **options)
        sgd_step_(params, grads, buffers, **options, is_first_step=seed == 0)
        assert_within(flat(params), exact.param, exact.param_error + oracle.param_error)
        if buffers:
            error = exact.buffer_error + oracle.buffer_error
            assert_within(flat(buffers), exact.buffer, error)


@each_step
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_op_without_decay_keeps_the_parameter_out_of_the_buffer(value, sgd_step_):
    """0 * inf would be NaN."""
    param, buffer = torch.tensor([value, 1.0]), torch.zeros(2)
    sgd_step_([param], [torch.ones(2)], [buffer], lr=0.5, momentum=0.9, is_first_step=True)
    assert torch.equal(buffer, torch.ones(2))
    assert param.isnan().tolist() == [math.isnan(value), False]


@each_step
@pytest.mark.parametrize("name", ["grads", "momentum_buffers"])
@pytest.mark.parametrize("spoil", [drop_last, add_one, reshape_last, shrink_last, cast_last])
def test_op_refuses_bad_lists_before_it_changes_anything(name, spoil, sgd_step_):
    lists = good_lists()
    lists[name] = spoil(lists[name])
    before = {key: [t.clone() for t in tensors] for key, tensors in lists.items()}
    with pytest.raises((RuntimeError, ValueError, TypeError), match=name):
        sgd_step_(*lists.values(), lr=0.1, momentum=0.9)
    for key, tensors in lists.items():
        for tensor, old in zip(tensors, before[key], strict=True):
            assert torch.equal(tensor, old)


@each_step
def test_op_refuses_missing_buffers(sgd_step_):
    lists = good_lists()
    with pytest.raises((RuntimeError, ValueError, TypeError), match="momentum_buffers"):
        sgd_step_(lists["params"], lists["grads"], [], lr=0.1, momentum=0.9)
    assert torch.equal(lists["params"][0], good_lists()["params"][0])


@each_step
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_op_refuses_other_dtypes(dtype, sgd_step_):
    param, grad = torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype)
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        sgd_step_([param], [grad], [], lr=1.0)
    assert torch.equal(param, torch.ones(3, dtype=dtype))


@each_step
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_op_ignores_what_a_first_buffer_holds(options, dtype, sgd_step_):
    results = []
    for content in (math.nan, 3.0):
        lists = good_lists(dtype)
        buffers = [torch.full_like(p, content) for p in lists["params"]]
        buffers = buffers if options["momentum"] else []
        sgd_step_(lists["params"], lists["grads"], buffers, **options, is_first_step=True)
        results.append([*lists["params"], *buffers])
    for nan_run, other_run in zip(*results, strict=True):
        assert torch.equal(nan_run, other_run)
        assert not bool(nan_run.isnan().any())


@each_step
def test_op_does_nothing_where_found_inf(sgd_step_):
    lists = good_lists()
    sgd_step_(
        *lists.values(),
        lr=0.1,
        momentum=0.9,
        grad_scale=torch.tensor(2.0),
        found_inf=torch.tensor(1.0),
    )
    for name, tensors in good_lists().items():
        for tensor, old in zip(lists[name], tensors, strict=True):
            assert torch.equal(tensor, old)


@needs_extension
@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_with_a_tensor_lr_is_that_with_its_value(dtype, lr_dtype):
    """A power of two: every dtype has it."""
    options = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    as_number, as_tensor = good_lists(dtype), good_lists(dtype)
    torch.ops.fastnn.sgd_step_(*as_number.values(), lr=0.25, **options)
    lr = torch.tensor(0.25, dtype=lr_dtype)
    torch.ops.fastnn.sgd_step_(*as_tensor.values(), lr=lr, **options)
    for name, tensors in as_number.items():
        for expected, actual in zip(tensors, as_tensor[name], strict=True):
            assert torch.equal(actual, expected)
    assert not torch.equal(as_tensor["params"][0], good_lists(dtype)["params"][0])


@needs_extension
@pytest.mark.parametrize("elements", [0, 2])
@pytest.mark.parametrize("name", ["lr", "grad_scale", "found_inf"])
def test_op_refuses_scalars_of_none_or_several_elements(name, elements):
    lists = good_lists()
    before = copy.deepcopy(lists)
    options = {"lr": 0.1, "momentum": 0.9, name: torch.ones(elements)}
    with pytest.raises(RuntimeError, match=f"{name} to have one element, but got .*{elements}"):
        torch.ops.fastnn.sgd_step_(*lists.values(), **options)
    for expected, actual in zip(before.values(), lists.values(), strict=True):
        assert all(map(torch.equal, expected, actual))


@needs_extension
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_op_takes_buffers_of_either_dtype_in_one_list(dtype):
    together, apart = good_lists(dtype), good_lists(dtype)
    for lists in (together, apart):
        lists["momentum_buffers"][0] = lists["momentum_buffers"][0].float()
    torch.ops.fastnn.sgd_step_(*together.values(), lr=0.1, momentum=0.9)
    for i in range(2):
        lists = [tensors[i : i + 1] for tensors in apart.values()]
        torch.ops.fastnn.sgd_step_(*lists, lr=0.1, momentum=0.9)
    for name in ("params", "momentum_buffers"):
        assert all(map(torch.equal, together[name], apart[name]))
        assert not any(map(torch.equal, together[name], good_lists(dtype)[name]))
    assert [b.dtype for b in together["momentum_buffers"]] == [torch.float32, dtype]


@each_step
@pytest.mark.parametrize(
    ("dtype", "buffer_dtype"),
    [
        (torch.bfloat16, torch.float64),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_op_refuses_buffers_of_other_dtypes(dtype, buffer_dtype, sgd_step_):
    lists = good_lists(dtype)
    lists["momentum_buffers"][1] = lists["momentum_buffers"][1].to(buffer_dtype)
    before = copy.deepcopy(lists)
    with pytest.raises(RuntimeError, match=r"momentum_buffers\[1\] to have its parameter's dtype"):
        sgd_step_(*lists.values(), lr=0.1, momentum=0.9)
    for name, tensors in lists.items():
        assert all(map(torch.equal, tensors, before[name]))


@needs_extension
@pytest.mark.parametrize("name", ["params", "grads", "momentum_buffers"])
def test_op_refuses_to_write_several_elements_to_one_place(name):
    """Before it steps any; gradients are written to where they are scaled."""
    lists = good_lists()
    lists[name][1] = lists[name][1][:1].expand(2, 4)
    before = copy.deepcopy(lists)
    with pytest.raises(RuntimeError, match=rf"{name}\[1\], .* single memory location"):
        torch.ops.fastnn.sgd_step_(
            *lists.values(), lr=0.1, momentum=0.9, grad_scale=torch.tensor(2.0)
        )
    for key, tensors in lists.items():
        assert all(map(torch.equal, tensors, before[key]))


@needs_extension
@pytest.mark.parametrize("name", ["params", "grads", "momentum_buffers"])
def test_op_refuses_meta_tensors_among_others(name):
    """Which would bring the call to what knows of shapes alone, and steps nothing."""
    lists = good_lists()
    lists[name][1] = lists[name][1].to("meta")
    with pytest.raises(RuntimeError, match=rf"all tensors or none .* {name}\[1\] is there"):
        torch.ops.fastnn.sgd_step_(*lists.values(), lr=0.1, momentum=0.9)


@needs_extension
@pytest.mark.parametrize("name", ["lr", "grad_scale", "found_inf"])
def test_op_refuses_a_meta_scalar(name):
    options = {"lr": 0.1, "momentum": 0.9, name: torch.ones((), device="meta")}
    with pytest.raises(RuntimeError, match=f"all tensors or none .* {name} is there"):
        torch.ops.fastnn.sgd_step_(*good_lists().values(), **options)


@each_step
def test_op_steps_what_shares_memory_in_order_where_buffers_are_of_two_dtypes(sgd_step_):
    """The second and third parameter are one; the first has buffers as the third."""
    memory = torch.ones(4, dtype=torch.bfloat16)
    params = [torch.ones(4, dtype=torch.bfloat16), memory, memory.view(4)]
    grads = [torch.full((4,), value, dtype=torch.bfloat16) for value in (1.0, 2.0, 3.0)]
    buffers = [torch.ones(4, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    buffers.append(buffers[0].clone())
    sgd_step_(params, grads, buffers, lr=0.25, momentum=0.5, weight_decay=0.5)
    # The second: 0.5 + 2.5 = 3, 1 - 3/4. The third: 0.5 + 3.125, 0.25 - 3.625/4 (of 8 bits each).
    assert torch.equal(buffers[1], torch.full((4,), 3.0))
    assert torch.equal(buffers[2], torch.full((4,), 3.625, dtype=torch.bfloat16))
    assert torch.equal(memory, torch.full((4,), -0.65625, dtype=torch.bfloat16))


# --- float32_momentum -----------------------------------------------------------------------------

WIDE = {"float32_momentum": True}


def buffer_dtypes(optimizer: torch.optim.Optimizer) -> set[torch.dtype | None]:
    buffers = [momentum_buffer(optimizer, param) for param in params_of(optimizer)]
    return {None if buffer is None else buffer.dtype for buffer in buffers}


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", [o for o in OPTIONS if o["momentum"]], ids=option_name)
@pytest.mark.capability(
    "precision", "float32 momentum of bfloat16 and float16 parameters", operators=["SGD"]
)
def test_float32_momentum_stays_within_rounding_of_the_formula(options, dtype, fused):
    optimizer = fastnn.optim.SGD(layout_params(dtype), fused=fused, **options, **WIDE)
    exact = ExactRun(flat(params_of(optimizer)), dtype, compute_dtype(dtype), torch.float32)
    for seed in range(20):
        exact.step(flat(layout_grads(dtype, seed)), **options)
        set_layout_grads(params_of(optimizer), seed)
        optimizer.step()
        assert buffer_dtypes(optimizer) == {torch.float32}
        assert_within(flat(params_of(optimizer)), exact.param, exact.param_error)
        buffers = flat([momentum_buffer(optimizer, p) for p in params_of(optimizer)])
        assert_within(buffers, exact.buffer, exact.buffer_error)


def test_small_gradients_vanish_in_momentum_of_bfloat16_and_not_of_float32():
    """What the option is for: 2^-9 of a buffer near 1 is lost in the 8 bits of bfloat16."""
    ends = []
    for option in ({}, WIDE):
        param = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        optimizer = fastnn.optim.SGD([param], lr=2.0**-10, momentum=1.0, **option)
        for grad in [1.0] + 64 * [2.0**-9]:
            param.grad = torch.full_like(param, grad)
            optimizer.step()
        ends.append(momentum_buffer(optimizer, param).item())
    assert ends == [1.0, 1.125]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_float32_momentum_is_without_effect_on_wider_parameters(dtype):
    plain, asked = (
        fastnn.optim.SGD(make_params((5, 3), dtype=dtype), **EVERYTHING, **option)
        for option in ({}, WIDE)
    )
    for optimizer in (plain, asked):
        train(optimizer, 3)
    assert buffer_dtypes(asked) == {dtype}
    assert torch.equal(params_of(plain)[0], params_of(asked)[0])


def test_groups_choose_float32_momentum():
    params = make_params((5, 3), (7,), (2,), dtype=torch.bfloat16)
    optimizer = fastnn.optim.SGD([{"params": params[0], **WIDE}, {"params": params[1]}], **MOMENTUM)
    assert "float32_momentum" not in optimizer.param_groups[1]
    optimizer.add_param_group({"params": params[2], **WIDE})
    train(optimizer, 2)
    dtypes = [momentum_buffer(optimizer, param).dtype for param in params]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]


def test_groups_have_the_optimizers_float32_momentum_unless_they_choose():
    params = make_params((5, 3), (7,), (2,), dtype=torch.float16)
    groups = [{"params": params[0]}, {"params": params[1], "float32_momentum": False}]
    optimizer = fastnn.optim.SGD(groups, **MOMENTUM, **WIDE)
    optimizer.add_param_group({"params": params[2]})
    train(optimizer, 2)
    dtypes = [momentum_buffer(optimizer, param).dtype for param in params]
    assert dtypes == [torch.float32, torch.float16, torch.float32]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_have_their_momentum_in_float32_too(duplicate):
    optimizer = fastnn.optim.SGD(make_params((5, 3), dtype=torch.bfloat16), **MOMENTUM, **WIDE)
    train(optimizer, 2)
    copied = duplicate(optimizer)
    for either in (optimizer, copied):
        train(either, 2, first_seed=10)
    assert buffer_dtypes(copied) == {torch.float32}
    (param,), (copied_param,) = params_of(optimizer), params_of(copied)
    assert torch.equal(param, copied_param)
    copied_buffer = momentum_buffer(copied, copied_param)
    assert torch.equal(momentum_buffer(optimizer, param), copied_buffer)
    copied.add_param_group({"params": make_params((2,), dtype=torch.bfloat16)})
    assert copied.param_groups[1]["float32_momentum"]


@pytest.mark.parametrize("asked_again", [False, True])
def test_float32_momentum_survives_saving(asked_again):
    """To the last bit, where torch's loading would round it to the parameters' dtype. The float32
    and float64 parameters' buffers are loaded as ever."""

    def some_params() -> list[Tensor]:
        half, other_half = make_params((5, 3), (7,), dtype=torch.bfloat16)
        return [*make_params((2,)), half, *make_params((4,), dtype=torch.float32), other_half]

    def grouped(params: list[Tensor]) -> list[dict]:
        return [{"params": params[:1]}, {"params": params[1:]}]

    saved = fastnn.optim.SGD(grouped(some_params()), **EVERYTHING, **WIDE)
    train(saved, 3)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    params = [torch.nn.Parameter(param.detach().clone()) for param in params_of(saved)]
    loaded = fastnn.optim.SGD(grouped(params), lr=123.0, **(WIDE if asked_again else {}))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for optimizer in (saved, loaded):
        train(optimizer, 2, first_seed=10)
    for mine, theirs in zip(params_of(saved), params_of(loaded), strict=True):
        buffer = momentum_buffer(loaded, theirs)
        assert buffer.dtype == (torch.float64 if mine.dtype == torch.float64 else torch.float32)
        assert torch.equal(mine, theirs)
        assert torch.equal(momentum_buffer(saved, mine), buffer)


def test_loading_takes_the_saved_choice_of_momentum_before_the_optimizers():
    saved = fastnn.optim.SGD(make_params((5, 3), dtype=torch.bfloat16), **MOMENTUM)
    saved.param_groups[0]["float32_momentum"] = False
    train(saved, 1)
    loaded = fastnn.optim.SGD(make_params((5, 3), dtype=torch.bfloat16), **MOMENTUM, **WIDE)
    loaded.load_state_dict(saved.state_dict())
    assert buffer_dtypes(loaded) == {torch.bfloat16}


def test_state_without_a_buffer_is_loaded_with_float32_momentum():
    optimizer = fastnn.optim.SGD(make_params((5, 3), (7,), dtype=torch.bfloat16), **WIDE)
    state = {0: {"momentum_buffer": None}}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    assert buffer_dtypes(optimizer) == {None}


@pytest.mark.parametrize("odd", [0.0, [1.0]], ids=str)
def test_float32_momentum_is_loaded_beside_what_is_no_buffer(odd):
    """torch loads whatever it is."""
    optimizer = fastnn.optim.SGD(make_params((5, 3), (7,), dtype=torch.bfloat16), **WIDE)
    state = {0: {"momentum_buffer": odd}, 1: {"momentum_buffer": torch.full((7,), 1 / 3)}}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    first, second = params_of(optimizer)
    assert momentum_buffer(optimizer, first) == odd
    assert torch.equal(momentum_buffer(optimizer, second), torch.full((7,), 1 / 3))


def test_hooks_of_loading_may_add_the_groups_that_are_loaded():
    params = make_params((5, 3), (7,), dtype=torch.bfloat16)
    saved = fastnn.optim.SGD([{"params": param} for param in params], **MOMENTUM)
    train(saved, 1)
    loaded = fastnn.optim.SGD(make_params((5, 3), dtype=torch.bfloat16), **MOMENTUM, **WIDE)
    added = make_params((7,), dtype=torch.bfloat16)
    loaded.register_load_state_dict_pre_hook(
        lambda optimizer, _: optimizer.add_param_group({"params": added})
    )
    loaded.load_state_dict(saved.state_dict())
    assert buffer_dtypes(loaded) == {torch.float32}
    assert torch.equal(momentum_buffer(loaded, added[0]), momentum_buffer(saved, params[1]))


def test_float32_momentum_passes_to_torch_and_back():
    """In the parameters' dtype, the only one torch loads; and in float32 again."""
    start = fastnn.optim.SGD(make_params((5, 3), dtype=torch.bfloat16), **EVERYTHING, **WIDE)
    train(start, 3)
    (param,) = params_of(start)
    stock = torch.optim.SGD([torch.nn.Parameter(param.detach().clone())], lr=123.0)
    stock.load_state_dict(start.state_dict())
    assert buffer_dtypes(stock) == {torch.bfloat16}
    train(stock, 1, first_seed=10)
    state = stock.state_dict()
    for group in state["param_groups"]:
        group.pop("float32_momentum")  # as of one that torch alone has made
    back = fastnn.optim.SGD([torch.nn.Parameter(param.detach().clone())], lr=123.0, **WIDE)
    back.load_state_dict(state)
    assert back.param_groups[0]["lr"] == EVERYTHING["lr"]
    assert buffer_dtypes(back) == {torch.float32}
    train(back, 1, first_seed=11)
    assert buffer_dtypes(back) == {torch.float32}


def test_hooks_of_loading_may_change_float32_momentum():
    """Those before it what is loaded, those after it what was."""

    def halve(optimizer: torch.optim.Optimizer) -> None:
        assert buffer_dtypes(optimizer) == {torch.float32}
        momentum_buffer(optimizer, params_of(optimizer)[0]).mul_(0.5)

    saved = fastnn.optim.SGD(make_params((5, 3), dtype=torch.bfloat16), **MOMENTUM, **WIDE)
    train(saved, 1)
    loaded = fastnn.optim.SGD(make_params((5, 3), dtype=torch.bfloat16), **MOMENTUM, **WIDE)
    loaded.register_load_state_dict_pre_hook(
        lambda _, state: {**state, "state": {0: {"momentum_buffer": torch.full((5, 3), 1 / 3)}}}
    )
    loaded.register_load_state_dict_post_hook(halve)
    loaded.load_state_dict(saved.state_dict())
    (param,) = params_of(loaded)
    assert torch.equal(momentum_buffer(loaded, param), torch.full((5, 3), 1 / 6))


@pytest.mark.parametrize("option", ["full_state_dict", "cpu_offload"])
def test_distributed_checkpoints_take_the_choice_of_float32_momentum(option):
    """They refuse options that are no plain numbers or strings."""
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = fastnn.optim.SGD(model.parameters(), **MOMENTUM, **WIDE)
    train(optimizer, 1)
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**{option: True}))
    assert [group["float32_momentum"] for group in state["param_groups"]] == [True]
    assert state["state"]["bias"]["momentum_buffer"].dtype == torch.float32


def test_momentum_in_the_parameters_dtype_stays_such_until_it_is_loaded():
    """Switched on later, the option is of buffers that aren't there yet; on torch's path, too."""
    tagged = TaggedParameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = fastnn.optim.SGD([tagged, *make_params((2,), dtype=torch.bfloat16)], **MOMENTUM)
    train(optimizer, 1)
    optimizer.param_groups[0].update(WIDE)
    train(optimizer, 1)
    assert buffer_dtypes(optimizer) == {torch.bfloat16}
    optimizer.load_state_dict(optimizer.state_dict())
    assert buffer_dtypes(optimizer) == {torch.float32}


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_float32_buffers_are_stepped_without_the_option_too(dtype):
    """Whoever put them into the state."""
    start = make_params((5, 3), dtype=dtype)
    optimizer = fastnn.optim.SGD(start, **EVERYTHING)
    exact = ExactRun(flat(start), dtype, compute_dtype(dtype), torch.float32)
    exact.buffer = torch.full_like(exact.param, 1 / 3).float().double()
    optimizer.state[start[0]]["momentum_buffer"] = torch.full((5, 3), 1 / 3)
    for seed in range(3):
        set_grads(start, seed)
        exact.step(flat([start[0].grad]), **{"nesterov": False, "maximize": False, **EVERYTHING})
        optimizer.step()
        assert_within(flat(start), exact.param, exact.param_error)
        buffer = momentum_buffer(optimizer, start[0])
        assert buffer.dtype == torch.float32
        assert_within(flat([buffer]), exact.buffer, exact.buffer_error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_torchs_own_path_leaves_the_momentum_of_wider_parameters_alone(dtype):
    tagged = TaggedParameter(torch.ones(3, dtype=dtype))
    optimizer = fastnn.optim.SGD([tagged], **MOMENTUM, **WIDE)
    for _ in range(2):
        tagged.grad = torch.ones_like(tagged)
        optimizer.step()
    assert buffer_dtypes(optimizer) == {dtype}


def test_torchs_own_path_has_float32_momentum_too():
    """Beside a parameter of ours, and with differentiable=True."""
    tagged = TaggedParameter(torch.ones(3, dtype=torch.bfloat16))
    plain = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    tensor = torch.ones(3, dtype=torch.bfloat16)  # which autograd lets step in place
    for params, option in (([tagged, plain], {}), ([tensor], {"differentiable": True})):
        optimizer = fastnn.optim.SGD(params, **MOMENTUM, **WIDE, **option)
        for _ in range(2):
            for param in params:
                param.grad = torch.full_like(param, 1 / 3)
            optimizer.step()
            assert buffer_dtypes(optimizer) == {torch.float32}
        third = torch.tensor(1 / 3, dtype=torch.bfloat16).float()
        for param in params:
            # One rounding of the product, one of the sum.
            expected = (third + 0.9 * third).expand(3)
            buffer = momentum_buffer(optimizer, param)
            torch.testing.assert_close(buffer, expected, rtol=2 * 2.0**-24, atol=0)


@pytest.mark.parametrize("overflowing_steps", [{0}, {0, 1}, {2}], ids=str)
@pytest.mark.usefixtures("scalars_stay_on_device")
@needs_extension
def test_float32_momentum_where_the_kernels_skip_a_step(overflowing_steps):
    """The steps that are left are those of a run without the others, to the last bit."""
    results = []
    for run in ("with", "without"):
        params = make_params((5, 3), (7,), dtype=torch.float16)
        optimizer = fastnn.optim.SGD(params, **MOMENTUM, **WIDE, fused=True)
        optimizer.grad_scale = torch.tensor(4.0)
        for step in range(4):
            if run == "without" and step in overflowing_steps:
                continue
            optimizer.found_inf = torch.tensor(float(step in overflowing_steps))
            set_grads(params, step)
            optimizer.step()
        assert buffer_dtypes(optimizer) == {torch.float32}
        results.append([*params, *(momentum_buffer(optimizer, param) for param in params)])
    assert all(map(torch.equal, *results))


def test_no_warnings_in_a_plain_training():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, _ = make_pair((5, 3), **EVERYTHING)
        train(ours, 3)
    assert momentum_buffer(ours, params_of(ours)[0]) is not None
