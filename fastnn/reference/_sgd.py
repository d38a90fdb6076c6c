"""The step of ``SGD``."""

from __future__ import annotations

from torch import Tensor

from fastnn.reference._dtypes import compute_dtype


def _check_sgd_lists(params: list[Tensor], **lists: list[Tensor]) -> None:
    """Raises unless all parameters are floating-point and each list matches them."""
    for i, param in enumerate(params):
        if not param.is_floating_point():
            raise RuntimeError(f"expected params[{i}] to be floating-point, but got {param.dtype}")
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise RuntimeError(
                f"expected as many {name} as params ({len(params)}), but got {len(tensors)}"
            )
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            dtypes = [param.dtype]
            if name == "momentum_buffers" and compute_dtype(param.dtype) != param.dtype:
                dtypes.append(compute_dtype(param.dtype))
            if tensor.shape != param.shape or tensor.dtype not in dtypes:
                raise RuntimeError(
                    f"expected {name}[{i}] to have its parameter's dtype "
                    f"{' or '.join(map(str, dtypes))} and shape {list(param.shape)}, but got "
                    f"{tensor.dtype} and {list(tensor.shape)}"
                )


def sgd_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    is_first_step: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One in-place SGD step over a list of tensors, by the formula in :class:`torch.optim.SGD`'s
    documentation.

    Args:
        params, grads: floating-point tensors of equal dtypes and shapes; ``params`` is modified.
        momentum_buffers: as ``params``, modified; those of bfloat16 and float16 parameters may be
            float32. Empty if ``momentum`` is zero.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in :class:`torch.optim.SGD`.
        is_first_step: write the buffers without reading them, and apply no dampening.
        grad_scale: one-element tensor by which the gradients are first divided in place.
        found_inf: one-element tensor; if it is nonzero, nothing is changed.

    >>> import torch
    >>> from fastnn import reference
    >>> param = torch.ones(2)
    >>> reference.sgd_step_([param], [torch.ones(2)], [], lr=0.5)
    >>> param
    tensor([0.5000, 0.5000])
    """
    _check_sgd_lists(params, grads=grads)
    if momentum != 0:
        _check_sgd_lists(params, momentum_buffers=momentum_buffers)
    if found_inf is not None and bool(found_inf):
        return
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        dtype = compute_dtype(param.dtype)
        if grad_scale is not None:
            grad.div_(grad_scale)
        d = -grad.to(dtype) if maximize else grad.to(dtype)
        if weight_decay != 0:  # 0 * inf would be NaN
            d = d + weight_decay * param.to(dtype)
        if momentum != 0:
            buffer = momentum_buffers[i]
            b = d if is_first_step else momentum * buffer.to(dtype) + (1 - dampening) * d
            buffer.copy_(b)
            d = d + momentum * b if nesterov else b
        param.copy_(param.to(dtype) - lr * d)
