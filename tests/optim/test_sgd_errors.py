"""Tensors that the operator of SGD's step rejects."""

from __future__ import annotations

import pytest
import torch

from support.bad_calls import floats
from support.marks import needs_extension
from support.operators import memory_of

WRONG_FOR_SGD_STEP = {
    "a gradient less": ({"grads": lambda: [floats(3)]}, "grads"),
    "a gradient of another shape": ({"grads": lambda: [floats(3), floats(2, 1)]}, r"grads\[1\]"),
    "a gradient of another dtype": (
        {"grads": lambda: [floats(3, dtype=torch.float64), floats(2, 2)]},
        r"grads\[0\]",
    ),
    "no momentum buffers": ({"momentum_buffers": list}, "momentum_buffers"),
    "a buffer of another shape": (
        {"momentum_buffers": lambda: [floats(3), floats(4)]},
        r"momentum_buffers\[1\]",
    ),
    "a buffer of another dtype": (
        {"momentum_buffers": lambda: [floats(3, dtype=torch.bfloat16), floats(2, 2)]},
        r"momentum_buffers\[0\]",
    ),
    "parameters of integers": (
        {
            name: lambda: [torch.ones(3, dtype=torch.long), torch.ones(2, 2, dtype=torch.long)]
            for name in ("params", "grads", "momentum_buffers")
        },
        "params",
    ),
}


@needs_extension
@pytest.mark.parametrize("wrong", WRONG_FOR_SGD_STEP)
def test_sgd_step_with_wrong_tensors(wrong):
    """The tensors before the wrong one are left unchanged, too."""
    replaced, says = WRONG_FOR_SGD_STEP[wrong]
    names = ("params", "grads", "momentum_buffers")
    lists = {name: [floats(3), floats(2, 2)] for name in names}
    lists.update({name: make() for name, make in replaced.items()})
    given = [tensor for tensors in lists.values() for tensor in tensors]
    before = [memory_of(tensor) for tensor in given]
    with pytest.raises(RuntimeError, match=says):
        torch.ops.fastnn.sgd_step_(**lists, lr=0.1, momentum=0.9)
    for tensor, bytes_before in zip(given, before, strict=True):
        assert torch.equal(memory_of(tensor), bytes_before)
