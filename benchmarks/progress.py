"""A progress bar: tqdm's if it is installed, otherwise a simple counter."""

from __future__ import annotations

import sys
from typing import Protocol


class Bar(Protocol):
    """The part of tqdm's interface that is used."""

    def update(self, n: int = 1) -> object: ...

    def set_description_str(self, desc: str) -> object: ...

    def close(self) -> object: ...


class Counter:
    """Rewrites one line: the number of finished measurements and the current one."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.shown = total, 0, sys.stderr.isatty()

    def update(self, n: int = 1) -> None:
        self.done += n

    def set_description_str(self, desc: str) -> None:
        if self.shown:
            print(f"\r\033[K{self.done}/{self.total} {desc}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.shown:
            print(file=sys.stderr)


def progress_bar(total: int) -> Bar:
    """A bar over ``total`` measurements, shown if stderr is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return Counter(total)
    return tqdm(total=total, unit="case", disable=None, dynamic_ncols=True)
