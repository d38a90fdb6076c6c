"""benchmarks.worker: measures cases at one thread count, whatever a case or a peer does."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
import torch

from benchmarks import worker
from benchmarks.case import Function
from benchmarks.cases import all_cases
from benchmarks.device import CPU, Cuda, Device
from benchmarks.timing import Plan
from support.benchmark_fakes import NLL_KEYS, PLAN, FakeEvent, FakeGpu, raiser

pytestmark = pytest.mark.cpu_only("the benchmarks")


def test_worker_measures_on_the_device_of_the_request(monkeypatch):
    gpu = FakeGpu()
    device = gpu.device()
    device.name = "cpu"  # the tensors' device; the clock is the fake's
    device.gemm_sizes = dict.fromkeys(device.gemm_sizes, (8,))
    device.available_bytes = lambda: float("inf")
    assert device.interruptions() == 0
    device.interruptions = partial(next, count())  # one per sample of three calls
    monkeypatch.setattr(worker, "DEVICES", {"cuda": device})
    device.copy_bytes, device.tf32_gemm_sizes = (1024,), (8,)
    # Calls and copies take no time on the fake; its clock only shows that it was used.
    monkeypatch.setattr(FakeEvent, "elapsed_time", lambda start, end: FakeGpu.CALL)
    key = "nll_loss 64 x 10 float32 forward"
    events: list[dict] = []
    plan = replace(Cuda.full_plan, min_rounds=3)
    worker.run(
        worker.Request([key], torch.get_num_threads(), False, plan, 0.01, "cuda"), events.append
    )
    assert [event["event"] for event in events] == ["limits", "start", "result", "limits"]
    assert events[0]["limits"]["copy"]["1024"] == pytest.approx(1024 / (FakeGpu.CALL * 1e-3))
    contenders = events[2]["result"]["contenders"]
    assert contenders["fastnn"]["median"] == pytest.approx(FakeGpu.CALL * 1e-3)
    assert contenders["fastnn"]["interruptions"] == pytest.approx(1 / (FakeGpu.CALL * 1e-3))
    assert contenders["fastnn"]["samples"] == 3
    assert contenders["F.nll_loss"].keys() >= {"loop", "replay"}
    assert set(events[0]["limits"]["gemm"]) == {"float32", "bfloat16", "tf32"}
    assert events[0]["limits"]["launch"]["kernels"] > 0
    assert gpu.log.count("flush") > 10


def worker_reports(device: Device, monkeypatch) -> list[dict]:
    """What a worker reports about two cases on a device."""
    monkeypatch.setattr(worker, "DEVICES", {"cpu": device})
    events: list[dict] = []
    threads = torch.get_num_threads()
    plan = Plan(seconds=1e-3, sample_seconds=1e-4, min_rounds=2)
    with suppress(SystemError):  # raised by a broken device
        worker.run(worker.Request(NLL_KEYS, threads, False, plan, 0.0, "cpu"), events.append)
    return events


def test_worker_ends_where_a_case_leaves_the_device_broken(monkeypatch):
    device = Device()
    assert [event["event"] for event in worker_reports(device, monkeypatch)] == [
        "limits",
        *["start", "result"] * 2,
    ]
    device.check_health = raiser(SystemError("an illegal address"))
    assert len(worker_reports(device, monkeypatch)) == 3
    gpu = FakeGpu()
    gpu.device().check_health()
    assert gpu.log == ["synchronise", "empty cache"]


def test_worker_goes_on_without_limits_that_can_not_be_measured(monkeypatch):
    monkeypatch.setattr(worker, "measure_limits", raiser(MemoryError()))
    assert worker._limits(worker.Request([], 1, False, PLAN, 0.1, "cpu"), CPU) is None


@pytest.mark.parametrize("when", ["bound", "called"])
def test_worker_goes_on_without_a_peer_that_fails_after_its_check(when: str, monkeypatch):
    calls = count()

    def fails_later(log_probs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if when == "called" and next(calls) > 1:
            raise MemoryError("no memory left")
        return torch.nn.functional.nll_loss(log_probs, target)

    peer = Function("peer", fails_later)
    if when == "bound":
        monkeypatch.setattr(peer, "sampler", raiser(MemoryError("no memory left")))
    (case,) = (case for case in all_cases() if case.key == NLL_KEYS[0])
    ours = case.contenders()[0]
    case = replace(case, contenders=lambda: [ours, peer])
    monkeypatch.setattr(worker, "all_cases", lambda device: [case])
    event = worker_reports(Device(), monkeypatch)[-1]
    assert event["result"]["skipped"] == {"peer": "no memory left"}
    assert list(event["result"]["contenders"]) == ["fastnn"]
    assert event["elapsed"] > 0
