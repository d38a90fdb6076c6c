"""benchmarks.warm: compiles in advance what the cases will need."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import warm
from benchmarks.case import Function
from benchmarks.cases import all_cases
from benchmarks.device import CPU, CUDA
from support.benchmark_fakes import NLL_KEYS, raiser

pytestmark = pytest.mark.cpu_only("the benchmarks")


def test_warming_deals_the_cases_that_compile_to_processes(monkeypatch):
    started: list[list[str]] = []
    killed: list[int] = []

    class Process:
        def __init__(self, command: list[str], cwd: Path, env: dict[str, str]) -> None:
            started.append(command[command.index("cuda") + 1 :])
            self.number = len(started)
            assert env["TORCHINDUCTOR_COMPILE_THREADS"] == "1"

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None and self.number == 2:
                raise subprocess.TimeoutExpired("", timeout)
            return 0

        def kill(self) -> None:
            killed.append(self.number)

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    keys = [case.key for case in all_cases(CUDA)]
    assert warm.warm(CUDA, keys, 10.0) == 1  # the second one took longer
    assert warm.warm(CUDA, keys, None) == 0
    assert killed == [1, 2, 3, 4, 5, 6]
    dealt = [key for part in started[:3] for key in part]
    assert len(dealt) == len(set(dealt)) > 40
    assert not [key for key in dealt if key.startswith(("nll_loss", "linear_relu products"))]
    assert max(map(len, started)) - min(map(len, started)) <= 1


def test_warming_goes_on_after_a_contender_that_fails():
    log: list[str] = []
    (case,) = (case for case in all_cases() if case.key == NLL_KEYS[0])
    contenders = [
        Function("fastnn", raiser(AssertionError())),
        Function("first", raiser(MemoryError("no memory left")), jit=True),
        Function("second", lambda *args: log.append("second"), compiled=True),
    ]
    case = replace(case, contenders=lambda: contenders)
    assert warm.warm_case(case, CPU) == ["first: no memory left"]
    assert log == ["second"]
    assert warm.warm_case(replace(case, compiles=False), CPU) == ["first: no memory left"]
    assert log == ["second"]
