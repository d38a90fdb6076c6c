"""SGD with momentum over all parameters at once, in place of :class:`torch.optim.SGD`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _use_grad_for_differentiable
from torch.optim.sgd import sgd as torch_sgd

from fastnn._extension import ops

__all__ = ["SGD"]

_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
# A subclass may keep its data elsewhere (DTensor) or want to see the call: torch's path serves it.
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


class SGD(torch.optim.SGD):
    r"""Stochastic gradient descent with momentum; :class:`torch.optim.SGD` with our operator.

    The whole update of a parameter list (weight decay, momentum, step) is one pass over memory in
    one parallel region. ``param_groups``, ``state_dict`` (both ways), hooks, schedulers and
    ``GradScaler`` work as in torch; ``lr`` and the other options are read from the groups at each
    step. What the fused pass can't serve (sparse or complex tensors, tensor subclasses,
    ``differentiable=True``, an ``lr`` that requires a gradient, a gradient or momentum buffer of
    another dtype or device than its parameter) takes torch's own path.

    Args:
        params: iterable of parameters, of named parameters, or of dicts (parameter groups).
        lr: learning rate, float or one-element tensor (default 1e-3).
        momentum: momentum factor (default 0).
        dampening: dampening of the momentum (default 0); not applied at a parameter's first step.
        weight_decay: L2 penalty (default 0).
        nesterov: Nesterov momentum (default ``False``).
        maximize: ascend instead of descend (default ``False``).
        foreach, fused: accepted as in torch. All settings compute the same; ``fused=True`` also
            makes ``GradScaler`` hand over its scale instead of unscaling first.
        differentiable: let autograd see the step (default ``False``).

    Errors: as :class:`torch.optim.SGD` (``ValueError`` for a negative lr, momentum or weight
    decay, or for Nesterov momentum without momentum or with dampening).

    Formula: that of :class:`torch.optim.SGD`'s documentation.

    >>> import torch, fastnn
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = fastnn.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.9000, 0.9000])
    """

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, params, grads, buffers)
        if group["momentum"] == 0:
            buffers = [None] * len(params)
        amp = {
            "grad_scale": getattr(self, "grad_scale", None),
            "found_inf": getattr(self, "found_inf", None),
        }
        # Decided before any buffer is made, so that a skipped first step leaves no state behind.
        if amp["found_inf"] is not None and bool(amp["found_inf"]):
            return
        if has_sparse_grad and group["fused"]:
            raise RuntimeError("SGD(fused=True) does not support sparse gradients")

        fusable = _options_are_plain(group)
        first: list[int] = []
        later: list[int] = []
        rest: list[int] = []
        for i, (param, grad, buffer) in enumerate(zip(params, grads, buffers, strict=True)):
            if not (fusable and _is_fusable(param, grad, buffer)):
                rest.append(i)
            elif buffer is None and group["momentum"] != 0:
                first.append(i)
            else:
                later.append(i)

        for i in first:
            buffers[i] = torch.empty_like(params[i])
        for indices, is_first_step in ((first, True), (later, False)):
            if indices:
                ops.sgd_step_(
                    [params[i] for i in indices],
                    [grads[i] for i in indices],
                    [buffers[i] for i in indices] if group["momentum"] != 0 else [],
                    lr=float(group["lr"]),
                    momentum=group["momentum"],
                    dampening=group["dampening"],
                    weight_decay=float(group["weight_decay"]),
                    nesterov=group["nesterov"],
                    maximize=group["maximize"],
                    is_first_step=is_first_step,
                    **amp,
                )
        if rest:
            self._step_as_torch(group, params, grads, buffers, rest, amp)
        if group["momentum"] != 0:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer

    def _step_as_torch(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor | None],
        indices: list[int],
        amp: dict[str, Tensor | None],
    ) -> None:
        """Torch's own update of the parameters at ``indices``; fills in their buffers."""
        torch_buffers = [buffers[i] for i in indices] if group["momentum"] != 0 else []
        torch_sgd(
            [params[i] for i in indices],
            [grads[i] for i in indices],
            torch_buffers,
            has_sparse_grad=any(grads[i].is_sparse for i in indices),
            foreach=group["foreach"],
            fused=group["fused"],
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            **amp,
        )
        for i, buffer in zip(indices, torch_buffers, strict=False):
            buffers[i] = buffer


def _options_are_plain(group: dict[str, Any]) -> bool:
    """Whether no option wants autograd to see the step."""
    return not (
        group["differentiable"]
        or (isinstance(group["lr"], Tensor) and group["lr"].requires_grad)
        or (isinstance(group["weight_decay"], Tensor) and group["weight_decay"].requires_grad)
    )


def _is_fusable(param: Tensor, grad: Tensor, buffer: Tensor | None) -> bool:
    """Whether the operator takes this parameter; any strides are fine."""
    return (
        type(param) in _PLAIN_TYPES
        and param.dtype in _DTYPES
        and param.device.type == "cpu"
        and param.layout is torch.strided
        and all(
            type(other) is Tensor
            and other.dtype is param.dtype
            and other.device == param.device
            and other.layout is torch.strided
            for other in (grad, buffer)
            if other is not None
        )
    )
