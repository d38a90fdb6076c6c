"""SGD with momentum over all parameters at once, in place of :class:`torch.optim.SGD`."""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.sgd import sgd as torch_sgd

from fastnn import _torch
from fastnn._dtensor import are_spread_alike, local_part, spread_like
from fastnn._extension import extension

__all__ = ["SGD"]

_HALF = (torch.bfloat16, torch.float16)

# torch's step without the hooks that its first SGD in a process puts around it.
_torch_step = inspect.unwrap(
    torch.optim.SGD.step, stop=lambda step: not getattr(step, "hooked", False)
)


def _with_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a step in a profiler range and its hooks, as torch does, but only when needed.

    They would cost a small model's whole step. Where a subclass's step calls its parent's, they run
    around the subclass's alone.

    Args:
        step: the method.

    Returns: the method that takes its place in its class.
    """
    observed_step = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: SGD, /, *args: Any, **kwargs: Any) -> Any:
        if _torch.is_step_observed(self) and _outermost_hooks(type(self)) in (wrapper, None):
            return observed_step(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = wrapper  # type: ignore[attr-defined]
    return wrapper


def _runs_hooks(step: Callable[..., Any]) -> bool:
    """Whether a step has torch's mark that it runs the hooks itself, which is a plain True.

    Ours names its owner, since functools.wraps copies it to steps that don't.
    """
    return getattr(step, "hooked", None) in (True, step)


def _outermost_hooks(cls: type) -> Callable[..., Any] | None:
    """The step that runs the hooks, of those that a class and its parents define."""
    for parent in cls.__mro__:
        step = vars(parent).get("step")
        if step is not None and _runs_hooks(step):
            return step
    return None


class SGD(torch.optim.SGD):
    r"""Stochastic gradient descent with momentum; :class:`torch.optim.SGD` with our operator.

    The whole update of a parameter list (weight decay, momentum, step) is one pass over memory in
    one parallel region. ``param_groups``, ``state_dict`` (both ways), hooks, schedulers and
    ``GradScaler`` work as in torch; ``lr`` and the other options are read from the groups at each
    step. Each process steps its own part of a :class:`~torch.distributed.tensor.DTensor`. What the
    fused pass can't serve (sparse, complex or lazily negated tensors, other tensor subclasses,
    ``differentiable=True``, an ``lr`` that requires a gradient, a gradient or momentum buffer of
    another dtype or device than its parameter's, but for buffers as ``float32_momentum`` makes
    them) takes torch's own path.

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
        float32_momentum: gives bfloat16 and float16 parameters momentum buffers of float32, in
            which small gradients don't vanish, of 4 bytes to an element instead of 2 (default
            ``False``: of the parameter's dtype, as in torch). A parameter group may have a value of
            its own, and the groups of a loaded state dict that have one replace it. It applies to
            buffers as they are made or loaded; others stay as they are. torch's optimizer rounds
            such buffers as it loads them, and ``torch.distributed.checkpoint`` asks that who saves
            and who loads have both set it or neither. Under ``torch.compile`` the step runs our
            kernels then, at a graph break.

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

    # Where its pickles look for it, and its readers.
    __module__ = "fastnn.optim"

    # Whether a group has, or had, float32_momentum: a compiled step that looked for it there would
    # be compiled anew for each lr.
    _has_float32_momentum = False

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
        self._hook_step()
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
        # Not torch's, so that the groups have it only where asked for.
        if float32_momentum:
            self.defaults["float32_momentum"] = True
            for group in self.param_groups:
                group.setdefault("float32_momentum", True)
            self._look_at_groups()

    @classmethod
    def _hook_step(cls) -> None:
        """Lets a subclass's own step run the hooks, before torch does so at a higher cost."""
        if not _runs_hooks(cls.step):
            cls.step = _with_hooks(cls.step)  # type: ignore[method-assign]

    def _look_at_groups(self) -> None:
        chosen = (group.get("float32_momentum") for group in self.param_groups)
        self._has_float32_momentum = any(chosen)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._hook_step()
        super().__setstate__(state)
        self._look_at_groups()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, as torch's does."""
        super().add_param_group(param_group)
        self._look_at_groups()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of ours or of torch's.

        float32 buffers of groups with ``float32_momentum`` are loaded as they are, where torch
        rounds them to the parameters' dtype.
        """
        loaded: dict[str, Any] = {}
        asked: list[bool] = []

        def keep(_: Optimizer, state_dict: dict[str, Any]) -> None:
            loaded.update(state_dict)
            asked.extend(group.get("float32_momentum", False) for group in self.param_groups)

        def load_float32_buffers(_: Optimizer) -> None:
            groups = zip(self.param_groups, loaded["param_groups"], asked, strict=True)
            for group, saved_group, is_asked in groups:
                if is_asked:
                    group.setdefault("float32_momentum", True)
                self._load_float32_buffers(group, saved_group["params"], loaded["state"])
            self._look_at_groups()

        with (
            # The last before it, which sees what the others have made of the state dict.
            self.register_load_state_dict_pre_hook(keep),
            # The first after it: the others see, and may change, what is loaded.
            self.register_load_state_dict_post_hook(load_float32_buffers, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _load_float32_buffers(
        self, group: dict[str, Any], keys: list[int], state: dict[int, dict[str, Any]]
    ) -> None:
        if not group.get("float32_momentum"):
            return
        for param, key in zip(group["params"], keys, strict=True):
            entry = state.get(key)
            buffer = entry.get("momentum_buffer") if isinstance(entry, dict) else None
            if isinstance(buffer, Tensor) and param.dtype in _HALF:
                buffer = buffer.to(param.device, torch.float32)
                self.state[param]["momentum_buffer"] = buffer

    @classmethod
    def from_torch(cls, optimizer: torch.optim.SGD) -> SGD:
        """Takes over a live :class:`torch.optim.SGD` in the middle of its training.

        The optimizer stays the same object and becomes one of ours: schedulers, scalers and whoever
        else holds it go on with it, and so do its parameter groups, state and hooks.

        Args:
            optimizer: the optimizer, with or without state.

        Returns: ``optimizer``.
        Errors: ``TypeError`` where ``optimizer`` is not a :class:`torch.optim.SGD`, or one whose
        ``step`` is not PyTorch's (a subclass, or replaced).

        >>> import torch, fastnn
        >>> stock = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
        >>> optimizer = fastnn.optim.SGD.from_torch(stock)
        >>> optimizer is stock, type(stock)
        (True, <class 'fastnn.optim.SGD'>)
        """
        if isinstance(optimizer, cls):
            return optimizer
        if type(optimizer) is not torch.optim.SGD:
            raise TypeError(
                f"optimizer: expected a torch.optim.SGD, got {type(optimizer).__name__}"
            )
        step = vars(optimizer).get("step")
        if step is not None and not _torch.has_scheduler_mark(step):
            raise TypeError("optimizer: its step has been replaced; expected PyTorch's own")
        optimizer.__class__ = cls
        ours = cast(SGD, optimizer)
        ours._hook_step()
        ours._look_at_groups()
        if step is not None:
            vars(ours)["step"] = MethodType(_step_for_schedulers, ours)
        return ours

    @_with_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns: the closure's loss, or None without one.
        """
        if is_compiling():
            # torch's own loop over the parameters, which the compiler fuses; but not with buffers
            # of another dtype than the gradients', which torch neither makes nor always takes.
            if self._has_float32_momentum:
                return self._uncompiled_step(closure)
            return _torch_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    @_torch.disable_dynamo
    def _uncompiled_step(self, closure: Callable[[], Any] | None) -> Any:
        return SGD.step.__wrapped__(self, closure)  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters.

        Args:
            set_to_none: to None (default), or else to zero.
        """
        if extension is None or not set_to_none or is_compiling() or _torch.profiler_enabled():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            extension.clear_gradients(_params_of(group))

    def _step_group(self, group: dict[str, Any]) -> None:
        if group.get("float32_momentum"):
            self._has_float32_momentum = True  # set in the group since it was looked at
        params = _params_of(group)
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        fusable = extension is not None and self._is_fusable(group)
        # On a GPU the kernels find out whether to skip, so that nobody waits for it. The first step
        # differs from later ones if there is dampening: skipped, it has to leave no buffer behind.
        kernels_skip = False
        if found_inf is not None:
            kernels_skip = fusable and _is_on_gpu(found_inf) and not group["dampening"]
            if not kernels_skip and bool(found_inf):
                return
        if not fusable:
            self._step_as_torch(group, params, grad_scale)
            return
        state, fused = self.state, group["fused"]
        _ = group["foreach"]  # without effect, but torch's step asks for it, too
        scaling = {"grad_scale": grad_scale, "found_inf": found_inf if kernels_skip else None}
        # fused=True refuses what torch's fused implementation does, before anything is changed.
        rest = _step_fusable(group, params, state, scaling, all_or_nothing=fused)
        if rest and fused:
            _check_fused(rest)
            _step_fusable(group, params, state, scaling)
        if rest:
            rest = self._step_parts(group, rest, scaling)
        if rest and not (kernels_skip and bool(found_inf)):
            self._step_as_torch(group, rest, grad_scale)

    def _is_fusable(self, group: dict[str, Any]) -> bool:
        """Whether the operator can read the state, and no option wants autograd to see the step."""
        lr, weight_decay = group["lr"], group["weight_decay"]
        return not (
            type(self.state) is not defaultdict
            or self.defaults["differentiable"]
            or (isinstance(lr, Tensor) and lr.requires_grad)
            or (isinstance(weight_decay, Tensor) and weight_decay.requires_grad)
        )

    @torch.no_grad()
    def _step_parts(
        self, group: dict[str, Any], params: list[Tensor], scaling: dict[str, Tensor | None]
    ) -> list[Tensor]:
        """Steps this process's part of each DTensor; returns the rest. No element needs another."""
        rest: list[Tensor] = []
        whole: dict[Tensor, Tensor] = {}  # each part's DTensor
        state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        for param in params:
            grad, buffer = _grad_of(param), self.state.get(param, {}).get("momentum_buffer")
            others = [grad] if buffer is None else [grad, buffer]
            if grad.dtype != param.dtype or not are_spread_alike(param, *others):
                rest.append(param)
                continue
            part = local_part(param).detach()
            part.grad = local_part(grad)
            if buffer is not None:
                state[part]["momentum_buffer"] = local_part(buffer)
            whole[part] = param
        rest += [whole.pop(part) for part in _step_fusable(group, list(whole), state, scaling)]
        for part, param in whole.items():
            if part in state and self.state[param].get("momentum_buffer") is None:
                buffer = spread_like(param, state[part]["momentum_buffer"])
                self.state[param]["momentum_buffer"] = buffer
        increment_version(whole.values())
        return rest

    def _step_as_torch(
        self, group: dict[str, Any], params: list[Tensor], grad_scale: Tensor | None
    ) -> None:
        """Torch's own update, parameter by parameter; its fused one is wrong for odd layouts."""
        params = [param for param in params if param.grad is not None]
        grads = [_grad_of(param) for param in params]
        buffers: list[Tensor | None] = []
        if group["momentum"] != 0:
            buffers = [self.state[param].get("momentum_buffer") for param in params]
        are_new = [buffer is None for buffer in buffers]
        if group["fused"]:
            _check_fused(params)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            if grad_scale is not None:
                for grad in grads:
                    grad.div_(grad_scale)
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
                if (
                    buffer is not None
                    and is_new
                    and group.get("float32_momentum")
                    and param.dtype in _HALF
                ):
                    buffer = buffer.float()
                self.state[param]["momentum_buffer"] = buffer


def _params_of(group: dict[str, Any]) -> list[Tensor]:
    """The group's parameters, which may be any iterable; an iterator's are gone afterwards."""
    params = group["params"]
    return params if type(params) is list else list(params)


def _step_fusable(
    group: dict[str, Any],
    params: list[Tensor],
    state: dict[Tensor, dict[str, Tensor]],
    scaling: dict[str, Tensor | None],
    all_or_nothing: bool | None = False,
) -> list[Tensor]:
    """Steps what the operator takes and returns the rest; nothing where all or nothing asks."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and not _is_on_gpu(lr):
        lr = float(lr)
    return extension.sgd_step_group(
        params,
        state,
        group,
        lr=lr,
        float32_momentum=bool(group.get("float32_momentum")),
        all_or_nothing=bool(all_or_nothing),
        **scaling,
    )


@functools.wraps(SGD.step)
def _step_for_schedulers(optimizer: SGD, *args: Any, **kwargs: Any) -> Any:
    """The step of an optimizer that a scheduler watches: in place of its wrapper of torch's."""
    _torch.note_step_for_schedulers(optimizer)
    return type(optimizer).step(optimizer, *args, **kwargs)


_torch.add_scheduler_mark(_step_for_schedulers)
_torch.register_functional_sgd(SGD)


def _check_fused(params: list[Tensor]) -> None:
    """Raises for parameters that torch refuses with fused=True."""
    for param in params:
        _torch.check_param_for_fused(param)
        grad = _grad_of(param)
        if grad.is_sparse:
            raise RuntimeError("SGD(fused=True) does not support sparse gradients")
        if grad.dtype != param.dtype:
            raise RuntimeError(
                f"SGD(fused=True): expected scalar type {param.dtype} for the gradient, as for its "
                f"parameter, but found {grad.dtype}"
            )
        if any(_is_lazy(tensor) for tensor in (param, grad)):
            raise RuntimeError(
                "SGD(fused=True) does not support lazily negated, conjugated or zero tensors"
            )


def _is_lazy(tensor: Tensor) -> bool:
    return tensor.is_neg() or tensor.is_conj() or _torch.is_zero_tensor(tensor)


def _grad_of(param: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    return cast(Tensor, param.grad)


def _is_on_gpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_cuda
