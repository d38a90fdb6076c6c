"""Compares what a program's sides saw: the first difference that isn't intended."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from .expected import is_expected
from .program import Program

# Units in the last place, of a number or of 1. A program rounds a few dozen times, in float64
# hundreds of times, and larger numbers than it shows. Models of other dtypes hold integers.
ROUNDINGS = {torch.float64: 1e6, torch.float32: 64, torch.bfloat16: 16, torch.float16: 16}


@dataclass(frozen=True)
class Difference:
    """Where two sides differ.

    Args:
        name: what was observed.
        what: how it differs.
    """

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def difference(program: Program) -> Difference | None:
    """Runs the program; the first difference between torch and fastnn that is not expected."""
    seen = {side: list(leaves(observed)) for side, observed in program.run().items()}
    stock, exact = seen["stock"], seen.get("exact", [])
    if [name for name, _ in exact] != [name for name, _ in stock]:
        exact = stock  # there is none, or float64 raises elsewhere
    first = next(differences(stock, seen["ours"], exact), None)
    return None if first is None or is_expected(program, str(first)) else first


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The names and values of the numbers, tensors and errors that were seen."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):  # an order that no program relies on
            yield from leaves(value[key], f"{name}[{key!r}]")
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part, f"{name}[]")
    elif isinstance(value, tuple):  # a name, and what was seen by that name
        yield from leaves(value[1], value[0])
    else:
        yield name, value


def differences(stock: list, ours: list, exact: list) -> Iterator[Difference]:
    for theirs, mine, right in zip_longest(stock, ours, exact, fillvalue=("the end", None)):
        if theirs[0] != mine[0]:
            yield Difference(theirs[0], f"{words(mine)}, not {words(theirs)}")
        elif what := unlike(theirs[1], mine[1], right[1]):
            yield Difference(theirs[0], what)


def unlike(theirs: Any, mine: Any, exact: Any) -> str | None:
    """How ours differs from torch's; None if it doesn't."""
    if type(theirs) is not type(mine):
        return f"{words(('', mine))}, not {words(('', theirs))}"
    if isinstance(theirs, Exception):
        return "INTERNAL ASSERT" if "INTERNAL ASSERT" in str(mine) != str(theirs) else None
    if not isinstance(theirs, Tensor):
        return None if theirs == mine or theirs != theirs else f"{mine}, not {theirs}"
    for attribute in ("dtype", "shape", "layout"):
        if getattr(theirs, attribute) != getattr(mine, attribute):
            return f"{attribute} {getattr(mine, attribute)}, not {getattr(theirs, attribute)}"
    theirs, mine, exact = map(dense, (theirs, mine, exact))
    good = are_close(mine, theirs) | are_close(mine, exact)
    return None if good.all() else "values"


def words(seen: tuple[str, Any]) -> str:
    """A name or an error, without the numbers that differ from program to program."""
    name, value = seen
    if not isinstance(value, Exception):
        return name or type(value).__name__
    return f"{type(value).__name__} '{re.sub('[0-9]+', 'N', str(value))[:60]}'"


def dense(values: Tensor) -> Tensor:
    values = values.to_dense() if values.is_sparse else values
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def are_close(mine: Tensor, right: Tensor) -> Tensor:
    if not mine.is_floating_point():
        return mine == right
    unit = ROUNDINGS[mine.dtype] * torch.finfo(mine.dtype).eps
    mine, right = mine.double(), right.double()
    near = (mine - right).abs() <= unit * (1 + right.abs())
    return (mine == right) | (mine.isnan() & right.isnan()) | (near & right.isfinite())
