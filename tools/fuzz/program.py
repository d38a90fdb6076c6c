"""A program that uses fastnn, as a text that runs here and is printed if it fails."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

from support import sample_inputs, stock

from . import parts

# A program gets those whose last word it contains.
IMPORTS = """\
import copy
import pickle
from collections import OrderedDict
from itertools import zip_longest
from typing import Any
import torch
import torch.nn.functional as F
from torch import nn
from torch import Tensor
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
import fastnn
"""

FOOTER = """
if __name__ == "__main__":
    for theirs, mine in zip_longest(stock, ours):
        print(" torch:", *(theirs or ["nothing"]))
        print("fastnn:", *(mine or ["nothing"]))
"""

_FILES = (parts, stock, sample_inputs)
_HELPERS = {
    name: inspect.getsource(value)
    for file in _FILES
    for name, value in vars(file).items()
    if callable(value) and getattr(value, "__module__", None) == file.__name__
}


@dataclass(frozen=True)
class Program:
    """``program(see, ...)``, and for each side the arguments that make it torch's or ours.

    Args:
        body: the source that defines it.
        sides: the arguments after ``see``, by side; ``stock``, ``ours`` and perhaps others.
    """

    body: str
    sides: dict[str, str]

    @cached_property
    def source(self) -> str:
        """The whole program, with the helpers that it needs."""
        runs = "\n".join(
            f"{side} = Seen()\nwith {side}:\n    program({side}, {arguments})"
            for side, arguments in self.sides.items()
        )
        main = f"{self.body}\n\n\n{runs}\n{FOOTER}"
        text = "\n\n".join([*_helpers_of(main), main])
        imports = [line for line in IMPORTS.splitlines() if line.split()[-1] in words_of(text)]
        return "\n".join(["from __future__ import annotations", *imports, "\n", text])

    def run(self) -> dict[str, parts.Seen]:
        """What each side observes."""
        module = ModuleType("fuzzed")
        sys.modules["fuzzed"] = module  # where pickle looks for the program's classes
        exec(compile(self.source, "<fuzzed>", "exec"), vars(module))
        return {side: vars(module)[side] for side in self.sides}


def _helpers_of(text: str) -> list[str]:
    """The sources of the helpers that the text names, directly or not, in file order."""
    needed: set[str] = set()
    while found := (words_of(text) & _HELPERS.keys()) - needed:
        needed |= found
        text = "\n".join(_HELPERS[name] for name in found)
    return [source for name, source in _HELPERS.items() if name in needed]


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def indented(*lines: str, by: int = 1) -> str:
    return "\n".join("    " * by + line for text in lines for line in text.splitlines())


def attempt(*lines: str) -> str:
    """Statements whose error is observed."""
    return f"with see:\n{indented(*lines)}"
