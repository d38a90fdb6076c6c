"""What is written in stock PyTorch where fastnn has one operator, for results to be compared."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.relu(F.linear(input, weight, bias))
