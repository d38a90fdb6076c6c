"""Searches for programs in which fastnn differs from torch, and shrinks those that it finds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from . import losses, modules, optimizers
from .compare import Difference, difference
from .program import Program

KINDS: dict[str, Callable[[], SearchStrategy[Program]]] = {
    "modules": modules.programs,
    "optimizers": optimizers.programs,
    "losses": losses.programs,
}


@dataclass
class Search:
    """A search among the programs of one kind.

    Args:
        kind: a key of ``KINDS``.
        before: called with each program before it runs.
        runs: how many have run.
        found: the smallest program for each difference.
    """

    kind: str
    before: Callable[[Program], object] = lambda program: None
    runs: int = 0
    found: dict[Difference, Program] = field(default_factory=dict)

    def look(self, seed: int, examples: int) -> dict[Difference, Program]:
        """Runs programs drawn from a seed. Returns the first new difference, shrunk."""
        sought: list[Difference] = []
        smallest: list[Program] = []

        @hypothesis.seed(seed)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        @given(KINDS[self.kind]())
        def agree(program: Program) -> None:
            self.runs += 1
            self.before(program)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                here = difference(program)
            if here is None or here in self.found or here not in (sought or [here]):
                return
            sought[:], smallest[:] = [here], [program]
            raise Differs

        try:
            agree()
        except (Differs, Flaky):
            self.found[sought[0]] = smallest[0]
        return dict(zip(sought, smallest, strict=True))


class Differs(Exception):
    """Two sides of a program differ; hypothesis then looks for a smaller one."""
