"""Stock PyTorch code for what is a single operator in fastnn, to compare results."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.relu(F.linear(input, weight, bias))
