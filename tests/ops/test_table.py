"""fastnn._operators: the table lists every operator, and states PyTorch's counterpart correctly."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import fastnn
from fastnn._operators import CHAINS, OPERATORS, OPTIMIZERS
from support import chains, stock
from support.marks import needs_extension
from support.modules import MODULES
from support.operator_cases import CASES

pytestmark = pytest.mark.cpu_only("of no kernels")

# Operators over lists of layers have tests of their own: test_mlp.py.
EVERY = (*OPERATORS, *CHAINS)
every_operator = pytest.mark.parametrize("operator", EVERY, ids=lambda operator: operator.name)


def parameters(function) -> dict[str, object]:
    """A function's parameter names and their defaults."""
    if inspect.isbuiltin(function):  # its signature comes from torch's list for overrides
        function = torch.overrides.get_testing_overrides()[function]
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


def test_every_function_module_and_optimizer_is_in_the_table():
    functions, modules = zip(*((o.name, o.module) for o in EVERY), strict=True)
    # The log-probabilities belong to linear_cross_entropy.
    assert {*functions, "linear_logprobs"} == set(fastnn.functional.__all__)
    assert set(modules) == set(fastnn.nn.__all__)
    assert {operator.module for operator in OPERATORS} == set(MODULES)
    assert {optimizer.name for optimizer in OPTIMIZERS} == set(fastnn.optim.__all__)


@every_operator
def test_the_stock_function_has_the_same_arguments(operator):
    ours = getattr(fastnn.functional, operator.name)
    theirs = parameters(operator.stock)
    # Arguments that torch lacks are keyword-only, after its own.
    mine = dict(inspect.signature(ours).parameters)
    assert {name: mine.pop(name).default for name in theirs} == theirs
    assert all(p.kind == p.KEYWORD_ONLY for p in mine.values())
    if hasattr(F, operator.name):
        assert operator.stock is getattr(F, operator.name)
    elif operator in CHAINS:
        chain = chains.make((5, 4, 3), (2,))
        assert torch.equal(chain.run(operator.stock), chain.run(chains.stock))
    else:
        arguments = CASES[operator.name].rows(4, 3).arguments()
        composite = getattr(stock, operator.name)
        assert torch.equal(operator.stock(*arguments), composite(*arguments))


@every_operator
def test_the_module_is_one_of_the_stock_module(operator):
    if operator.stock_module is not None:
        assert operator.stock_module is getattr(torch.nn, operator.module)
        assert issubclass(getattr(fastnn.nn, operator.module), operator.stock_module)


@every_operator
def test_the_onnx_function_is_called_as_the_operator(operator):
    """By position: the reference has the operator's arguments in the same order."""
    names = [*parameters(getattr(fastnn.reference, operator.name))]
    assert [*parameters(operator.onnx)][: len(names)] == names


@needs_extension
def test_every_operator_that_computes_has_a_fake_kernel():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastnn::")}
    # These only call their forward operator, whose fake kernel then runs.
    names -= {"fastnn::nll_loss", "fastnn::cross_entropy", "fastnn::mlp"}
    names -= {"fastnn::linear_cross_entropy"}
    records = (*EVERY, *OPTIMIZERS)
    assert {f"fastnn::{fake}" for record in records for fake in record.fakes} == names


@every_operator
def test_flops_are_of_operators_with_fake_kernels(operator):
    assert operator.flops.keys() <= {operator.name, *operator.fakes}
