"""benchmarks.once: one call of each case, for a profiler."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import once
from benchmarks.case import Contender, Function
from benchmarks.cases import all_cases
from benchmarks.device import CPU, CUDA
from support.benchmark_fakes import NLL_KEYS, raiser

pytestmark = pytest.mark.cpu_only("the benchmarks")


def test_a_profiler_sees_one_call_of_each_case():
    calls: list[str] = []
    case = next(case for case in all_cases() if case.key == NLL_KEYS[0])
    ours = Function("fastnn", lambda *args: calls.append("call"))
    once.once(replace(case, contenders=lambda: [ours, Contender("peer")]), CPU)
    assert calls == ["call"] * 2
    assert set(once.KEYS) <= {case.key for case in all_cases(CUDA)}
    for case in all_cases(CUDA):
        assert case.contenders()[0].name == "fastnn"


@pytest.mark.parametrize(("fails", "code"), [(False, 0), (True, 1)])
def test_once_goes_on_after_a_case_that_fails(fails: bool, code: int, monkeypatch, capsys):
    monkeypatch.setattr(once, "KEYS", NLL_KEYS)
    if fails:
        monkeypatch.setattr(once, "once", raiser(RuntimeError("no kernel")))
    assert once.main(["--device", "cpu"]) == code
    said = capsys.readouterr()
    assert (said.err if fails else said.out).splitlines() == [
        key + (": no kernel" if fails else "") for key in NLL_KEYS
    ]
