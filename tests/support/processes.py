"""Runs functions in their own processes; a crash or hang fails with what the processes printed."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

# Bounds a hang, in seconds; it is no speed requirement.
TIMEOUT = 120
# Additional time to start and, after a hang, to report each thread's stack.
GRACE = 60

# Forked from a server that has only imported torch: as fresh as a spawned process, but faster.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    [
        "torch",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
    ]
)


def run(
    folder: Path,
    count: int,
    function: Callable[..., Any],
    *arguments: Any,
    method: str = "forkserver",
    timeout: float = TIMEOUT,
) -> list[Any]:
    """The results of ``function(number, *arguments)`` in each of ``count`` processes.

    Function and arguments are pickled (unless ``method`` is ``"fork"``), and results are saved in
    the folder, so they must be tensors, numbers, strings, or lists or dicts of them.
    """
    __tracebackhide__ = True
    context = multiprocessing.get_context(method)
    folders = [folder / f"process{number}" for number in range(count)]
    children = []
    for number, own in enumerate(folders):
        own.mkdir()
        _output(own).touch()  # another process may end before this one has started
        target = (function, number, arguments, own, timeout)
        children.append(context.Process(target=_child, args=target, daemon=True))
        children[-1].start()
    try:
        _wait_for(children, timeout + GRACE)
    finally:
        for child in children:
            child.kill()
            child.join()
    assert all(child.exitcode == 0 for child in children), "\n".join(
        f"--- process {number} ended with {child.exitcode}; it printed:\n{_output(own).read_text()}"
        for number, (child, own) in enumerate(zip(children, folders, strict=True))
    )
    return [torch.load(_result(own)) for own in folders]


def run_ranks(folder: Path, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Does the same, with the processes as ranks of a gloo process group."""
    __tracebackhide__ = True
    return run(folder, count, _rank, folder / "rendezvous", count, function, arguments)


def _wait_for(children: list[BaseProcess], timeout: float) -> None:
    """Waits until all are done, one has failed (others may wait for it), or time is up."""
    deadline = time.monotonic() + timeout
    running = list(children)
    while running and all(child.exitcode in (None, 0) for child in children):
        if not wait([child.sentinel for child in running], deadline - time.monotonic()):
            return
        running = [child for child in running if child.is_alive()]


def _output(folder: Path) -> Path:
    return folder / "output.txt"


def _result(folder: Path) -> Path:
    return folder / "result.pt"


def _child(
    function: Callable[..., Any],
    number: int,
    arguments: tuple[Any, ...],
    folder: Path,
    timeout: float,
) -> None:
    with _output(folder).open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    # In a forked process pytest has replaced them.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    faulthandler.dump_traceback_later(timeout, exit=True)
    torch.save(function(number, *arguments), _result(folder))
    faulthandler.cancel_dump_traceback_later()


def _rank(
    rank: int,
    rendezvous: Path,
    count: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    torch.set_num_threads(1)  # the ranks share the processors
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",  # used only by this test, unlike a port
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=TIMEOUT),
    )
    try:
        return function(rank, *arguments)
    finally:
        dist.destroy_process_group()
