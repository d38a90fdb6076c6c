"""benchmarks.verify: results are compared before they are timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import case as case_module
from benchmarks import verify
from benchmarks.case import Function, Inputs
from benchmarks.cases import cross_entropy
from benchmarks.cases.classifiers import logits_and_targets

pytestmark = pytest.mark.cpu_only("the benchmarks")


def test_error_is_relative_and_sees_wrong_gradients():
    x = torch.rand(50, requires_grad=True)  # positive: a sum near zero has a large relative error
    right, wrong = (
        Function("a", torch.sum),
        Function("b", lambda x: x.sum() + 0.1 * x.detach().sum()),
    )
    reference = list(verify._tensors(right.check(Inputs((x,)).double())))
    # 50 additions, each with a rounding error of at most 6e-8.
    assert verify.error(right, Inputs((x,)), reference) < 3e-6
    assert verify.error(wrong, Inputs((x,)), reference) == pytest.approx(0.1, rel=1e-3)
    halved = Function("c", lambda x: x.sum() - 0.5 * (x - x.detach()).sum())
    assert verify.error(halved, Inputs((x,)), reference) == pytest.approx(0.5, rel=1e-3)
    nan = Function("d", lambda x: x.sum() * float("nan"))
    assert verify.error(nan, Inputs((x,)), reference) == float("inf")


@pytest.mark.parametrize("gradients", [False, True])
def test_a_mean_over_rows_is_the_same_by_some_rows_at_a_time(gradients: bool, monkeypatch):
    monkeypatch.setattr(case_module, "EXACT_ELEMENTS", 3 * 7)  # rows of 7, the last two alone
    generator = torch.Generator().manual_seed(0)
    inputs = logits_and_targets(generator, 8, 7, torch.float32, gradients)
    function = cross_entropy._with_smoothing(torch.nn.functional.cross_entropy, 0.1)
    whole = list(verify._tensors(Function("a", function).exact(inputs)))
    parts = list(verify._tensors(case_module.MeanOverRows("b", function).exact(inputs)))
    assert len(parts) == len(whole) == 1 + gradients
    torch.testing.assert_close(parts, [one.detach() for one in whole])
    assert parts[0].dtype == torch.float64
