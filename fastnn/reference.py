"""Each operator in plain PyTorch, written down from its formula: the oracle of the tests, and what
runs where the extension is not built.

The functions have the operators' own signatures (``torch.ops.fastnn.*``) and semantics, for any
floating-point dtype: float16 and bfloat16 are computed in float32 and rounded once.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastnn._torch import running_transform

__all__ = ["cross_entropy", "linear_relu", "log_softmax", "nll_loss", "sgd_step_"]

_COMPUTE_DTYPE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return _COMPUTE_DTYPE.get(dtype, dtype)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``max(input @ weight.T + bias, 0)``; see :func:`fastnn.functional.linear_relu`.

    >>> import torch
    >>> from fastnn import reference
    >>> reference.linear_relu(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
    tensor([[3., 0.]])
    """
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != input.dtype:
            raise RuntimeError(
                f"expected {name} to have dtype {input.dtype}, but got {other.dtype}"
            )
    dtype = _compute_dtype(input.dtype)
    bias = bias if bias is None else bias.to(dtype)
    linear = torch.nn.functional.linear(input.to(dtype), weight.to(dtype), bias)
    return linear.relu().to(input.dtype).contiguous()


def log_softmax(input: Tensor, dim: int) -> Tensor:
    """``x - max - log(sum(exp(x - max)))``; see :func:`fastnn.functional.log_softmax`.

    >>> import torch
    >>> from fastnn import reference
    >>> reference.log_softmax(torch.zeros(2), 0).exp()
    tensor([0.5000, 0.5000])
    """
    dim = operator.index(dim)  # torch 2.9 reduces over everything where it is a tensor
    if not input.is_floating_point():
        raise NotImplementedError(f'"log_softmax" not implemented for {input.dtype}')
    x = input.to(_compute_dtype(input.dtype))
    # The maximum cancels in the formula, so that it needs no gradient; max() over nothing raises.
    shift = x.detach().amax(dim, keepdim=True) if x.numel() else x.detach().sum(dim, keepdim=True)
    shifted = x - shift
    output = shifted - shifted.exp().sum(dim, keepdim=True).log()
    return output.to(input.dtype).contiguous()


def _class_dim(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def _per_class(weight: Tensor, input: Tensor) -> Tensor:
    """The class weights, shaped to broadcast against the input."""
    shape = [1] * input.dim()
    shape[_class_dim(input)] = -1
    return weight.view(shape)


def _check_loss_arguments(input: Tensor, weight: Tensor | None, reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if input.dim() < 1:
        raise ValueError("Expected 1 or more dimensions in input (got 0)")
    if not input.is_floating_point():
        raise NotImplementedError(f"input must be floating-point, got {input.dtype}")
    classes = input.shape[_class_dim(input)]
    if weight is not None and weight.shape != (classes,):
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes or no classes "
            f"but got weight tensor of shape: {list(weight.shape)}"
        )


def _check_class_indices(input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {target.dtype}")
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("weight of class indices is not differentiable: it requires a gradient")
    if weight is not None and weight.dtype != input.dtype:
        raise RuntimeError(f"expected weight to have dtype {input.dtype}, but got {weight.dtype}")
    if input.dim() == 1:
        if tuple(target.shape) not in ((), (1,)):
            raise ValueError(f"Expected target size [], got {list(target.shape)}")
        return
    if target.dim() == 0 or target.shape[0] != input.shape[0]:
        raise ValueError(
            f"Expected input batch_size ({input.shape[0]}) to match target batch_size "
            f"({target.shape[0] if target.dim() else 0})."
        )
    if target.shape[1:] != input.shape[2:]:
        expected = [input.shape[0], *input.shape[2:]]
        raise RuntimeError(f"Expected target size {expected}, got {list(target.shape)}")


def _kept_and_index(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Which rows count, and a class index for each that is always in range."""
    _check_class_indices(input, target, weight)
    target = target.long()
    if input.dim() == 1:
        target = target.reshape(())
    kept = target != ignore_index
    has_values = not (target.is_meta or is_compiling() or running_transform() is not None)
    if not has_values:
        return kept, target.where(kept, 0)
    classes = input.shape[_class_dim(input)]
    bad = target[kept & ((target < 0) | (target >= classes))]
    if bad.numel():
        raise IndexError(
            f"Target {int(bad[0])} is out of bounds: input has {classes} classes, so that a "
            f"target must be in [0, {classes}) or equal ignore_index ({ignore_index})."
        )
    return kept, target.where(kept, 0)


def _reduce(losses: Tensor, total_weight: Tensor | float, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    # NaN over nothing, smoothing's share included, which does not vanish with the targets' weights.
    total_weight = torch.as_tensor(total_weight, dtype=losses.dtype)
    return losses.sum() / total_weight.where(total_weight != 0, torch.nan)


def _gather(input: Tensor, index: Tensor) -> Tensor:
    """The input's value at each row's class; zeros where there is no class to choose."""
    class_dim = _class_dim(input)
    if input.shape[class_dim] == 0:
        return input.sum(class_dim)
    return input.gather(class_dim, index.unsqueeze(class_dim)).squeeze(class_dim)


def _row_weights(input: Tensor, kept: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    """The weight of each row's class, zero for ignored rows."""
    if weight is None or weight.numel() == 0:
        return kept.to(input.dtype)
    return weight.to(input.dtype)[index].where(kept, 0)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """``-weight[target] * input[target]`` per row; see :func:`fastnn.functional.nll_loss`.

    >>> import torch
    >>> from fastnn import reference
    >>> reference.nll_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([1]))
    tensor(2.)
    """
    _check_loss_arguments(input, weight, reduction)
    kept, index = _kept_and_index(input, target, weight, operator.index(ignore_index))
    log_probs = input.to(_compute_dtype(input.dtype))
    row_weights = _row_weights(log_probs, kept, index, weight)
    losses = (-row_weights * _gather(log_probs, index)).where(kept, 0)
    return _reduce(losses, row_weights.sum(), reduction).to(input.dtype)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``-sum_c q_c * log_softmax(input)_c`` per row; see :func:`fastnn.functional.cross_entropy`.

    >>> import torch
    >>> from fastnn import reference
    >>> reference.cross_entropy(torch.zeros(1, 2), torch.tensor([1]))
    tensor(0.6931)
    """
    if input.dim() == 0:
        raise IndexError("Dimension out of range: input must have 1 or more dimensions, got 0")
    _check_loss_arguments(input, weight, reduction)
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    class_dim = _class_dim(input)
    classes = input.shape[class_dim]
    uniform = label_smoothing / max(classes, 1)

    if target.shape == input.shape:
        if not target.is_floating_point():
            raise RuntimeError(
                "Expected floating point type for target with class probabilities, "
                f"got {target.dtype}"
            )
        if ignore_index >= 0:
            raise RuntimeError("ignore_index is not supported for floating point target")
        dtype = torch.promote_types(input.dtype, target.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
        log_probs = log_softmax(input.to(_compute_dtype(input.dtype)), class_dim)
        q = target.to(_compute_dtype(dtype)) * (1 - label_smoothing) + uniform
        if weight is not None:
            q = q * _per_class(weight, input)
        losses = -(q * log_probs).sum(class_dim)
        rows = losses.numel() if input.numel() else float("nan")
        return _reduce(losses, rows, reduction).to(dtype)

    kept, index = _kept_and_index(input, target, weight, operator.index(ignore_index))
    log_probs = log_softmax(input.to(_compute_dtype(input.dtype)), class_dim)
    row_weights = _row_weights(log_probs, kept, index, weight)
    losses = -row_weights * (1 - label_smoothing) * _gather(log_probs, index)
    if label_smoothing > 0:
        smooth = log_probs if weight is None else log_probs * _per_class(weight, input)
        losses = losses - uniform * smooth.sum(class_dim)
    losses = losses.where(kept, 0)
    return _reduce(losses, row_weights.sum(), reduction).to(input.dtype)


def _check_sgd_lists(params: list[Tensor], **lists: list[Tensor]) -> None:
    """Raises unless the parameters are floating-point and each list fits them."""
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
            if name == "momentum_buffers" and _compute_dtype(param.dtype) != param.dtype:
                dtypes.append(_compute_dtype(param.dtype))
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
    """One SGD step in place over a list of tensors; the formula is that in
    :class:`torch.optim.SGD`'s documentation.

    Args:
        params, grads: floating-point tensors, alike in dtype and shape; ``params`` is written.
        momentum_buffers: likewise, written; those of bfloat16 and float16 parameters may be of
            float32. Empty where ``momentum`` is zero.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in :class:`torch.optim.SGD`.
        is_first_step: the buffers are written without being read, and dampening is not applied.
        grad_scale: one-element tensor that the gradients are divided by in place first.
        found_inf: one-element tensor; where it is nonzero nothing is done.

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
        dtype = _compute_dtype(param.dtype)
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
