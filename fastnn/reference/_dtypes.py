"""The dtype that narrow numbers are computed in."""

from __future__ import annotations

import torch
from torch import Tensor

_COMPUTE_DTYPE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return _COMPUTE_DTYPE.get(dtype, dtype)


def widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts to the wider of its own dtype and another."""
    return tensor.to(torch.promote_types(tensor.dtype, dtype))
