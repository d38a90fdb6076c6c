"""Steps a parameter group in one pass: which parameters the operator takes, and what happens to the
others. Nothing here depends on the optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling
from torch.optim.optimizer import Optimizer

from fastnn import _torch
from fastnn._dtensor import are_spread_alike, local_part, spread_like
from fastnn._extension import extension
from fastnn.optim._hooks import has_replaced_step, hook_step, take_over_scheduler
from fastnn.optim._state import Float32State

State = dict[Tensor, dict[str, Tensor]]


class FusedOptimizer(Float32State):
    """A torch optimizer whose step is one pass of our operator.

    A subclass also derives from torch's class. It names its state (see :class:`Float32State`),
    passes its options to its operator (:meth:`_step_fused`), and computes the same with torch's
    functions (:meth:`_step_stock`). Its ``step`` is :meth:`_step` with hooks, under its own name,
    which torch's messages and profilers show.
    """

    _stock: ClassVar[type[Optimizer]]
    # The step of ``_stock`` without hooks, as a function.
    _stock_step: ClassVar[Callable[..., Any]]

    def _step_fused(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        state: State,
        scaling: Mapping[str, Tensor | None],
        all_or_nothing: bool,
    ) -> list[Tensor]:
        """Steps what the operator can take and returns the rest.

        With ``all_or_nothing`` it steps no parameter unless it can step all.
        """
        raise NotImplementedError

    def _step_stock(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Steps parameters with torch's own functions, one by one, and keeps their state."""
        raise NotImplementedError

    def _kernels_may_skip(self, group: dict[str, Any]) -> bool:
        """Whether the optimizer is unchanged after a step that the kernels skip."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        hook_step(type(self))
        super().__setstate__(state)

    @classmethod
    def _take_over(cls, optimizer: Any) -> Any:
        """Turns a live torch optimizer into one of ours, the same object; see ``from_torch``."""
        if isinstance(optimizer, cls):
            return optimizer
        if type(optimizer) is not cls._stock:
            raise TypeError(
                f"optimizer: expected a torch.optim.{cls._stock.__name__}, got "
                f"{type(optimizer).__name__}"
            )
        if has_replaced_step(optimizer):
            raise TypeError("optimizer: its step has been replaced; expected PyTorch's own")
        optimizer.__class__ = cls
        ours = cast(FusedOptimizer, optimizer)
        hook_step(cls)
        ours._look_at_groups()
        take_over_scheduler(ours)
        return ours

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """Implements ``step``, inside its hooks."""
        if is_compiling():
            # torch's own loop over the parameters, which the compiler fuses, except with state of
            # another dtype than the gradients', which torch never creates and may not accept.
            if self._has_float32_state:
                return _uncompiled_step(self, closure)
            return self._stock_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters.

        Args:
            set_to_none: set them to None (default) instead of zero.
        """
        if extension is None or not set_to_none or is_compiling() or _torch.profiler_enabled():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            extension.clear_gradients(_params_of(group))

    def _step_group(self, group: dict[str, Any]) -> None:
        if group.get(self._float32_option):
            self._has_float32_state = True  # set in the group since the last check
        params = _params_of(group)
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        fusable = extension is not None and self._is_fusable(group)
        # On a GPU the kernels check found_inf, so that the CPU needn't wait for it.
        kernels_skip = False
        if found_inf is not None:
            kernels_skip = fusable and _is_on_gpu(found_inf) and self._kernels_may_skip(group)
            if not kernels_skip and bool(found_inf):
                return
        if not fusable:
            self._step_as_torch(group, params, grad_scale)
            return
        state, fused = self.state, group["fused"]
        _ = group["foreach"]  # no effect, but a group without it raises, as in torch
        scaling = {"grad_scale": grad_scale, "found_inf": found_inf if kernels_skip else None}
        # fused=True must refuse what torch's fused implementation does, before anything changes.
        rest = self._step_fused(group, params, state, scaling, all_or_nothing=bool(fused))
        if rest and fused:
            self._check_fused(rest)
            self._step_fused(group, params, state, scaling, all_or_nothing=False)
        if rest:
            rest = self._step_parts(group, rest, scaling)
        if rest and not (kernels_skip and bool(found_inf)):
            self._step_as_torch(group, rest, grad_scale)

    def _is_fusable(self, group: dict[str, Any]) -> bool:
        """Whether the operator can read the state, and autograd doesn't need to see the step."""
        lr, weight_decay = group["lr"], group["weight_decay"]
        return not (
            type(self.state) is not defaultdict
            or self.defaults["differentiable"]
            or (isinstance(lr, Tensor) and lr.requires_grad)
            or (isinstance(weight_decay, Tensor) and weight_decay.requires_grad)
        )

    @torch.no_grad()
    def _step_parts(
        self, group: dict[str, Any], params: list[Tensor], scaling: Mapping[str, Tensor | None]
    ) -> list[Tensor]:
        """Steps the local part of each DTensor and returns the rest; the update is elementwise."""
        rest: list[Tensor] = []
        whole: dict[Tensor, Tensor] = {}  # the DTensor of each part
        parts: State = defaultdict(dict)
        for param in params:
            grad, states = _grad_of(param), self._states_of(param)
            if grad.dtype != param.dtype or not are_spread_alike(param, grad, *states.values()):
                rest.append(param)
                continue
            part = local_part(param).detach()
            part.grad = local_part(grad)
            for name, state in states.items():
                parts[part][name] = local_part(state)
            whole[part] = param
        left = self._step_fused(group, list(whole), parts, scaling, all_or_nothing=False)
        rest += [whole.pop(part) for part in left]
        for part, param in whole.items():
            for name, state in parts.get(part, {}).items():
                if self.state[param].get(name) is None:
                    self.state[param][name] = spread_like(param, state)
        increment_version(whole.values())
        return rest

    def _states_of(self, param: Tensor) -> dict[str, Tensor]:
        """The state that a parameter has."""
        entry = self.state.get(param, {})
        states = {name: entry.get(name) for name in self._state_names}
        return {name: state for name, state in states.items() if state is not None}

    def _step_as_torch(
        self, group: dict[str, Any], params: list[Tensor], grad_scale: Tensor | None
    ) -> None:
        """Torch's own update, parameter by parameter: its fused one is wrong for odd layouts."""
        params = [param for param in params if param.grad is not None]
        grads = [_grad_of(param) for param in params]
        if group["fused"]:
            self._check_fused(params)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            if grad_scale is not None:
                for grad in grads:
                    grad.div_(grad_scale)
            self._step_stock(group, params, grads)

    def _check_fused(self, params: list[Tensor]) -> None:
        """Raises for parameters that torch rejects with fused=True."""
        name = f"{self._stock.__name__}(fused=True)"
        for param in params:
            _torch.check_param_for_fused(param)
            grad = _grad_of(param)
            if grad.is_sparse:
                raise RuntimeError(f"{name} does not support sparse gradients")
            if grad.dtype != param.dtype:
                raise RuntimeError(
                    f"{name}: expected scalar type {param.dtype} for the gradient, as for its "
                    f"parameter, but found {grad.dtype}"
                )
            if any(_is_lazy(tensor) for tensor in (param, grad)):
                raise RuntimeError(
                    f"{name} does not support lazily negated, conjugated or zero tensors"
                )


@_torch.disable_dynamo
def _uncompiled_step(optimizer: FusedOptimizer, closure: Callable[[], Any] | None) -> Any:
    return optimizer._step(closure)


def scalar(value: float | Tensor) -> float | Tensor:
    """An option as the operators take it: a number, or a tensor on a GPU."""
    check_number("lr", value)
    return float(value) if isinstance(value, Tensor) and not _is_on_gpu(value) else value


def check_number(name: str, value: object) -> None:
    """Raises TypeError for an option that isn't a number."""
    if not hasattr(type(value), "__float__"):
        raise TypeError(f"{name} must be a number or a tensor of one, but got {value!r}")


def _params_of(group: dict[str, Any]) -> list[Tensor]:
    """The group's parameters, which may be any iterable; an iterator is used up afterwards."""
    params = group["params"]
    return params if type(params) is list else list(params)


def _grad_of(param: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    return cast(Tensor, param.grad)


def _is_lazy(tensor: Tensor) -> bool:
    return tensor.is_neg() or tensor.is_conj() or _torch.is_zero_tensor(tensor)


def _is_on_gpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_cuda
