"""Every private name of PyTorch that fastnn uses, and its replacement in a PyTorch without it.

Private names come and go between releases, so they are used here and nowhere else; a test checks
that.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from importlib import import_module
from os.path import dirname
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
from torch.compiler import is_compiling

from fastnn._when_imported import when_imported


def _find(name: str, otherwise: Any) -> Any:
    """Imports a private name, or returns ``otherwise`` in a PyTorch without it."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError):
        return otherwise


# ---- functions -----------------------------------------------------------------------------------

# None unless torch.jit.trace is active; the public function is several times slower.
tracing_state = _find(
    "torch._C._get_tracing_state", otherwise=lambda: torch.jit.is_tracing() or None
)

# Without it the optimizer always runs torch's path: slower, but right under a profiler.
profiler_enabled = _find("torch._C._autograd._profiler_enabled", otherwise=lambda: True)

# The public one imports the compiler at decoration, this one when the function is called.
disable_dynamo = _find("torch._compile._disable_dynamo", otherwise=torch.compiler.disable)

# Without it the dimension is the same, but no warning says that an implicit one is deprecated.
softmax_dim = _find(
    "torch.nn.functional._get_softmax_dim",
    otherwise=lambda name, ndim, stacklevel: 0 if ndim in (0, 1, 3) else 1,
)

# Without it a loss module converts the two deprecated arguments.
legacy_reduction = _find(
    "torch.nn._reduction.legacy_get_string",
    otherwise=lambda size_average, reduce: torch.nn.L1Loss(size_average, reduce).reduction,
)

# Without it fused=True accepts parameters of any device or dtype, and steps them as torch's loop.
check_param_for_fused = _find(
    "torch.optim.optimizer._device_dtype_check_for_fused", otherwise=lambda param: None
)

# Re-enables __torch_function__ where a class has disabled it. Without it, a class that knows
# F.linear and runs unknown functions with it disabled rejects ours, as it rejects others.
enable_torch_function = _find("torch._C._EnableTorchFunction", otherwise=nullcontext)

# The active transform of torch.func, or None. Without it the reference rejects batched targets.
running_transform = _find("torch._C._functorch.peek_interpreter_stack", otherwise=lambda: None)


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on; True if unknown."""
    return getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


# ---- tensors -------------------------------------------------------------------------------------


class _NoTensor:
    """Stands for a missing tensor class: no tensor is an instance."""


# Tensor classes of tracers. Without them, graphs contain torch's operators.
TRACING_CLASSES = (
    _find("torch._subclasses.fake_tensor.FakeTensor", otherwise=_NoTensor),
    _find("torch._subclasses.functional_tensor.FunctionalTensor", otherwise=_NoTensor),
)


def is_zero_tensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is autograd's zero tensor without memory; False if unknown."""
    try:
        return tensor._is_zerotensor()
    except AttributeError:
        return False


def has_tensor_hooks(tensor: torch.Tensor) -> bool:
    """Whether a leaf has hooks that the backward calls; True if unknown."""
    try:
        return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)
    except AttributeError:
        return True


# ---- optimizers ----------------------------------------------------------------------------------

_global_pre_hooks = _find("torch.optim.optimizer._global_optimizer_pre_hooks", otherwise=True)
_global_post_hooks = _find("torch.optim.optimizer._global_optimizer_post_hooks", otherwise=True)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step has hooks; True if unknown."""
    try:
        return bool(
            optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or _global_pre_hooks
            or _global_post_hooks
        )
    except AttributeError:
        return True


def is_step_observed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step has hooks or a profiler is on; True if unknown."""
    # The compiler can't trace profiler_enabled().
    return has_step_hooks(optimizer) or (not is_compiling() and profiler_enabled())


# A scheduler replaces its optimizer's step with a wrapper that has the mark and sets the note, by
# which the scheduler knows that a step came first. In a PyTorch without the mark, SGD.from_torch
# rejects an optimizer with a scheduler; without the note, nothing reads it.
_STEP_MARK = "_wrapped_by_lr_sched"
_STEP_NOTE = "_opt_called"


def has_scheduler_mark(step: Any) -> bool:
    """Whether a step is a scheduler's wrapper."""
    return hasattr(step, _STEP_MARK)


def add_scheduler_mark(step: Any) -> None:
    setattr(step, _STEP_MARK, True)


def note_step_for_schedulers(optimizer: torch.optim.Optimizer) -> None:
    setattr(optimizer, _STEP_NOTE, True)


# Maps optimizer classes to functional ones that step single parameters for DDP. In a PyTorch
# without it, DDP's fused optimizer can't be ours.
_FUNCTIONAL_OPTIMIZERS = "torch.distributed.optim.utils"


def register_functional_sgd(optimizer: type[torch.optim.SGD]) -> None:
    """Registers torch's functional SGD for this optimizer class."""

    def add(module: ModuleType) -> None:
        table = getattr(module, "functional_optim_map", {})
        if torch.optim.SGD in table:
            table[optimizer] = table[torch.optim.SGD]

    when_imported(_FUNCTIONAL_OPTIMIZERS, add)


# ---- modules -------------------------------------------------------------------------------------

# The method of torch's Transformer layers that runs a Linear and then a ReLU. In a PyTorch without
# it, these layers are not fused.
FEED_FORWARD = "_ff_block"


def submodules(module: torch.nn.Module) -> dict[str, torch.nn.Module | None]:
    """A module's children, None and duplicates included; writing to the dict replaces them.

    It has no public replacement: without it ``fuse`` raises ``AttributeError``.
    """
    return module._modules


def parameters(module: torch.nn.Module) -> dict[str, Any]:
    """A module's own parameters, at a quarter of the cost of reading an attribute.

    Includes plain tensors put in their place, and None.
    """
    return module._parameters


def buffers(module: torch.nn.Module) -> dict[str, Any]:
    """A module's own buffers; writing to the dict replaces them."""
    return module._buffers


def call_methods(kind: type[torch.nn.Module]) -> tuple[Any, ...]:
    """The methods that run between a module's call and its ``forward``."""
    return kind.__call__, kind._call_impl


def is_its_own(function: Any) -> bool:
    """Whether a function of PyTorch is PyTorch's own, not a replacement."""
    code = getattr(function, "__code__", None)
    if code is None:
        return isinstance(function, BuiltinFunctionType)
    return str(code.co_filename).startswith(dirname(torch.__file__))


_has_function_mode = _find("torch._C._is_torch_function_mode_enabled", otherwise=lambda: True)
_function_modes = _find("torch.overrides._get_current_function_mode_stack", otherwise=list)
_count_dispatch_modes = _find("torch._C._len_torch_dispatch_stack", otherwise=lambda: 1)


def has_modes() -> bool:
    """Whether a function or dispatch mode is active; True if unknown. The mode of
    ``torch.set_default_device`` doesn't count: it only affects factory functions."""
    if _count_dispatch_modes():
        return True
    if not _has_function_mode():
        return False
    modes = _function_modes()
    return not modes or any(type(mode).__name__ != "DeviceContext" for mode in modes)


def copy_with_own_children(module: torch.nn.Module) -> torch.nn.Module:
    """A shallow copy whose children can be replaced without affecting the module."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def is_observed(module: torch.nn.Module) -> bool:
    """Whether calling the module does more than its class's ``forward``: hooks, a ``forward`` of
    its own, a compiled call; True if unknown."""
    own = vars(module)
    try:
        return bool(
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or own.get("_compiled_call_impl")
            or "_call_impl" in own
            or "forward" in own
        )
    except KeyError:
        return True


def has_own_forward(module: torch.nn.Module) -> bool:
    """Whether an instance attribute overrides the class's ``forward``."""
    return "forward" in vars(module)


# Whether hooks on all modules are registered. Without it, Linear and ReLU run one by one.
has_global_hooks = _find("torch.nn.modules.module._has_any_global_hook", otherwise=lambda: True)
