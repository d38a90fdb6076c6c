"""benchmarks.memory and benchmarks.resident: how far a call raises the memory in use."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
import torch

from benchmarks import memory, resident, worker
from benchmarks.case import Contender, Unavailable
from benchmarks.cases import all_cases, cross_entropy
from benchmarks.device import CPU, Device
from benchmarks.timing import Summary, summarise
from support.benchmark_fakes import FakeGpu

pytestmark = pytest.mark.cpu_only("the benchmarks")


def test_peak_memory_of_a_gpu_is_what_a_call_adds():
    gpu = FakeGpu()
    assert gpu.device().peak_growth(gpu.call) == 70
    assert gpu.log == ["synchronise", "call", "synchronise"]


def test_peak_memory_of_a_gpu_needs_no_process(monkeypatch):
    monkeypatch.delattr(subprocess, "run")
    gpu = FakeGpu()
    device = gpu.device()
    device.name = "cpu"  # the tensors' device
    case = next(case for case in all_cases() if case.key == "nll_loss 64 x 10 float32 forward")
    assert memory.peak_memory(case, "fastnn", device).samples == memory.CALLS
    broken = replace(case, contenders=lambda: [Contender("fastnn")])
    with pytest.raises(Unavailable, match="NotImplementedError"):
        memory.peak_memory(broken, "fastnn", device)


@pytest.mark.parametrize("name", ["peer", "fastnn"])
def test_memory_mode_goes_on_without_a_peer_that_refuses(name: str, monkeypatch):
    def peak_memory(case, contender: str, device: Device) -> Summary:
        if contender == name:
            raise Unavailable("not installed")
        return summarise([1.0])

    monkeypatch.setattr(memory, "peak_memory", peak_memory)
    outcome = worker.Outcome([Contender("fastnn"), Contender("peer")])
    if name == "fastnn":
        with pytest.raises(RuntimeError, match="fastnn: not installed"):
            worker._memory(None, outcome, CPU)
        return
    assert list(worker._memory(None, outcome, CPU)) == ["fastnn"]
    assert outcome.skipped == {"peer": "not installed"}
    assert [one.name for one in outcome.contenders] == ["fastnn"]


def test_memory_of_a_peer_that_overwrites_its_input_is_not_compared(monkeypatch):
    monkeypatch.setattr(memory, "peak_memory", lambda *_: summarise([1.0]))
    peer = cross_entropy.Destructive("peer", lambda logits: logits)
    outcome = worker.Outcome([Contender("fastnn"), peer])
    assert list(worker._memory(None, outcome, CPU)) == ["fastnn"]
    assert outcome.skipped == {"peer": "its gradient overwrites the input and takes no memory"}


def test_memory_process_reports_a_refusal(monkeypatch):
    said = subprocess.CompletedProcess([], 0, stdout='noise\n"not installed"\n')
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: said)
    case = next(case for case in all_cases() if case.mode == "memory")
    with pytest.raises(Unavailable, match="not installed"):
        memory.peak_memory(case, "Liger", CPU)


@pytest.mark.skipif(not resident.supported(), reason="the system does not reset a process's peak")
def test_peak_memory_sees_what_a_call_allocates():
    growth = CPU.peak_growth(lambda: torch.ones(8 * 2**20))
    assert growth == pytest.approx(32 * 2**20, rel=0.1)
