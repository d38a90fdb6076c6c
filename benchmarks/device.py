"""Where the cases run: what the runner must know about a device to time work on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _nothing() -> None:
    """A CPU operator has finished when it returns."""


@dataclass(frozen=True)
class Device:
    """A torch device's name, and what waits until its queued work is done."""

    name: str
    synchronize: Callable[[], None]


CPU = Device("cpu", _nothing)
