"""benchmarks.gpu_timing: kernels behind a sleep, loops and replays, on a fake GPU."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest

from benchmarks import gpu_timing
from benchmarks.device import CPU, Device
from support.benchmark_fakes import FakeGpu

pytestmark = pytest.mark.cpu_only("the benchmarks")


def test_time_calls_makes_all_calls_and_synchronises():
    log: list[str] = []
    device = Device()
    device.synchronize = lambda: log.append("synchronise")
    assert device.time_calls(lambda: log.append("call"), 3) > 0
    assert log == ["synchronise", "call", "call", "call", "synchronise"]


def test_kernels_are_timed_by_events_behind_a_sleep_after_the_l2_is_read():
    gpu = FakeGpu()
    timer = gpu.device().timer()
    timer(gpu.call, 1)  # calibrates the sleep
    gpu.log.clear()
    seconds = timer(gpu.call, 3)
    one = ["flush", "event", "sleep", "event", "call", "event", "synchronise"]
    assert gpu.log == one * 3
    assert seconds == pytest.approx(3 * FakeGpu.CALL * 1e-3)  # without flushes and sleeps
    assert gpu.buffer_size == 4 * FakeGpu.L2
    assert gpu.sleeps[-1] == pytest.approx(1)  # milliseconds
    assert not timer.waits


def test_the_sleep_becomes_as_long_as_the_queueing_of_a_call_takes(monkeypatch):
    gpu = FakeGpu()
    clock = fake_host_clock(monkeypatch)

    def slow_to_queue() -> None:
        clock.now += 3e-3
        gpu.call()

    timer = gpu.device().timer()
    assert timer(slow_to_queue, 2) == pytest.approx(2 * FakeGpu.CALL * 1e-3)
    assert gpu.sleeps[-3:] == pytest.approx([1, 4, 4])
    assert not timer.waits


def test_a_call_that_waits_for_the_gpu_is_timed_behind_the_shortest_sleep(monkeypatch):
    gpu = FakeGpu()
    clock = fake_host_clock(monkeypatch)

    def waits_for_the_gpu() -> None:
        clock.now += gpu.sleeps[-1] * 1e-3
        gpu.call()

    timer = gpu.device().timer()
    assert timer(waits_for_the_gpu, 2) == pytest.approx(2 * FakeGpu.CALL * 1e-3)
    assert timer.waits
    assert gpu.sleeps[-5:] == pytest.approx([1, 4, 16, 1, 1])


def fake_host_clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(gpu_timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_a_gpu_has_a_loops_time_and_a_replays():
    gpu = FakeGpu()
    times = gpu.device().more_times(lambda: gpu.call, SimpleNamespace(waits=False))
    assert set(times) == {"loop", "replay", "waits"}
    assert 0 < times["loop"] < 1 and 0 < times["replay"] < 1
    begin = gpu.log.index("capture begins")
    assert gpu.log[begin - 5 : begin] == [*["call"] * 3, "synchronise", "empty cache"]
    assert gpu.log[begin : begin + 3] == ["capture begins", "call", "capture ends"]
    assert gpu.log.count("replay") > gpu.log[begin:].count("call") == 1
    assert CPU.more_times(lambda: None, None) == {}


@pytest.mark.parametrize("ends", [True, False])
def test_a_call_that_can_not_be_captured_says_why(ends: bool):
    gpu = FakeGpu()
    gpu.capture_fails = not ends

    def refuses_capture() -> None:
        if "capture begins" in gpu.log:
            raise RuntimeError("not while capturing\nand more")

    times = gpu.device().more_times(lambda: refuses_capture, SimpleNamespace(waits=False))
    assert times["no_replay"] == "not while capturing" and "replay" not in times
    assert gpu.log[-1] == "capture ends" and gc.isenabled()


def test_a_call_that_waits_is_not_captured():
    gpu = FakeGpu()
    times = gpu.device().more_times(lambda: gpu.call, SimpleNamespace(waits=True))
    assert times["waits"] and times["no_replay"] == "it waits for the GPU"
    assert "capture begins" not in gpu.log


def test_a_contender_that_fails_in_its_loop_has_no_loop_and_says_why():
    def fails() -> None:
        raise MemoryError("no memory left")

    times = FakeGpu().device().more_times(lambda: fails, SimpleNamespace(waits=False))
    assert times == {"waits": False, "no_replay": "no memory left"}
