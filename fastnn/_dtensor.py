"""What fastnn knows of :class:`torch.distributed.tensor.DTensor`, a tensor spread over processes.

Who has one has imported its module, which takes so long that fastnn doesn't.
"""

from __future__ import annotations

import torch


def is_dtensor(value: object) -> bool:
    module = getattr(torch.distributed, "tensor", None)
    return module is not None and isinstance(value, module.DTensor)
