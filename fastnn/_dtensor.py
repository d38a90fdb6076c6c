"""What fastnn knows of :class:`torch.distributed.tensor.DTensor`, a tensor spread over processes.

Who has one has imported its module, which takes so long that fastnn doesn't.
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
    """Whether all are DTensors, and each process has the same elements of each."""
    return is_dtensor(first) and all(
        is_dtensor(other)
        and other.device_mesh == first.device_mesh
        and other.placements == first.placements
        for other in others
    )


def local_part(dtensor: Tensor) -> Tensor:
    """The part of a DTensor that this process has."""
    return cast("DTensor", dtensor).to_local()


def spread_like(other: Tensor, part: Tensor) -> Tensor:
    """The DTensor of which this process has that part, spread as another."""
    dtensor = cast("DTensor", other)
    return torch.distributed.tensor.DTensor.from_local(
        part,
        dtensor.device_mesh,
        dtensor.placements,
        shape=dtensor.shape,
        stride=dtensor.stride(),
    )
