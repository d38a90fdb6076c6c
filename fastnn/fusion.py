"""``fuse`` makes a model's containers run Linear and ReLU as one operator; ``unfuse`` undoes it.

The layers are not touched: parameters, keys, hooks and modules stay the stock model's. What a fused
container does is in :mod:`fastnn._containers`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch.nn import Linear, Module, ModuleDict, ModuleList, ReLU, Sequential

from fastnn import _containers, _torch, nn
from fastnn._operators import OPERATORS

__all__ = ["FusionEntry", "FusionReport", "fuse", "fusion_report", "unfuse"]

_OURS: dict[type[Module], type[Module]] = {
    operator.stock_module: getattr(nn, operator.module)
    for operator in OPERATORS
    if operator.stock_module is not None
}
_OUR_LINEARS = (nn.Linear, nn.LinearReLU)
_STOCK = {ours: stock for stock, ours in _OURS.items()} | dict.fromkeys(_OUR_LINEARS, Linear)
_STOCK[nn.MLP] = Sequential

_Model = TypeVar("_Model", bound=Module)

FUSED, FUSIBLE, LEFT = "fused", "can be fused", "left"


@dataclass(frozen=True)
class FusionEntry:
    """What happens to one module when its model is called.

    Args:
        path: its place in the model, as in ``named_modules``.
        module: its class.
        state: ``"fused"``, ``"can be fused"`` or ``"left"``.
        reason: why it is left; empty otherwise (default).
        container: the path of the module that runs it; None (default) for losses and
            log-softmaxes, which run by themselves.

    >>> import torch, fastnn
    >>> fastnn.fusion_report(torch.nn.NLLLoss()).entries[0]
    FusionEntry(path='', module='NLLLoss', state='can be fused', reason='', container=None)
    """

    path: str
    module: str
    state: str
    reason: str = ""
    container: str | None = None


@dataclass(frozen=True)
class FusionReport:
    """The Linear layers, losses and log-softmaxes of a model; printed as a table.

    Args:
        entries: a :class:`fastnn.fusion.FusionEntry` for each, in the order of ``named_modules``,
            with losses and log-softmaxes last.

    >>> import torch, fastnn
    >>> report = fastnn.fusion_report(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))
    >>> len(report.fusible), len(report.left)
    (1, 0)
    """

    entries: tuple[FusionEntry, ...]

    @property
    def fused(self) -> tuple[FusionEntry, ...]:
        """The modules that run our operators."""
        return self._of(FUSED)

    @property
    def fusible(self) -> tuple[FusionEntry, ...]:
        """The modules that :func:`fuse` would make run our operators."""
        return self._of(FUSIBLE)

    @property
    def left(self) -> tuple[FusionEntry, ...]:
        """The modules that run as in PyTorch, each with its reason."""
        return self._of(LEFT)

    def _of(self, state: str) -> tuple[FusionEntry, ...]:
        return tuple(entry for entry in self.entries if entry.state == state)

    def __str__(self) -> str:
        rows = [("module", "path", "run by", "state", "reason")]
        for entry in self.entries:
            path, container = (
                "(the model)" if place == "" else place or ""
                for place in (entry.path, entry.container)
            )
            rows.append((entry.module, path, container, entry.state, entry.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        counts = ((len(self._of(state)), state) for state in (FUSED, FUSIBLE, LEFT))
        summary = ", ".join(f"{count} {state}" for count, state in counts if count)
        return "\n".join([*lines, summary or "nothing that fastnn has an operator for"])


# ---- the public functions ------------------------------------------------------------------------


def fuse(
    model: _Model, *, inplace: bool = False, trace: bool = False, verbose: bool = False
) -> _Model:
    r"""Makes a model's Linear layers, losses and log-softmaxes run fastnn's operators.

    A ``Sequential``, nested ones included, then runs each of its ``Linear`` layers through our
    operator: together with the ``ReLU`` after it, and several in a row as one ``mlp``. So does a
    container that runs a ``Linear`` and then a ``ReLU``: ``TransformerEncoderLayer``,
    ``TransformerDecoderLayer``, timm's ``Mlp``, and the feed-forward blocks of transformers' BERT
    and T5. The layers stay PyTorch's, with their parameters, hooks and names; a layer that is
    called directly computes what it always did. The container checks its layers at each call and
    runs them one by one if a hook observes a value in between, or if a layer is not a plain
    ``Linear`` or ``ReLU`` (parametrized, quantized, replaced, compiled or a subclass). Calling
    ``fuse`` twice changes nothing more.

    For calls in a forward of your own, such as ``F.relu(self.fc(x))``, use
    ``torch.compile(model, backend="fastnn")``.

    Args:
        model: any module; a loss by itself, too.
        inplace: change ``model`` itself. By default (``False``) it is left alone, and a copy of its
            modules over the same parameters and buffers is returned.
        trace: removed in favour of ``torch.compile(model, backend="fastnn")``.
        verbose: print the :class:`FusionReport` (default ``False``).

    Returns:
        The fused model.

    Raises:
        TypeError: ``model`` is not a module or can't be copied, or ``trace`` is true.

    >>> import torch, fastnn
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> fastnn.fuse(model)
    FusedSequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=3, bias=True)
    )
    """
    if trace:
        raise TypeError(
            'fuse: trace=True has been removed; use torch.compile(model, backend="fastnn"), which '
            "sees what the forward methods call"
        )
    model = _to_change(model, inplace)
    for module in list(model.modules()):
        if not _containers.is_fused(module) and _containers.can_be_fused(module):
            module.__class__ = _containers.fused_class(type(module))
        elif type(module) in _OURS and not _torch.has_own_forward(module):
            module.__class__ = _OURS[type(module)]
    if verbose:
        print(fusion_report(model))
    return model


def fusion_report(model: Module) -> FusionReport:
    r"""Lists what runs fused in a model, what could, and what runs as in PyTorch, with the reason.

    Args:
        model: any module, fused or not; it is not changed. Hooks, parametrizations and replaced
            layers count as they are now.

    Returns:
        A :class:`FusionReport`.

    Raises:
        TypeError: ``model`` is not a module.

    >>> import torch, fastnn
    >>> from torch import nn
    >>> print(fastnn.fusion_report(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))))
    module  path  run by       state         reason
    Linear  0     (the model)  can be fused
    Linear  2     (the model)  can be fused
    2 can be fused
    """
    _check_module(model)
    return FusionReport((*_linear_entries(model), *_loss_entries(model)))


def unfuse(model: Module, *, inplace: bool = False) -> Module:
    r"""Turns a model back into PyTorch's own modules, for a reader without fastnn.

    What :func:`fuse` changed becomes what it was. A ``LinearReLU`` becomes
    ``Sequential(Linear, ReLU)``, so the keys of its parameters gain a ``0.``.

    Args:
        model: any module.
        inplace: as for :func:`fuse` (default ``False``).

    Returns:
        The model without fastnn's modules, over the same parameters and buffers.

    Raises:
        TypeError: ``model`` is not a module, or can't be copied.
        ValueError: a ``LinearCrossEntropyLoss`` has options that PyTorch's lacks.

    >>> import torch, fastnn
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    >>> fastnn.unfuse(fastnn.fuse(model))
    Sequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
      (1): ReLU()
    )
    """
    _check_module(model)
    _check_options(model)
    model = _to_change(model, inplace)
    modules = list(model.modules())
    pairs: dict[Module, Module] = {
        one: Sequential(one, ReLU()) for one in modules if isinstance(one, nn.LinearReLU)
    }
    for module in modules:
        children = _torch.submodules(module)
        for name, child in list(children.items()):
            if child in pairs:
                children[name] = pairs[child]
        module.__class__ = _without_ours(type(module))
    return pairs.get(model, model)


def _to_change(model: _Model, inplace: bool) -> _Model:
    """The model itself, or a copy of its modules over the same parameters and buffers."""
    _check_module(model)
    if inplace:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    tensors = list(shared.values())
    try:
        copied = copy.deepcopy(model, shared)
    except Exception as error:
        raise TypeError(f"model: can't be copied ({error}); pass inplace=True") from error
    # A module with its own copy method, such as a scripted one, may have made new parameters.
    if list(map(id, (*copied.parameters(), *copied.buffers()))) != list(map(id, tensors)):
        raise TypeError("model: a copy would not share its parameters; pass inplace=True")
    return copied


def _check_module(model: object) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _check_options(model: Module) -> None:
    """Raises for fastnn's own loss options, since PyTorch's loss would compute something else."""
    for path, module in model.named_modules():
        if isinstance(module, nn.LinearCrossEntropyLoss):
            added = module.added_options()
            if added:
                raise ValueError(
                    f"model: PyTorch's LinearCrossEntropyLoss has no {' or '.join(added)}, which "
                    f"{path or 'it'} has set"
                )


def _without_ours(kind: type) -> type:
    """A class without ours among its bases; torch's parametrize derives classes from ours."""
    stock = kind.__bases__[1] if _containers.Fused in kind.__bases__ else _STOCK.get(kind, kind)
    bases = tuple(map(_without_ours, stock.__bases__))
    if bases == stock.__bases__:
        return stock
    namespace = {k: v for k, v in vars(stock).items() if k not in ("__dict__", "__weakref__")}
    return type(stock)(stock.__name__.replace("LinearReLU", "Linear"), bases, namespace)


# ---- the report's entries ------------------------------------------------------------------------


def _linear_entries(model: Module) -> Iterator[FusionEntry]:
    seen: set[str] = set()
    for path, module in model.named_modules():
        state = FUSED if _containers.is_fused(module) else FUSIBLE
        entries = [
            _entry(_join(path, name), linear, state, why or _containers.why_all_apart(), path)
            for name, linear, why in _containers.linears_run_by(module)
        ]
        if isinstance(module, Linear) and not _is_of_loss(model, path):
            entries = [_entry(path, module, FUSED, _why_alone(model, path))]
        # An outer Sequential has already reported the Linears of inner ones.
        yield from (entry for entry in entries if entry.path not in seen)
        seen.update(entry.path for entry in entries)


def _is_of_loss(model: Module, path: str) -> bool:
    """Whether a Linear belongs to a LinearCrossEntropyLoss, which has its own entry."""
    owner = model.get_submodule(path.rpartition(".")[0])
    return isinstance(owner, nn._LinearCrossEntropyLoss) and path.endswith("linear")


def _entry(
    path: str, module: Module, state: str, reason: str, container: str | None = None
) -> FusionEntry:
    if type(module) in _OUR_LINEARS:
        state, reason = FUSED, ""
    return FusionEntry(path, type(module).__name__, LEFT if reason else state, reason, container)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _why_alone(model: Module, path: str) -> str:
    """Why a Linear that no container runs is left."""
    while path:
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        if not isinstance(owner, (ModuleList, ModuleDict)):
            name = type(owner).__name__
            return f'run by {name}.forward, which torch.compile(model, backend="fastnn") looks into'
    return "nothing follows it"


def _loss_entries(model: Module) -> Iterator[FusionEntry]:
    for path, module in model.named_modules():
        stock = next((stock for stock in _OURS if isinstance(module, stock)), None)
        if stock is not None:
            reason = ""
            if type(module) not in (stock, _OURS[stock]):
                reason = f"a subclass of {stock.__name__}, whose forward may be its own"
            elif _torch.has_own_forward(module):
                reason = "its forward has been replaced"
            yield _entry(path, module, FUSIBLE if type(module) is stock else FUSED, reason)
