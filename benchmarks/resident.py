"""How far a call raises this process's resident memory above the level before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def supported() -> bool:
    """Whether the system reports a process's peak memory and can reset it, as Linux does."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def peak_growth(call: Callable[[], object]) -> int:
    """The growth of this process's peak during a call, in bytes."""
    gc.collect()
    _return_free_memory()
    before = _status("VmRSS")
    CLEAR_REFS.write_text("5")  # resets the peak to the current value
    call()
    return max(0, _status("VmHWM") - before)


def _return_free_memory() -> None:
    """Returns the allocator's free blocks to the system, or the next call would reuse them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {name}")
