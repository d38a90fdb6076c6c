"""Helpers for :class:`torch.distributed.tensor.DTensor`, a tensor distributed over processes.

Importing its module is slow, so fastnn doesn't; a caller that has a DTensor has imported it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    module = getattr(torch.distributed, "tensor", None)
    return module is not None and isinstance(value, module.DTensor)


def are_spread_alike(first: Tensor, *others: Tensor) -> bool:
    """Whether all are DTensors with the same mesh and placements."""
    return is_dtensor(first) and all(
        is_dtensor(other)
        and other.device_mesh == first.device_mesh
        and other.placements == first.placements
        for other in others
    )


def local_part(dtensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds."""
    return cast("DTensor", dtensor).to_local()


def spread_like(other: Tensor, part: Tensor) -> Tensor:
    """The DTensor of which this process holds ``part``, distributed like ``other``."""
    dtensor = cast("DTensor", other)
    return torch.distributed.tensor.DTensor.from_local(
        part,
        dtensor.device_mesh,
        dtensor.placements,
        shape=dtensor.shape,
        stride=dtensor.stride(),
    )
