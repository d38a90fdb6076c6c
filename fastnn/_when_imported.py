"""Runs a function once a module is imported that is too slow for fastnn to import itself.

Two of PyTorch's tables need it, because PyTorch calls nothing of ours before it reads them: that of
the FLOP counter, whose module imports triton if PyTorch is built with CUDA (0.16 s), and that of
DDP's functional optimizers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Calls ``action`` with a module: now if it is imported already, otherwise once it is.

    Args:
        name: the module's full name.
        action: called once, after the module's own code has run.
    """
    module = sys.modules.get(name)
    if module is None:
        sys.meta_path.insert(0, _Finder(name, action))
    else:
        action(module)


class _Finder(MetaPathFinder):
    """Finds one module through the other finders, and runs the action after its code."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        spec = self._found_behind(path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            # Only now: a search may not lead to an import, and a failed import may be retried.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec

    def _found_behind(
        self, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        """What the finders after this one find; those before it have found nothing."""
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        # Before Python 3.12 a finder may lack the method.
        finders = (finder for finder in behind if hasattr(finder, "find_spec"))
        found = (finder.find_spec(self.name, path, target) for finder in finders)
        return next((spec for spec in found if spec is not None), None)
