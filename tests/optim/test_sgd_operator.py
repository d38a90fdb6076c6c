"""The operator of SGD's step, and its reference."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

import fastnn
from support.marks import needs_extension
from support.optimizers import (
    DTYPES,
    HALF,
    OPTIONS,
    ExactRun,
    assert_within,
    flat,
    layout_grads,
    layout_params,
    option_name,
    randn,
)

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
    """The value is a power of two, which every dtype represents exactly."""
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
    """It raises before it steps any parameter; scaling writes to gradients, too."""
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
    """They would dispatch to the fake kernel, which steps nothing."""
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
    """The second and third parameter share memory; the first has a buffer like the third's."""
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
