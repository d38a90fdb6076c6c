"""Small float64 arguments, for which derivatives are exact to many digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def class_indices(shape: tuple[int, ...], ignored: bool) -> Tensor:
    """Each class in turn; if there are several rows, one can be ignored."""
    rows = row_shape(shape)
    target = (torch.arange(max(torch.Size(rows).numel(), 1)) % 3).reshape(rows)
    if ignored and target.dim():
        target.view(-1)[1] = -100
    return target


def class_weights() -> Tensor:
    return torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)


def assert_close(actual: object, theirs: object) -> None:
    """For float64 values of order one: 1e-12 is thousands of roundings."""
    __tracebackhide__ = True
    torch.testing.assert_close(actual, theirs, rtol=1e-12, atol=1e-12)
