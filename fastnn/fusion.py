"""Model surgery: ``fuse`` puts our layers and losses into a model, ``unfuse`` takes them out.

A module is changed by its class alone, ``Linear`` to ``LinearReLU``: it stays the same object, with
the same parameters, hooks and mode, wherever else the program holds it. The ReLU behind it makes
room for a :class:`fastnn.nn.FusedReLU`, so that indices and ``state_dict`` keys stay.

A pair is found by its *sites*: the places at which a Linear is run, each with the *slot* that is
run next. It is fused only if all sites of the Linear lead to a ReLU's slot and nothing else leads
there.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fastnn import _torch, _tracing, nn

__all__ = ["FusionEntry", "FusionReport", "fuse", "fusion_report", "unfuse"]

_LOSSES = {
    torch.nn.LogSoftmax: nn.LogSoftmax,
    torch.nn.NLLLoss: nn.NLLLoss,
    torch.nn.CrossEntropyLoss: nn.CrossEntropyLoss,
}
_STOCK = {ours: stock for stock, ours in _LOSSES.items()} | {nn.LinearReLU: torch.nn.Linear}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Methods that run a Linear and then a ReLU: module and class, method, the two attributes.
_KNOWN_CALLERS = (
    ("torch.nn", "TransformerEncoderLayer", _torch.FEED_FORWARD, "linear1", "activation"),
    ("torch.nn", "TransformerDecoderLayer", _torch.FEED_FORWARD, "linear1", "activation"),
    ("timm.layers", "Mlp", "forward", "fc1", "act"),
    ("transformers.models.t5.modeling_t5", "T5DenseActDense", "forward", "wi", "act"),
    ("transformers.models.opt.modeling_opt", "OPTDecoderLayer", "forward", "fc1", "activation_fn"),
)

_IN_PARTS = "its Sequential is run in parts"

FUSED, FUSIBLE, LEFT = "fused", "can be fused", "left"


# ---- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FusionEntry:
    """What became of one module.

    Args:
        path: where it is in the model, as in ``named_modules``.
        module: its class.
        state: ``"fused"``, ``"can be fused"`` or ``"left"``.
        reason: why it is left; empty otherwise (default).

    >>> import torch, fastnn
    >>> fastnn.fusion_report(torch.nn.NLLLoss()).entries[0]
    FusionEntry(path='', module='NLLLoss', state='can be fused', reason='')
    """

    path: str
    module: str
    state: str
    reason: str = ""


@dataclass(frozen=True)
class FusionReport:
    """All Linear layers, losses and log-softmaxes of a model; prints as a table.

    Args:
        entries: a :class:`fastnn.fusion.FusionEntry` for each, in the order of ``named_modules``.

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
        """The modules that :func:`fuse` would put on our operators."""
        return self._of(FUSIBLE)

    @property
    def left(self) -> tuple[FusionEntry, ...]:
        """The modules that stay as they are, each with its reason."""
        return self._of(LEFT)

    def _of(self, state: str) -> tuple[FusionEntry, ...]:
        return tuple(entry for entry in self.entries if entry.state == state)

    def __str__(self) -> str:
        rows = [("module", "path", "state", "reason")]
        rows += [(e.module, e.path or "(the model)", e.state, e.reason) for e in self.entries]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        counts = ((len(self._of(state)), state) for state in (FUSED, FUSIBLE, LEFT))
        summary = ", ".join(f"{count} {state}" for count, state in counts if count)
        return "\n".join([*lines, summary or "nothing that fastnn has an operator for"])


# ---- the public functions ------------------------------------------------------------------------


def fuse(
    model: torch.nn.Module, *, inplace: bool = False, trace: bool = False, verbose: bool = False
) -> torch.nn.Module:
    r"""Puts a model's Linear-ReLU pairs, losses and log-softmaxes on fastnn's operators.

    The parameters and buffers stay the same objects, so that an optimizer built before goes on
    working, and the ``state_dict`` keeps its keys. Pairs are found among the neighbours of
    ``Sequential`` modules, nested ones too, and in ``TransformerEncoderLayer``,
    ``TransformerDecoderLayer``, timm's ``Mlp`` and the T5 and OPT of transformers. A pair is left
    as it is where fusing it could change what the program does: hooks that see what lies between,
    parametrizations, subclasses, a layer that is also used elsewhere. Applied twice, it changes
    nothing more.

    What can't be seen: that code other than its owner's forward runs the parts of a ``Sequential``
    one by one, as in ``model.head[0](x)``, or a layer outside of its module's forward; there it
    finds the ReLU already applied. Hooks that are registered later see the same. :func:`unfuse` a
    model before exchanging its layers; where a fused one has been exchanged for a ``Linear``,
    ``fuse`` mends the pair.

    Args:
        model: any module; a loss by itself too.
        inplace: change ``model`` itself. By default (``False``) it stays as it is and a copy of its
            modules is returned, over the same parameters and buffers.
        trace: look into the ``forward`` methods with :mod:`torch.fx` too, for pairs such as
            ``F.relu(self.fc(x))`` (default ``False``). The ``forward`` of a module with such a pair
            is then replaced by its trace. Traced are only methods of which a trace keeps all: of
            calls of modules and of torch's functions on tensors, loops over modules, parameters and
            buffers. Branches, contexts, decorators, optional arguments and the module's other
            attributes leave a method as it is. While tracing, no other thread may run a model.
        verbose: print the :class:`FusionReport` (default ``False``).

    Returns: the fused model.
    Errors: ``TypeError`` where ``model`` is not a module, or can't be copied.

    >>> import torch, fastnn
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> fastnn.fuse(model)
    Sequential(
      (0): LinearReLU(in_features=8, out_features=4, bias=True)
      (1): FusedReLU()
      (2): Linear(in_features=4, out_features=3, bias=True)
    )
    """
    _check_module(model)
    if not inplace:
        model = _copy_of_modules(model)
    plan = _Plan(model, trace)
    plan.apply()
    if verbose:
        print(fusion_report(model, trace=trace))
    return model


def fusion_report(model: torch.nn.Module, *, trace: bool = False) -> FusionReport:
    r"""Lists what is fused in a model, what can be, and what is left for which reason.

    Args:
        model: any module, fused or not; it is not changed.
        trace: as for :func:`fuse` (default ``False``).

    Returns: a :class:`FusionReport`.
    Errors: ``TypeError`` where ``model`` is not a module.

    >>> import torch, fastnn
    >>> from torch import nn
    >>> print(fastnn.fusion_report(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))))
    module  path  state         reason
    Linear  0     can be fused
    Linear  2     left          nothing follows it in its Sequential
    1 can be fused, 1 left
    """
    _check_module(model)
    return FusionReport(tuple(_Plan(model, trace).entries()))


def unfuse(model: torch.nn.Module, *, inplace: bool = False) -> torch.nn.Module:
    r"""Gives back a model of PyTorch's own modules, for those who don't have fastnn.

    What :func:`fuse` changed becomes what it was. A ``LinearReLU`` that was written as such, or
    whose ReLU was outside of ``model``, becomes ``Sequential(Linear, ReLU)``; the keys of its
    parameters then gain a ``0.``.

    Args:
        model: any module.
        inplace: as for :func:`fuse` (default ``False``).

    Returns: the model without modules of fastnn; over the same parameters and buffers.
    Errors: ``TypeError`` where ``model`` is not a module, or can't be copied.

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
    if not inplace:
        model = _copy_of_modules(model)
    have_relu = _Plan(model, trace=False).linears_with_fused_relu()
    pairs = {
        linear: torch.nn.Sequential(linear, torch.nn.ReLU())
        for linear in model.modules()
        if type(linear) is nn.LinearReLU and linear not in have_relu
    }
    for module in list(model.modules()):
        _tracing.restore(module)
        for name, child in list(_torch.submodules(module).items()):
            if type(child) is nn.FusedReLU:
                _put_back(module, name, child)
    for parent in list(model.modules()):
        for name, child in _torch.submodules(parent).items():
            if child in pairs:
                _torch.submodules(parent)[name] = pairs[child]
    root = pairs.get(model, model)
    for module in list(root.modules()):
        module.__class__ = _STOCK.get(type(module), type(module))
    return root


# ---- copying and checking ------------------------------------------------------------------------


def _check_module(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _copy_of_modules(model: torch.nn.Module) -> torch.nn.Module:
    """Another tree of modules over the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        raise TypeError(f"model: can't be copied ({error}); pass inplace=True") from error


# ---- slots: what is run after a Linear -----------------------------------------------------------


@dataclass(frozen=True)
class _Attribute:
    """A slot that an attribute of a module holds."""

    owner: torch.nn.Module
    name: str

    def why_no_relu(self) -> str:
        """The reason why this is no ReLU that can be left out; empty where it is one."""
        content = getattr(self.owner, self.name)
        # A FusedReLU behind a Linear: the layer that had its ReLU has been exchanged since.
        if content in _tracing.RELU_FUNCTIONS or type(content) is nn.FusedReLU:
            return ""
        if type(content) is not torch.nn.ReLU:
            return f"followed by {_name_of(content)}, not by ReLU"
        observed = not _tracing.is_plain_relu(content)
        return "hooks on the ReLU behind it, or a forward of its own" if observed else ""

    def leave_out(self) -> None:
        """Puts a FusedReLU in the place of the ReLU."""
        content = getattr(self.owner, self.name)
        if type(content) is not nn.FusedReLU:  # as it is behind an exchanged layer
            setattr(self.owner, self.name, nn.FusedReLU(content))


@dataclass(frozen=True)
class _Call:
    """A slot that is a ReLU's call in a module's forward."""

    owner: torch.nn.Module
    node: str

    def why_no_relu(self) -> str:
        return ""


def _put_back(owner: torch.nn.Module, name: str, fused: nn.FusedReLU) -> None:
    if isinstance(fused.replaced, torch.nn.Module):
        _torch.submodules(owner)[name] = fused.replaced.train(fused.training)
    else:
        delattr(owner, name)
        setattr(owner, name, fused.replaced)


def _name_of(content: object) -> str:
    return getattr(content, "__name__", None) or type(content).__name__


# ---- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Site:
    """A place at which a Linear is run: its path, and the slot after it or why there is none."""

    path: str
    after: _Attribute | _Call | str

    # Whether a rewritten forward runs it, which has left the ReLU out.
    is_rewritten: bool = False

    def why_no_relu(self) -> str:
        return self.after if isinstance(self.after, str) else self.after.why_no_relu()

    def has_fused_relu(self) -> bool:
        if isinstance(self.after, _Attribute):
            return type(getattr(self.after.owner, self.after.name)) is nn.FusedReLU
        return self.is_rewritten


class _Plan:
    """What can be fused in a model, and why the rest can't."""

    def __init__(self, model: torch.nn.Module, trace: bool) -> None:
        self._model = model
        self._trace = trace
        self._sites: dict[torch.nn.Module, list[_Site]] = {}
        self._runs: Counter[_Attribute | _Call] = Counter()
        self._traced_calls: dict[str, list[_Call | str]] = {}
        self._ancestors: set[torch.nn.Module] = set()
        self._run_in_parts: set[torch.nn.Module] = set()
        self._visit(model, "", "nothing follows it")
        self._pairs = self._find_pairs()

    def apply(self) -> None:
        for linear in self._pairs:
            linear.__class__ = nn.LinearReLU
        slots = {site.after for linear in self._pairs for site in self._sites[linear]}
        for slot in slots:
            if isinstance(slot, _Attribute):
                slot.leave_out()
        # Once for all the calls in it.
        for owner in {slot.owner for slot in slots if isinstance(slot, _Call)}:
            _tracing.rewrite(owner)
        for module in self._model.modules():
            if type(module) in _LOSSES and not _tracing.is_patched(module):
                module.__class__ = _LOSSES[type(module)]

    def entries(self) -> Iterator[FusionEntry]:
        for path, module in self._model.named_modules():
            if module in self._sites:
                yield _entry(path, module, nn.LinearReLU, self._why_left(module))
            else:
                stock = next((stock for stock in _LOSSES if isinstance(module, stock)), None)
                if stock is not None:
                    yield _entry(path, module, _LOSSES[stock], _why_own_forward(module, stock))

    def linears_with_fused_relu(self) -> set[torch.nn.Module]:
        """The layers that have taken over a ReLU of this model, wherever they are run."""
        return {
            linear
            for linear, sites in self._sites.items()
            if all(site.has_fused_relu() for site in sites)
        }

    # ---- finding the sites ----

    def _visit(
        self,
        module: torch.nn.Module,
        path: str,
        after: _Attribute | str,
        parent: torch.nn.Module | None = None,
    ) -> None:
        """Notes the sites under a module, behind which ``after`` is run."""
        if isinstance(module, torch.nn.Linear):
            afters = self._traced_calls.get(path, [after])
            if isinstance(parent, torch.nn.Sequential) and path in self._traced_calls:
                afters = [_IN_PARTS]
            rewritten = any(map(_tracing.is_rewritten, self._ancestors))
            sites = self._sites.setdefault(module, [])
            sites.extend(_Site(path, after, rewritten) for after in afters)
        elif module not in self._ancestors:
            self._ancestors.add(module)
            afters = self._afters(module, path, after)
            for name, child in _torch.submodules(module).items():
                if child is not None:
                    self._runs[_Attribute(module, name)] += 1
                    self._note_parts(module, name, child)
                    self._visit(child, f"{path}.{name}" if path else name, afters(name), module)
            self._ancestors.remove(module)

    def _note_parts(self, module: torch.nn.Module, name: str, child: torch.nn.Module) -> None:
        """Notes a Sequential whose modules its owner runs one by one."""
        is_owner = not (_is_sequential(module) or _is_container(module))
        if is_owner and _is_sequential(child) and _tracing.runs_in_parts(module, name):
            self._run_in_parts.add(child)

    def _afters(
        self, module: torch.nn.Module, path: str, after: _Attribute | str
    ) -> Callable[[str], _Attribute | str]:
        """What is run after each child of a module."""
        if module in self._run_in_parts:
            return lambda name: _IN_PARTS
        if _is_sequential(module):
            follower = _followers(module, after)
            return lambda name: follower[name]
        if _is_container(module):
            return lambda name: after
        for linear, activation in _known_pairs(module):
            slot = _Attribute(module, activation)
            if activation not in _torch.submodules(module):
                self._runs[slot] += 1
            rest = f"run by {type(module).__name__}, which applies no ReLU to it"
            return lambda name: slot if name == linear else rest
        rest = self._trace_calls(module, path)
        return lambda name: rest

    def _trace_calls(self, module: torch.nn.Module, path: str) -> str:
        """Notes the calls that a trace of the module finds; returns why a Linear has none."""
        forward = f"{type(module).__name__}.forward"
        if not self._trace:
            return f"run by {forward}, into which trace=True looks"
        try:
            calls = _tracing.relu_calls(module)
        except _tracing.Untraceable as error:
            return f"run by {forward}, which {error}"
        prefix = f"{path}." if path else ""
        for target, relu in calls:
            after = (
                _Call(module, relu) if relu else f"{forward} applies no ReLU alone to its output"
            )
            self._traced_calls.setdefault(prefix + target, []).append(after)
            self._runs[after] += 1
        return f"not called by {forward}"

    # ---- choosing ----

    def _find_pairs(self) -> set[torch.nn.Module]:
        pairs = {linear for linear in self._sites if not self._why_unfit(linear)}
        while True:
            # A slot that something else leads to as well is out, with all that leads to it.
            led_to = Counter(site.after for linear in pairs for site in self._sites[linear])
            out = {
                linear
                for linear in pairs
                if any(led_to[site.after] != self._runs[site.after] for site in self._sites[linear])
            }
            if not out:
                return pairs
            pairs -= out

    def _why_unfit(self, linear: torch.nn.Module) -> str:
        sites = self._sites[linear]
        reason = _why_unfit_module(linear)
        for site in () if reason else sites:
            reason = site.why_no_relu()
            if reason:
                return reason if len(sites) == 1 else f"shared; at {site.path}: {reason}"
        return reason

    def _why_left(self, linear: torch.nn.Module) -> str:
        if linear in self._pairs:
            return ""
        return self._why_unfit(linear) or "the ReLU behind it also follows something else"


def _entry(path: str, module: torch.nn.Module, ours: type, reason: str) -> FusionEntry:
    if type(module) is ours:
        return FusionEntry(path, type(module).__name__, FUSED)
    return FusionEntry(path, type(module).__name__, LEFT if reason else FUSIBLE, reason)


def _followers(
    sequential: torch.nn.Sequential, after: _Attribute | str
) -> dict[str, _Attribute | str]:
    """The slot that is run after each child of a Sequential."""
    names = list(_torch.submodules(sequential))
    if not isinstance(after, _Attribute):
        after = "nothing follows it in its Sequential"
    elif not _is_transparent(sequential):
        after = "hooks on its Sequential see its output"
    return {
        name: _first_slot(sequential, names[index + 1 :]) or after
        for index, name in enumerate(names)
    }


def _first_slot(sequential: torch.nn.Sequential, names: list[str]) -> _Attribute | None:
    """The slot that is run first of some children, inside of nested Sequentials too."""
    for name in names:
        child = _torch.submodules(sequential)[name]
        if not (_is_sequential(child) and _is_transparent(child)):
            return _Attribute(sequential, name)
        slot = _first_slot(child, list(_torch.submodules(child)))
        if slot is not None:
            return slot
    return None


def _is_sequential(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Sequential) and _runs_as(
        module, torch.nn.Sequential, "forward", "__iter__", "__call__"
    )


def _is_container(module: torch.nn.Module) -> bool:
    """Whether a module only holds others, which its owner runs."""
    return any(
        isinstance(module, kind) and _runs_as(module, kind, "forward", "__call__")
        for kind in (torch.nn.ModuleList, torch.nn.ModuleDict)
    )


def _runs_as(module: torch.nn.Module, kind: type, *methods: str) -> bool:
    """Whether these methods of a module are those of the class it descends from."""
    return all(
        getattr(type(module), method) is getattr(kind, method) and method not in vars(module)
        for method in methods
    )


def _is_transparent(module: torch.nn.Module) -> bool:
    """Whether nobody sees what goes in and out of a module."""
    return not _tracing.is_observed(module, inputs=True)


def _known_pairs(module: torch.nn.Module) -> Iterator[tuple[str, str]]:
    for package, name, method, linear, activation in _KNOWN_CALLERS:
        known = getattr(sys.modules.get(package), name, None)
        if known is None or not isinstance(module, known) or not hasattr(known, method):
            continue
        if _runs_as(module, known, "forward", "__call__", method):
            yield linear, activation


def _why_own_forward(module: torch.nn.Module, stock: type) -> str:
    """Why a module may compute something else than its stock class; empty where it can't."""
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "parametrized"
    if type(module) is not stock:
        return f"a subclass of {stock.__name__}, whose forward may be its own"
    return "its forward has been replaced" if _tracing.is_patched(module) else ""


def _why_unfit_module(linear: torch.nn.Module) -> str:
    reason = _why_own_forward(linear, torch.nn.Linear)
    if not reason and _tracing.is_observed(linear, inputs=False):
        return "hooks on it"
    if not reason and linear.weight.dtype not in _DTYPES:
        return f"its weight is {linear.weight.dtype}"
    return reason
