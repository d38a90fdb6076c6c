"""SGD with momentum: its options, its operator, and torch's own functions for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd as torch_sgd

from fastnn import _torch
from fastnn._extension import extension
from fastnn.optim._fused import FusedOptimizer, State, check_number, scalar
from fastnn.optim._hooks import hook_step, stock_step, with_hooks

__all__ = ["SGD"]


class SGD(FusedOptimizer, torch.optim.SGD):
    r"""Stochastic gradient descent with momentum; :class:`torch.optim.SGD` with our operator.

    The whole update of a parameter list (weight decay, momentum, step) is one pass over memory in
    one parallel region. ``param_groups``, ``state_dict`` (in both directions), hooks, schedulers
    and ``GradScaler`` work as in torch; ``lr`` and the other options are read from the groups at
    each step. Each process steps its local part of a
    :class:`~torch.distributed.tensor.DTensor`. torch's own path runs what the fused pass can't
    serve: sparse, complex or lazily negated tensors, other tensor subclasses,
    ``differentiable=True``, an ``lr`` that requires a gradient, and gradients or momentum buffers
    of another dtype or device than their parameter (except buffers from ``float32_momentum``).

    Args:
        params: iterable of parameters, of named parameters, or of dicts (parameter groups).
        lr: learning rate, float or one-element tensor (default 1e-3).
        momentum: momentum factor (default 0).
        dampening: dampening of the momentum (default 0); not applied at a parameter's first step.
        weight_decay: L2 penalty (default 0).
        nesterov: Nesterov momentum (default ``False``).
        maximize: ascend instead of descend (default ``False``).
        foreach, fused: accepted as in torch. All settings compute the same; ``fused=True`` also
            makes ``GradScaler`` pass on its scale instead of unscaling first.
        differentiable: let autograd see the step (default ``False``).
        float32_momentum: keep the momentum buffers of bfloat16 and float16 parameters in float32,
            in which small gradients don't vanish, at 4 bytes per element instead of 2 (default
            ``False``: the parameter's dtype, as in torch). A parameter group may set its own value,
            and a loaded state dict's groups override it. It applies to buffers when they are
            created or loaded, not to existing ones. torch's optimizer rounds such buffers when it
            loads them, and ``torch.distributed.checkpoint`` requires the same setting for saving
            and loading. Under ``torch.compile`` the step then runs our kernels at a graph break.

    Raises:
        ValueError: as :class:`torch.optim.SGD`, for a negative lr, momentum or weight decay, or for
            Nesterov momentum without momentum or with dampening.

    The formula is that in :class:`torch.optim.SGD`'s documentation.

    >>> import torch, fastnn
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = fastnn.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.9000, 0.9000])
    """

    # Where pickles, and readers, look for it.
    __module__ = "fastnn.optim"

    _stock = torch.optim.SGD
    _stock_step = stock_step(torch.optim.SGD)
    _state_names = ("momentum_buffer",)
    _float32_option = "float32_momentum"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        float32_momentum: bool = False,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "dampening": dampening}
        for name, value in (options | {"weight_decay": weight_decay}).items():
            check_number(name, value)
        hook_step(type(self))
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        if float32_momentum:
            self._ask_for_float32()

    @classmethod
    def from_torch(cls, optimizer: torch.optim.SGD) -> SGD:
        """Takes over a live :class:`torch.optim.SGD` in the middle of its training.

        The optimizer stays the same object and becomes one of ours: schedulers, scalers and other
        holders of a reference keep working, and parameter groups, state and hooks are kept.

        Args:
            optimizer: the optimizer, with or without state.

        Returns:
            ``optimizer``.

        Raises:
            TypeError: ``optimizer`` is not a :class:`torch.optim.SGD`, or its ``step`` is not
                PyTorch's (a subclass, or replaced).

        >>> import torch, fastnn
        >>> stock = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
        >>> optimizer = fastnn.optim.SGD.from_torch(stock)
        >>> optimizer is stock, type(stock)
        (True, <class 'fastnn.optim.SGD'>)
        """
        return cls._take_over(optimizer)

    @with_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None without one.
        """
        return self._step(closure)

    def _step_fused(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        state: State,
        scaling: Mapping[str, Tensor | None],
        all_or_nothing: bool,
    ) -> list[Tensor]:
        return extension.sgd_step_group(
            params,
            state,
            group,
            lr=scalar(group["lr"]),
            float32_momentum=group.get("float32_momentum"),
            all_or_nothing=all_or_nothing,
            **scaling,
        )

    def _step_stock(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        buffers: list[Tensor | None] = []
        if group["momentum"] != 0:
            buffers = [self.state[param].get("momentum_buffer") for param in params]
        are_new = [buffer is None for buffer in buffers]
        torch_sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=any(grad.is_sparse for grad in grads),
            foreach=False,
            fused=False,
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        for param, buffer, is_new in zip(params, buffers, are_new, strict=False):
            if buffer is not None and is_new and self._wants_float32(group, param):
                buffer = buffer.float()
            self.state[param]["momentum_buffer"] = buffer

    def _kernels_may_skip(self, group: dict[str, Any]) -> bool:
        # With dampening the first step differs from later ones: skipped, it must leave no buffer.
        return not group["dampening"]


_torch.register_functional_sgd(SGD)
