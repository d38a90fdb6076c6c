"""SGD's float32_momentum: float32 buffers of bfloat16 and float16 parameters."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import fastnn
from support.marks import needs_extension
from support.optimizers import (
    EVERYTHING,
    HALF,
    MOMENTUM,
    OPTIONS,
    ExactRun,
    TaggedParameter,
    assert_within,
    compute_dtype,
    flat,
    layout_grads,
    layout_params,
    make_params,
    momentum_buffer,
    option_name,
    params_of,
    set_grads,
    set_layout_grads,
    through_pickle,
    through_torch_save,
    train,
)

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
    """The option's purpose: 2^-9 of a buffer near 1 is lost in the 8 bits of bfloat16."""
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
    """It survives to the last bit, although torch's loading rounds to the parameters' dtype.
    Buffers of float32 and float64 parameters are loaded as usual."""

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
    """torch loads any value."""
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
    """It passes in the parameters' dtype, the only one torch loads, and becomes float32 again."""
    start = fastnn.optim.SGD(make_params((5, 3), dtype=torch.bfloat16), **EVERYTHING, **WIDE)
    train(start, 3)
    (param,) = params_of(start)
    stock = torch.optim.SGD([torch.nn.Parameter(param.detach().clone())], lr=123.0)
    stock.load_state_dict(start.state_dict())
    assert buffer_dtypes(stock) == {torch.bfloat16}
    train(stock, 1, first_seed=10)
    state = stock.state_dict()
    for group in state["param_groups"]:
        group.pop("float32_momentum")  # a group that only torch has made lacks it
    back = fastnn.optim.SGD([torch.nn.Parameter(param.detach().clone())], lr=123.0, **WIDE)
    back.load_state_dict(state)
    assert back.param_groups[0]["lr"] == EVERYTHING["lr"]
    assert buffer_dtypes(back) == {torch.float32}
    train(back, 1, first_seed=11)
    assert buffer_dtypes(back) == {torch.float32}


def test_hooks_of_loading_may_change_float32_momentum():
    """Pre-hooks may change what is about to be loaded, post-hooks what was loaded."""

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
    """They reject options other than plain numbers and strings."""
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = fastnn.optim.SGD(model.parameters(), **MOMENTUM, **WIDE)
    train(optimizer, 1)
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**{option: True}))
    assert [group["float32_momentum"] for group in state["param_groups"]] == [True]
    assert state["state"]["bias"]["momentum_buffer"].dtype == torch.float32


def test_momentum_in_the_parameters_dtype_stays_such_until_it_is_loaded():
    """Turned on later, the option applies to buffers that don't exist yet; on torch's path, too."""
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
    """It doesn't matter what put them into the state."""
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
    """A parameter of ours on torch's path, and differentiable=True."""
    tagged = TaggedParameter(torch.ones(3, dtype=torch.bfloat16))
    plain = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    tensor = torch.ones(3, dtype=torch.bfloat16)  # autograd allows it to be stepped in place
    for params, option in (([tagged, plain], {}), ([tensor], {"differentiable": True})):
        optimizer = fastnn.optim.SGD(params, **MOMENTUM, **WIDE, **option)
        for _ in range(2):
            for param in params:
                param.grad = torch.full_like(param, 1 / 3)
            optimizer.step()
            assert buffer_dtypes(optimizer) == {torch.float32}
        third = torch.tensor(1 / 3, dtype=torch.bfloat16).float()
        for param in params:
            # One rounding of the product and one of the sum.
            expected = (third + 0.9 * third).expand(3)
            buffer = momentum_buffer(optimizer, param)
            torch.testing.assert_close(buffer, expected, rtol=2 * 2.0**-24, atol=0)


@pytest.mark.parametrize("overflowing_steps", [{0}, {0, 1}, {2}], ids=str)
@pytest.mark.usefixtures("scalars_stay_on_device")
@needs_extension
def test_float32_momentum_where_the_kernels_skip_a_step(overflowing_steps):
    """The remaining steps equal those of a run without the skipped ones, to the last bit."""
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
