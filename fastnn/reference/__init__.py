"""Each operator in plain PyTorch, written from its formula: the tests' oracle, and the fallback if
the extension is not built.

The functions have the signatures and semantics of the operators (``torch.ops.fastnn.*``), for any
floating-point dtype: float16 and bfloat16 are computed in float32 and rounded once. The backward
functions are differentiable themselves, and all support :func:`torch.vmap`.
"""

from __future__ import annotations

from fastnn.reference._cross_entropy import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_kept_backward,
    cross_entropy_target_backward,
)
from fastnn.reference._linear import linear, linear_backward, linear_relu, linear_relu_backward
from fastnn.reference._linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
    linear_cross_entropy_gradients,
    linear_cross_entropy_logits_backward,
)
from fastnn.reference._log_softmax import log_softmax, log_softmax_backward
from fastnn.reference._mlp import mlp, mlp_backward, mlp_forward
from fastnn.reference._nll_loss import nll_loss, nll_loss_backward, nll_loss_forward
from fastnn.reference._sgd import sgd_step_

__all__ = [
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "cross_entropy_kept_backward",
    "cross_entropy_target_backward",
    "linear",
    "linear_backward",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_forward",
    "linear_cross_entropy_gradients",
    "linear_cross_entropy_logits_backward",
    "linear_relu",
    "linear_relu_backward",
    "log_softmax",
    "log_softmax_backward",
    "mlp",
    "mlp_backward",
    "mlp_forward",
    "nll_loss",
    "nll_loss_backward",
    "nll_loss_forward",
    "sgd_step_",
]
