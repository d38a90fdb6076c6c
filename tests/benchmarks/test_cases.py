"""The benchmarks' own arithmetic and command line. What they measure is no test's business."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from repository import REPOSITORY

sys.path.insert(0, str(REPOSITORY))  # the benchmarks are not installed with the package

import fastnn
from benchmarks import __main__ as cli
from benchmarks import case as case_module
from benchmarks import (
    gpu_timing,
    limits,
    memory,
    once,
    plots,
    report,
    resident,
    results,
    run,
    table,
    verify,
    warm,
    worker,
)
from benchmarks.case import Contender, Function, Inputs, Unavailable, Work
from benchmarks.cases import (
    all_cases,
    cross_entropy,
    linear_relu,
    mlp,
    overhead,
    sgd,
)
from benchmarks.cases.classifiers import logits_and_targets
from benchmarks.device import CPU, CUDA, Cuda, Device
from benchmarks.timing import Plan, Summary, measure, summarise
from fastnn import _extension

pytestmark = pytest.mark.cpu_only("the benchmarks")

PLAN = Plan(seconds=0.1, sample_seconds=0.01, min_rounds=3)


class Fake:
    """A contender whose calls take a given time by its own clock, and a log of the samples."""

    def __init__(self, name: str, seconds: float, log: list[tuple[str, int, int]]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def sampler(self, draw: int):
        def sample(count: int) -> float:
            self.log.append((self.name, count, draw))
            return self.seconds * count

        return sample


def measure_fakes(times: dict[str, float], clock=lambda: 0.0, plan: Plan = PLAN):
    """Measures fakes; returns the summaries and the log of (name, count, number of the draw)."""
    log: list[tuple[str, int, int]] = []
    fakes = [Fake(name, seconds, log) for name, seconds in times.items()]
    draws = iter(range(10**6))

    def draw():
        number = next(draws)
        return {fake.name: fake.sampler(number) for fake in fakes}

    return measure(draw, plan, random.Random(0), clock), log


def make_result(times: dict[str, float], **changes) -> dict:
    contenders = {
        name: {
            "median": seconds,
            "low": seconds,
            "high": seconds,
            "least": seconds,
            "samples": 1,
            "interruptions": 0.0,
            "trainable": name != "inference",
            "same_algorithm": True,
        }
        for name, seconds in times.items()
    }
    result = {
        "op": "op",
        "label": "4 x 4",
        "dtype": "float32",
        "mode": "forward",
        "threads": 1,
        "unit": "seconds",
        "work": {"flops": 0.0, "bytes": 0.0},
        "contenders": contenders,
        "skipped": {},
    }
    return result | changes


LIMITS = {"gemm": {"float32": 1e9, "bfloat16": 2e9}, "copy": {"1000": 4e9, "8000": 1e9}}


def make_document(*documents_results: dict) -> dict:
    return {
        "schema": results.SCHEMA,
        "machine": {
            "cpu": "A Processor",
            "processors": "2",
            "os": "Some OS",
            "torch": "2.13.0",
            "fastnn": "0.1.0",
            "capability": "avx2",
            "capability of torch": "AVX2",
            "date": "2026-01-02",
        },
        "command": "python -m benchmarks --threads 1",
        "limits": {"1": LIMITS},
        "results": [results.complete(result, LIMITS) for result in documents_results],
    }


WON = make_result({"fastnn": 1e-3, "slow": 4e-3, "quick": 2e-3}, op="won")
LOST = make_result({"fastnn": 1e-3, "ahead": 0.5e-3}, op="lost")


# ---- timing --------------------------------------------------------------------------------------


def test_measure_reports_each_contenders_time_per_call():
    summaries, _ = measure_fakes({"a": 1e-3, "b": 3e-3})
    assert summaries["a"].median == pytest.approx(1e-3)
    assert summaries["b"].median == pytest.approx(3e-3)


def test_measure_takes_contenders_in_turn_in_changing_order():
    _, log = measure_fakes({"a": 1e-3, "b": 1e-3, "c": 1e-3}, plan=Plan(1.0, 0.01, 3))
    samples = [name for name, count, _ in log if count == 10]  # the others are warm-up
    samples = samples[len(samples) % 3 :]
    rounds = [tuple(samples[i : i + 3]) for i in range(0, len(samples), 3)]
    assert len(rounds) >= 50
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) == 6


def test_measure_draws_fresh_inputs_in_each_round_where_that_is_cheap():
    summaries, log = measure_fakes({"a": 1e-3})
    assert len({draw for *_, draw in log}) == summaries["a"].samples >= 10


def test_measure_keeps_its_inputs_where_drawing_takes_long():
    ticks = iter(range(10**6))
    _, log = measure_fakes({"a": 1e-3}, clock=lambda: float(next(ticks)))
    assert {draw for *_, draw in log} == {0}


def test_measure_takes_the_least_number_of_rounds_of_slow_calls():
    summaries, log = measure_fakes({"a": 60.0})
    assert summaries["a"].samples == PLAN.min_rounds
    assert len(log) == PLAN.min_rounds + 1  # and one call to warm up


def test_measure_warms_up_before_each_sample_of_quick_calls():
    _, log = measure_fakes({"a": 1e-3, "b": 1e-3})
    counts = [count for _, count, _ in log]
    assert counts[-8:] == [1, 10] * 4


def test_measure_counts_the_interruptions_of_each_contenders_samples():
    interrupted = iter(range(10**6))  # one more each time it is asked
    fakes = {"a": lambda count: 0.01, "b": lambda count: 0.02}
    summaries = measure(
        lambda: fakes, PLAN, random.Random(0), lambda: 0.0, lambda: next(interrupted)
    )
    assert summaries["a"].interruptions == pytest.approx(100)
    assert summaries["b"].interruptions == pytest.approx(50)


def test_summary_is_median_and_quartiles():
    summary = summarise([5.0, 1.0, 2.0, 3.0, 100.0])
    assert (summary.low, summary.median, summary.high) == (2.0, 3.0, 5.0)
    assert (summary.least, summary.samples) == (1.0, 5)
    assert summarise([4.0]) == Summary(4.0, 4.0, 4.0, 4.0, 1)


# ---- devices -------------------------------------------------------------------------------------


class FakeGpu:
    """Stands in for torch.cuda, with a clock of its own in milliseconds and a log."""

    FLUSH, CALL, L2 = 100.0, 3.0, 1000
    CYCLES_PER_MILLISECOND = 10**6

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now, self.allocated, self.peak = 0.0, 500, 9999
        self.buffer_size = 0
        self.sleeps: list[float] = []
        self.capture_fails = False

    def device(self) -> Cuda:
        return Cuda(self, self._make_buffer)

    def _make_buffer(self, size: int) -> SimpleNamespace:
        self.buffer_size = size
        return SimpleNamespace(sum=lambda: self.work("flush", self.FLUSH))

    def work(self, name: str, milliseconds: float) -> None:
        self.log.append(name)
        self.now += milliseconds

    def call(self) -> None:
        self.work("call", self.CALL)
        self.peak = max(self.peak, self.allocated + 70)

    def _sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles / self.CYCLES_PER_MILLISECOND)
        self.work("sleep", self.sleeps[-1])

    def Stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream: SimpleNamespace) -> nullcontext:
        return nullcontext()

    def CUDAGraph(self) -> SimpleNamespace:
        def end() -> None:
            self.log.append("capture ends")
            if self.capture_fails:
                raise RuntimeError("the capture was invalidated")

        return SimpleNamespace(
            capture_begin=lambda: self.log.append("capture begins"),
            capture_end=end,
            replay=lambda: self.work("replay", self.CALL),
        )

    def empty_cache(self) -> None:
        self.log.append("empty cache")

    def Event(self, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self) -> None:
        self.log.append("synchronise")

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=self.L2, total_memory=2**30, multi_processor_count=100)

    def get_device_name(self) -> str:
        return "A GPU"

    def get_device_capability(self) -> tuple[int, int]:
        return 9, 0

    def memory_allocated(self) -> int:
        return self.allocated

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.allocated

    def max_memory_allocated(self) -> int:
        return self.peak


class FakeEvent:
    """A moment of the fake's clock; as on a GPU it can't be read before a synchronisation."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.gpu.log.append("event")
        self.moment = self.gpu.now

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.gpu.log[-1] == "synchronise"
        return end.moment - self.moment


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


def test_peak_memory_of_a_gpu_is_what_a_call_adds():
    gpu = FakeGpu()
    assert gpu.device().peak_growth(gpu.call) == 70
    assert gpu.log == ["synchronise", "call", "synchronise"]


def test_peak_memory_of_a_gpu_needs_no_process(monkeypatch):
    monkeypatch.delattr(subprocess, "run")
    gpu = FakeGpu()
    device = gpu.device()
    device.name = "cpu"  # where the tensors are
    case = next(case for case in all_cases() if case.key == "nll_loss 64 x 10 float32 forward")
    assert memory.peak_memory(case, "fastnn", device).samples == memory.CALLS
    broken = replace(case, contenders=lambda: [Contender("fastnn")])
    with pytest.raises(Unavailable, match="NotImplementedError"):
        memory.peak_memory(broken, "fastnn", device)


def test_the_driver_is_named_where_nvidia_smi_tells_it(monkeypatch):
    def says(*command, **options) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 0, stdout="580.1\n580.1\n")

    monkeypatch.setattr(subprocess, "run", says)
    assert FakeGpu().device().facts()["gpu driver"] == "580.1"
    monkeypatch.setattr(subprocess, "run", raiser(FileNotFoundError("nvidia-smi")))
    assert FakeGpu().device().facts()["gpu driver"] == "unknown"


def raiser(error: Exception):
    def raises(*args, **options):
        raise error

    return raises


@pytest.mark.parametrize("make", [mlp._batch, overhead._row_and_target])
def test_inputs_are_drawn_where_the_generator_is(make, monkeypatch):
    generator = SimpleNamespace(device=torch.device("meta"))
    drawn: list[torch.device] = []

    def draw(*shape, generator, device) -> torch.Tensor:
        drawn.append(device)
        return torch.ones(2)

    monkeypatch.setattr(torch, "randn", draw)
    monkeypatch.setattr(torch, "randint", draw)
    make(generator)
    assert len(drawn) >= 2 and set(drawn) == {generator.device}
    assert CPU.generator(3).device.type == "cpu" and CPU.generator(3).initial_seed() == 3


def _meta_inputs(make) -> Inputs:
    def on_meta(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)

    return make(torch.Generator().manual_seed(0)).map(on_meta)


def test_what_contenders_make_themselves_lies_where_the_inputs_are():
    step = next(one for one in mlp._contenders("cross_entropy") if one.name == "torch")
    step.bind(_meta_inputs(mlp._batch))
    optimizer = next(one for one in sgd.step_contenders() if one.name == "SGD")
    shapes = [(2, 3), (4,)]
    optimizer.bind(_meta_inputs(partial(sgd.parameters_and_gradients, shapes=shapes)))
    layer = overhead.Backward("torch", *overhead._layers()["torch"])
    layer.bind(_meta_inputs(overhead._row))
    parameters = [*step.params, *optimizer.params, *layer.modules[0].parameters()]
    assert len(parameters) == 6 + 2 + 2
    assert {parameter.device.type for parameter in parameters} == {"meta"}
    assert overhead._reference_layer(torch.ones(1, 8, device="meta")).device.type == "meta"


def names_on(device: Device) -> set[str]:
    contenders = [one for case in all_cases(device) for one in case.contenders()]
    return {one.name for one in contenders if device.name in one.devices}


def test_peers_compete_on_their_own_devices():
    cpu, cuda = names_on(CPU), names_on(CUDA)
    assert {"mkldnn", "mkldnn packed", "jax.jit"} <= cpu - cuda
    assert cuda - cpu == {"Liger", "Apex", "Apex FusedSGD", "fastnn tiled", "fastnn library"}
    assert {"fastnn", "torch.compile", "SGD", "SGD foreach", "SGD fused"} <= cpu & cuda


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("liger_kernel", lambda: cross_entropy._liger(torch.ones(1, 2), torch.zeros(1).long())),
        ("apex", lambda: cross_entropy._apex(torch.ones(1, 2), torch.zeros(1).long())),
        ("apex", lambda: sgd._apex_sgd([torch.ones(2)])),
    ],
)
def test_a_peer_that_is_not_installed_is_unavailable(module: str, call, monkeypatch):
    for loaded in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    with pytest.raises(Unavailable, match=f"{module}.* is not installed"):
        call()


def test_a_destructive_peer_leaves_the_others_their_inputs():
    def overwriting(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = (logits * target).sum()
        logits.data.zero_()
        return loss

    inputs = Inputs((torch.ones(3, requires_grad=True), torch.full((3,), 2.0)))
    call = cross_entropy.Destructive("peer", overwriting).bind(inputs)
    loss, gradient = call()
    assert loss == 6 and torch.equal(gradient, inputs.args[1])
    assert torch.equal(inputs.args[0], torch.ones(3))


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


def test_worker_measures_on_the_device_of_the_request(monkeypatch):
    gpu = FakeGpu()
    device = gpu.device()
    device.name = "cpu"  # where the tensors are; the clock is the fake's
    device.gemm_sizes = dict.fromkeys(device.gemm_sizes, (8,))
    device.available_bytes = lambda: float("inf")
    assert device.interruptions() == 0
    device.interruptions = partial(next, count())  # one in each sample, of three calls
    monkeypatch.setattr(worker, "DEVICES", {"cuda": device})
    device.copy_bytes, device.tf32_gemm_sizes = (1024,), (8,)
    # Every call and copy takes the fake no time; its clock only shows that it was asked.
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


NLL_KEYS = [f"nll_loss 64 x 10 float32 {mode}" for mode in ("forward", "forward_backward")]


def worker_reports(device: Device, monkeypatch) -> list[dict]:
    """What a worker reports about two cases on a device."""
    monkeypatch.setattr(worker, "DEVICES", {"cpu": device})
    events: list[dict] = []
    threads = torch.get_num_threads()
    plan = Plan(seconds=1e-3, sample_seconds=1e-4, min_rounds=2)
    with suppress(SystemError):  # of a device that is broken
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


def test_a_gpus_compiler_trusts_no_choice_made_while_others_compiled():
    from torch._inductor import config

    before = config.autotune_local_cache
    CPU.prepare_compiler()
    assert config.autotune_local_cache == before
    try:
        FakeGpu().device().prepare_compiler()
        assert not config.autotune_local_cache
    finally:
        config.autotune_local_cache = before


@pytest.mark.parametrize(
    ("is_available", "build_info", "message"),
    [
        (False, {"cuda": True}, "needs a CUDA device that torch can use, and torch finds none"),
        (True, {"cuda": False}, "needs fastnn's CUDA part, and fastnn was built without it"),
    ],
)
def test_cuda_that_can_not_be_used_ends_in_one_sentence(
    is_available: bool, build_info: dict, message: str, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    monkeypatch.setattr(_extension, "build_info", lambda: build_info)
    assert cli.main(["--device", "cuda", "--filter", "SGD"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"benchmarks: error: --device cuda {message}"


def test_cuda_with_a_device_and_the_kernels_has_no_complaint(monkeypatch):
    monkeypatch.setattr(_extension, "build_info", lambda: {"cuda": True})
    assert Cuda(SimpleNamespace(is_available=lambda: True)).complaint() is None
    assert CPU.complaint() is None


def test_command_line_chooses_and_records_the_device():
    options = cli.parse_options(["--device", "cuda"])
    assert (options.device, options.threads) == (CUDA, (1,))
    assert cli._command(options) == "python -m benchmarks --device cuda --threads 1"
    assert cli.parse_options(["--device", "cuda", "--threads", "2"]).threads == (2,)
    options = cli.parse_options(["--threads", "1"])
    assert options.device is CPU
    assert cli._command(options) == "python -m benchmarks --threads 1"
    assert cli.parse_options([]).threads == CPU.default_threads()


def test_document_table_plots_and_report_name_the_gpu(tmp_path: Path, monkeypatch):
    facts = FakeGpu().device().facts()
    assert facts["gpu"] == "A GPU" and facts["capability"] == "CUDA sm_90"
    assert facts["capability of torch"] == f"CUDA {torch.version.cuda}"
    document = make_document(WON, LOST)
    titles: list[str] = []
    monkeypatch.setattr(plots, "_draw", lambda results, value, title, *rest: titles.append(title))

    def texts() -> tuple[str, str, list[str]]:
        titles.clear()
        plots.draw(document, tmp_path)
        return table.format_document(document), report.markdown(document, []), list(titles)

    shown, written, titled = texts()
    assert "won, 1 thread\n" in shown and ": A Processor (2 processors" in written
    assert all(title.endswith("(A Processor)") for title in titled)
    document["machine"] |= facts
    shown, written, titled = texts()
    assert "won, A GPU, 1 thread\n" in shown
    assert ": A GPU, A Processor (2 processors" in written and "(CUDA sm_90 kernels)" in written
    assert len(titled) == 2 and all(title.endswith("(A GPU)") for title in titled)


def test_run_records_the_facts_of_the_device(monkeypatch):
    monkeypatch.setattr(run, "worker_events", lambda request, end: iter([]))
    options = cli.parse_options(["--threads", "1", "--filter", "overhead"])
    assert "gpu" not in cli.run(options, []).machine
    assert cli.run(replace(options, device=FakeGpu().device()), []).machine["gpu"] == "A GPU"


# ---- running -------------------------------------------------------------------------------------


def run_workers(workers: list, monkeypatch, **changes) -> tuple[run.Run, list[worker.Request]]:
    """Runs three cases; each worker is a list of events, of which an exception is raised."""
    requests: list[worker.Request] = []

    def events(request: worker.Request, end: float):
        requests.append(request)
        for event in workers[len(requests) - 1]:
            if isinstance(event, Exception):
                raise event
            yield event() if callable(event) else event

    monkeypatch.setattr(run, "worker_events", events)
    monkeypatch.setattr(cli, "_keys", lambda *args: ["a", "b", "c"])
    options = replace(cli.parse_options(["--threads", "1"]), **changes)
    return cli.run(options, []), requests


def measured(key: str, seconds: float = 1.0) -> list[dict]:
    result = make_result({"fastnn": seconds, "peer": 2.0}, op=key)
    return [
        {"event": "start", "key": key},
        {"event": "result", "result": result, "elapsed": 0.5},
    ]


def test_a_worker_that_dies_takes_only_its_case_along(monkeypatch):
    start = {"event": "start", "key": "b"}
    limited = {"event": "limits", "limits": LIMITS}
    workers = [
        [limited, *measured("a"), start, run.WorkerEnded("ended with -11")],
        [{"event": "limits", "limits": None}, *measured("c")],
    ]
    found, requests = run_workers(workers, monkeypatch)
    assert [result["op"] for result in found.results] == ["a", "c"]
    assert found.results[0]["elapsed"] == 0.5
    assert found.complaints == ["failed: b: its process ended with -11"]
    assert found.limits == {"1": LIMITS}
    assert [request.keys for request in requests] == [["a", "b", "c"], ["c"]]
    assert requests[0].limit_seconds > requests[1].limit_seconds == 0


def test_a_worker_that_dies_before_its_first_case_ends_the_run(monkeypatch):
    with pytest.raises(run.BenchmarkError, match="for 1 thread ended with 1"):
        run_workers([[run.WorkerEnded("ended with 1")]], monkeypatch)


def test_the_limit_ends_a_run_and_keeps_what_was_measured(monkeypatch):
    start = {"event": "start", "key": "b"}

    def passes() -> dict:
        time.sleep(0.05)
        return start

    workers = [[*measured("a"), passes, run.WorkerEnded("ended with -9")]]
    found, _ = run_workers(workers, monkeypatch, limit=0.05)
    assert [result["op"] for result in found.results] == ["a"]
    assert found.complaints == ["skipped: b: no time left", "skipped: c: no time left"]
    assert found.document()["complaints"] == found.complaints


def test_a_limit_that_has_passed_kills_the_worker(tmp_path: Path, capsys):
    saved = tmp_path / "results.json"
    flags = ["--limit", "0.1", "--filter", "SGD.step", "--threads", "1", "--json", str(saved)]
    start = time.monotonic()
    assert cli.main(flags) == 0
    assert time.monotonic() - start < 30  # the worker alone would take longer to import torch
    said = "skipped: overhead SGD.step float32 call: no time left"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert json.loads(saved.read_text())["complaints"] == [said]


def test_results_are_saved_after_each_case(tmp_path: Path, monkeypatch):
    saved = tmp_path / "results.json"
    found: list[list[str]] = []

    def look() -> dict:
        document = json.loads(saved.read_text())
        found.append([result["op"] for result in document["results"]] + document["complaints"])
        return {"event": "limits", "limits": None}

    failed = [
        {"event": "start", "key": "b"},
        {"event": "failed", "key": "b", "reason": "no kernel"},
    ]
    run_workers([[*measured("a"), look, *failed, look]], monkeypatch, json=saved)
    assert found == [["a"], ["a", "failed: b: no kernel"]]
    assert list(tmp_path.iterdir()) == [saved]


def test_a_file_of_results_is_replaced_as_a_whole(tmp_path: Path, monkeypatch):
    saved = tmp_path / "results.json"
    run.write_json(saved, {"a": 1})
    monkeypatch.setattr(Path, "replace", raiser(OSError()))
    with pytest.raises(OSError):
        run.write_json(saved, {"a": 2})
    assert json.loads(saved.read_text()) == {"a": 1}


@pytest.mark.parametrize("seconds", [0.0, float("nan")])
def test_a_time_that_makes_no_sense_spoils_no_other_case(seconds: float, monkeypatch):
    found, _ = run_workers([[*measured("a", seconds), *measured("b")]], monkeypatch)
    assert [result["op"] for result in found.results] == ["b"]
    assert found.complaints == ["failed: a 4 x 4 float32 forward: not every number is one above 0"]


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


# ---- results -------------------------------------------------------------------------------------


def test_ratios_and_best_peers():
    result = results.complete(
        make_result({"fastnn": 2.0, "slow": 8.0, "quick": 3.0, "inference": 1.0}), None
    )
    assert result["ratios"] == {"slow": 4.0, "quick": 1.5, "inference": 0.5}
    assert (result["best"], result["best_trainable"]) == ("inference", "quick")
    assert results.best_ratio(result) == 0.5


def test_share_of_the_limit():
    gemm = make_result({"fastnn": 1.0, "peer": 1.0}, work={"flops": 5e8, "bytes": 0.0})
    assert results.complete(gemm, LIMITS)["share"] == pytest.approx(0.5)
    assert limits.limit_for(Work(flops=1), "bfloat16", LIMITS) == 2e9
    # The copy of the next larger size, of the largest where none is larger.
    moved = [limits.limit_for(Work(bytes=size), "float32", LIMITS) for size in (9, 1001, 10**6)]
    assert moved == [4e9, 1e9, 1e9]
    assert results.complete(make_result({"fastnn": 1.0}), LIMITS)["share"] is None


def test_memory_is_compared_in_whole_mebibytes():
    def ratio(ours: int, peer: int) -> float:
        result = make_result({"fastnn": ours, "peer": peer}, unit="bytes", mode="memory")
        return results.complete(result, None)["ratios"]["peer"]

    assert ratio(0, 4096) == 1
    assert ratio(2 * 2**20 + 4096, 6 * 2**20) == 3


def test_overall_counts_wins_and_finds_the_worst():
    document = make_document(WON, LOST, make_result({"fastnn": 1.0}))
    facts = results.overall(document["results"])
    assert (facts["cases"], facts["ahead"]) == (2, 1)
    assert facts["geometric_mean"] == pytest.approx(1.0)  # of 2 and 0.5
    assert facts["worst"]["op"] == "lost"
    assert results.overall([]) is None


def test_best_of_two_limits():
    other = {"gemm": {"float32": 3e9, "bfloat16": 1e9}, "copy": {"1000": 1.0, "8000": 2e9}}
    assert limits.best_of(LIMITS, other) == {
        "gemm": {"float32": 3e9, "bfloat16": 2e9},
        "copy": {"1000": 4e9, "8000": 2e9},
    }


def test_fastnn_by_another_way_is_compared_but_no_rival():
    result = results.complete(make_result({"fastnn": 2.0, "fastnn tiled": 1.0, "peer": 3.0}), None)
    assert result["ratios"] == {"fastnn tiled": 0.5, "peer": 1.5}
    assert (result["best"], result["best_trainable"]) == ("peer", "peer")


# ---- verification --------------------------------------------------------------------------------


def test_error_is_relative_and_sees_wrong_gradients():
    x = torch.rand(50, requires_grad=True)  # positive: a sum near zero has a large relative error
    right, wrong = (
        Function("a", torch.sum),
        Function("b", lambda x: x.sum() + 0.1 * x.detach().sum()),
    )
    reference = list(verify._tensors(right.check(Inputs((x,)).double())))
    # 50 additions, each of which rounds by at most 6e-8.
    assert verify.error(right, Inputs((x,)), reference) < 3e-6
    assert verify.error(wrong, Inputs((x,)), reference) == pytest.approx(0.1, rel=1e-3)
    halved = Function("c", lambda x: x.sum() - 0.5 * (x - x.detach()).sum())
    assert verify.error(halved, Inputs((x,)), reference) == pytest.approx(0.5, rel=1e-3)
    nan = Function("d", lambda x: x.sum() * float("nan"))
    assert verify.error(nan, Inputs((x,)), reference) == float("inf")


@pytest.mark.parametrize("gradients", [False, True])
def test_a_mean_over_rows_is_the_same_by_some_rows_at_a_time(gradients: bool, monkeypatch):
    monkeypatch.setattr(case_module, "EXACT_ELEMENTS", 3 * 7)  # rows of 7, the last two alone
    generator = torch.Generator().manual_seed(0)
    inputs = logits_and_targets(generator, 8, 7, torch.float32, gradients)
    function = cross_entropy._with_smoothing(torch.nn.functional.cross_entropy, 0.1)
    whole = list(verify._tensors(Function("a", function).exact(inputs)))
    parts = list(verify._tensors(case_module.MeanOverRows("b", function).exact(inputs)))
    assert len(parts) == len(whole) == 1 + gradients
    torch.testing.assert_close(parts, [one.detach() for one in whole])
    assert parts[0].dtype == torch.float64


def test_cases_come_by_their_importance_and_those_of_the_cpu_by_operator():
    priorities = [case.priority for case in all_cases(CUDA)]
    assert priorities == sorted(priorities) and len(set(priorities)) == 3
    memory_cases = [case.key for case in all_cases(CUDA) if case.mode == "memory"]
    assert memory_cases == ["cross_entropy 8192 x 32000 bfloat16 memory"]
    assert {case.priority for case in all_cases()} == {1}
    assert all_cases()[-1].mode == "memory"


def test_tf32_has_a_name_of_its_own_and_ends_with_its_case():
    (case,) = (case for case in all_cases(CUDA) if case.key.endswith("4096 tf32 forward"))
    assert case.dtype == torch.float32 and case.tf32
    before = torch.get_float32_matmul_precision()
    with case_module.tf32(True):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    with case_module.tf32(False):
        assert torch.get_float32_matmul_precision() == before


def test_products_are_chosen_for_one_call(monkeypatch):
    chosen: list[str] = []
    variable = linear_relu.PRODUCT_VARIABLE
    monkeypatch.setattr(
        fastnn.functional, "linear_relu", lambda: chosen.append(os.environ[variable])
    )
    monkeypatch.setenv(variable, "auto")
    linear_relu._by_product("tiled")()
    assert chosen == ["tiled"] and os.environ[variable] == "auto"


@pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])
def test_every_case_has_a_name_of_its_own_and_ours_among_its_contenders(device: Device):
    cases = all_cases(device)
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        names = [contender.name for contender in case.contenders()]
        assert names.count("fastnn") == 1
        assert len(set(names)) == len(names) > 1


def test_resnet50_has_its_parameters():
    shapes = sgd.resnet50()
    assert len(shapes) == 161
    assert sum(torch.Size(shape).numel() for shape in shapes) == 25_557_032


def test_resnet18_has_its_parameters():
    shapes = sgd.resnet18()
    assert len(shapes) == 62
    assert sum(torch.Size(shape).numel() for shape in shapes) == 11_689_512


@pytest.mark.skipif(not resident.supported(), reason="the system does not reset a process's peak")
def test_peak_memory_sees_what_a_call_allocates():
    growth = CPU.peak_growth(lambda: torch.ones(8 * 2**20))
    assert growth == pytest.approx(32 * 2**20, rel=0.1)


# ---- compiled peers ------------------------------------------------------------------------------


def compiler_has(*names: str) -> bool:
    """Whether the installed torch's compiler has such settings (dynamo's, inductor's)."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    return all(hasattr(dynamo, name) or hasattr(inductor, name) for name in names)


needs_traced_backward = pytest.mark.skipif(
    not compiler_has("trace_autograd_ops"), reason="the compiler can't trace a backward"
)
needs_auto_chunker = pytest.mark.skipif(
    not compiler_has("auto_chunker"), reason="the compiler has no auto-chunker"
)
needs_linear_cross_entropy = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"),
    reason="torch has no linear_cross_entropy",
)


@needs_traced_backward
def test_compiled_steps_train_as_the_reference_and_hold_their_backward(fresh_dynamo):
    """All contenders in one process, as the benchmark has them: they share a limit."""
    from torch._dynamo.utils import counters

    case = next(case for case in mlp.cases() if case.label == "LogSoftmax+NLLLoss")
    inputs = verify.check_inputs(case, torch.Generator().manual_seed(0))
    reference = verify.expected(case, inputs)
    graphs, breaks = {}, {}
    for contender in case.contenders():
        if contender.compiled:
            counters.clear()
            assert verify.error(contender, inputs, reference) <= case.allowed_error, contender.name
            name = contender.name.removeprefix("torch.compile, ")
            graphs[name] = counters["stats"]["unique_graphs"]
            breaks[name] = list(counters["graph_break"])
            # The benchmark's later calls run what the check has compiled.
            contender.sampler(inputs)(2)
            assert counters["stats"]["unique_graphs"] == graphs[name]
    assert len(graphs) == 6
    assert graphs["one graph"] == graphs["one graph, cpp_wrapper"] == 1
    optimizers_own = "Call to `torch._dynamo.graph_break()`"
    assert all(
        reason.startswith(optimizers_own) for reasons in breaks.values() for reason in reasons
    )
    assert not breaks["one graph"]


def test_a_step_that_the_compiler_can_not_trace_is_unavailable(monkeypatch):
    import torch._dynamo

    case = mlp.cases()[0]
    traced = [one for one in case.contenders() if isinstance(one, mlp.TracedStep)]
    monkeypatch.setattr(torch._dynamo, "config", SimpleNamespace())  # as in an older torch
    assert len(traced) == 4
    for contender in traced:
        with pytest.raises(Unavailable, match="can't trace a backward"):
            contender.check(mlp._batch(torch.Generator()))


def small_vocabulary(rows: int, features: int) -> Inputs:
    """Logits of 2 MiB, of which inductor's auto-chunker needs 1."""
    return cross_entropy._features_weight_targets(
        torch.Generator().manual_seed(0), rows, features, 2**19 // rows, gradients=True
    )


def auto_chunked() -> cross_entropy.AutoChunked:
    contenders = cross_entropy._vocabulary_contenders(gradients=True)
    return next(one for one in contenders if isinstance(one, cross_entropy.AutoChunked))


@needs_auto_chunker
def test_auto_chunker_chunks_and_gives_the_references_numbers(fresh_dynamo):
    stock = Function("reference", cross_entropy._linear_then(torch.nn.functional.cross_entropy))
    inputs = small_vocabulary(64, 16)
    reference = list(verify._tensors(stock.check(inputs.double())))
    for _ in range(2):  # the compiler's cache knows the second one
        torch._dynamo.reset()
        contender = auto_chunked()
        assert verify.error(contender, inputs, reference) < 1e-5
        contender.bind(inputs)  # what is compiled stays


@needs_auto_chunker
def test_auto_chunker_that_leaves_a_graph_whole_is_unavailable(fresh_dynamo):
    with pytest.raises(Unavailable, match="leaves this graph whole"):
        auto_chunked().bind(small_vocabulary(64, 64))  # more weights than logits


def test_auto_chunker_is_unavailable_where_inductor_has_none(monkeypatch):
    import torch._inductor.metrics

    monkeypatch.setattr(torch._inductor, "config", SimpleNamespace())
    with pytest.raises(Unavailable, match="has no auto-chunker"):
        auto_chunked().bind(small_vocabulary(64, 16))


@needs_linear_cross_entropy
def test_linear_cross_entropy_is_named_for_what_it_runs():
    inputs = small_vocabulary(256, 16)
    names = ("unfused", "default options", "64 rows", "256 rows")
    contenders = {one.name: one for one in cross_entropy._vocabulary_contenders(gradients=False)}
    operators, products = {}, {}
    for name in names:
        contender = contenders[f"F.linear_cross_entropy, {name}"]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            contender.bind(inputs)()
        calls = [event.name for event in profile.events()]
        operators[name] = "aten::cross_entropy_loss" in calls
        products[name] = sum(call in ("aten::mm", "aten::addmm") for call in calls)
        assert contender.same_algorithm == (name == "unfused")
    assert operators == {name: name == "unfused" for name in names}
    assert products["64 rows"] == 4 * products["256 rows"] < products["default options"]


def test_fused_sgd_competes_over_bfloat16_where_torch_steps_right():
    """torch before 2.14.1 leaves most bfloat16 parameters where they are."""
    case = sgd._step_case("small", [(1000,), (7,)], torch.bfloat16)
    params, grads = case.inputs(torch.Generator().manual_seed(0)).args
    moved = [torch.nn.Parameter(param.clone()) for param in params]
    for param, grad in zip(moved, grads, strict=True):
        param.grad = grad
    torch.optim.SGD(moved, lr=1.0, fused=True).step()
    is_right = all(
        torch.allclose(new, old - grad, rtol=2**-7)
        for new, old, grad in zip(moved, params, grads, strict=True)
    )
    outcome = worker.Outcome([one for one in case.contenders() if one.name == "SGD fused"])
    worker._check(case, outcome, torch.Generator().manual_seed(0))
    assert [one.name for one in outcome.contenders] == ["SGD fused"] * is_right
    assert [reason.startswith("wrong by") for reason in outcome.skipped.values()] == [True] * (
        not is_right
    )


# ---- table and report ----------------------------------------------------------------------------


def test_table_marks_losses():
    lines = table.format_document(make_document(WON, LOST)).splitlines()
    rows = [line for line in lines if "4 x 4" in line and "fwd" in line]
    assert [row.rstrip().endswith("!") for row in rows] == [False, True]
    assert "2.00" in rows[0] and "4.00" in rows[0]
    assert "in 1 of 2 cases" in lines[-1] and "worst 0.50x (lost" in lines[-1]


def test_table_and_report_say_when_the_machine_was_busy():
    busy = make_result({"fastnn": 1.0, "peer": 2.0})
    busy["contenders"]["fastnn"]["interruptions"] = 100.0
    document = make_document(WON, busy)
    assert "in 1 of 2 cases: with" in table.format_document(document)
    assert "processor time in 1 of 2 cases" in report.markdown(document, [])
    assert "Other programs" not in table.format_document(make_document(WON))
    assert "Other programs" not in report.markdown(make_document(WON), [])


def gpu_document(*documents_results: dict) -> dict:
    document = make_document(*documents_results)
    document["machine"] |= FakeGpu().device().facts() | {"gpu driver": "580.1"}
    document["complaints"] = ["skipped: op b: no time left"]
    limits = {"gemm": LIMITS["gemm"] | {"tf32": 5e14}, "launch": {"kernels": 4e5}}
    document["limits"] = {"1": LIMITS | limits}
    return document


def gpu_result(ours: dict, peer: dict) -> dict:
    """A case of 1 and 4 seconds, whose contenders have more times."""
    result = make_result({"fastnn": 1.0, "peer": 4.0}, op="both")
    result["contenders"]["fastnn"] |= ours
    result["contenders"]["peer"] |= peer
    return result


TIMED = gpu_result({"loop": 2.0, "replay": 1.5, "waits": False}, {"loop": 1.0, "replay": 3.0})
WAITING = gpu_result({"loop": 2.0, "replay": 1.5}, {"loop": 8.0, "waits": True, "no_replay": "it"})
REFUSED = gpu_result({"loop": 2.0, "no_replay": "it"}, {"loop": 8.0, "replay": 3.0})


def test_best_rival_by_another_time():
    assert results.best_rival(TIMED, "loop") == ("peer", 0.5)
    assert results.best_rival(TIMED, "replay") == ("peer", 2.0)
    assert results.best_rival(WAITING, "replay") is None
    assert results.best_rival(REFUSED, "replay") is None
    assert results.best_rival(WON, "loop") is None


def test_table_shows_loops_and_graphs_where_there_are_some():
    shown = table.format_document(make_document(WON))
    assert "loop" not in shown and "graph" not in shown
    shown = table.format_document(gpu_document(TIMED, WAITING, REFUSED))
    rows = [line.split()[-7:] for line in shown.splitlines() if "4 x 4" in line]
    assert rows[0] == ["4.00", "2000.00", "ms", "0.50", "1500.00", "ms", "2.00"]
    assert rows[1][-5:] == ["2000.00", "ms", "4.00", "1500.00", "ms"]
    assert rows[2][-3:] == ["2000.00", "ms", "4.00"]
    assert "Waits for the GPU within a call somewhere: peer." in shown


def test_page_names_card_driver_and_torch_and_shows_all_times(tmp_path: Path):
    saved, page = tmp_path / "bench.json", tmp_path / "page.md"
    saved.write_text(json.dumps(gpu_document(TIMED, WAITING, REFUSED, LOST)))
    assert report.main([str(saved), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("# Results on a GPU: A GPU\n")
    for fact in ("| card | A GPU |", "| driver | 580.1 |", "| torch | 2.13.0 |"):
        assert fact in text
    assert "| TF32 matrix product | 500.0 TFLOP/s |" in text
    assert "| launch of an empty kernel | 2.5 us |" in text
    assert "| both 4 x 4 float32 forward | loop | peer | **0.50x** |" in text
    assert "| both 4 x 4 float32 forward | graph | peer |" not in text
    assert "| lost 4 x 4 float32 forward | GPU | ahead | **0.50x** |" in text
    assert "| 4 x 4 | float32 | fwd | fastnn | 1000.00 ms | 2000.00 ms | 1500.00 ms |" in text
    assert "|  |  |  | peer | 4000.00 ms° | 8000.00 ms |  | 4.00x |  |" in text
    assert "- skipped: op b: no time left\n" in text
    assert "- the graph of peer (it): both 4 x 4 float32 forward" in text


def test_page_is_a_gpus(tmp_path: Path, capsys):
    saved, page = tmp_path / "bench.json", tmp_path / "page.md"
    saved.write_text(json.dumps(make_document(WON)))
    assert report.main([str(saved), "--page", str(page)]) == 2
    saved.write_text(json.dumps(gpu_document(WON)))
    assert report.main([str(saved), "--page", str(tmp_path / "none" / "page.md")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "a page needs the results of a GPU" in errors[0] and "is not a folder" in errors[1]
    assert not page.exists()


def test_results_saved_before_can_be_shown():
    saved = report.read_document(REPOSITORY / "benchmarks" / "results" / "avx2.json")
    assert "fastnn is ahead of the best peer in" in table.format_document(saved)
    assert report.markdown(saved, []).startswith("Measured on ")


def test_a_ratio_just_below_one_does_not_read_as_one():
    assert table.ratio_text(0.9999) == "0.99"
    assert table.ratio_text(1.0) == "1.00"


def write_readme(folder: Path, text: str) -> tuple[Path, Path]:
    readme, saved = folder / "README.md", folder / "results.json"
    readme.write_text(text)
    saved.write_text(json.dumps(make_document(WON, LOST)))
    return readme, saved


def test_report_replaces_what_is_between_the_markers(tmp_path: Path):
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    readme, saved = write_readme(tmp_path, text)
    arguments = [str(saved), "--readme", str(readme), "--plots", str(tmp_path / "plots")]
    assert report.main(arguments) == 0
    once = readme.read_text()
    assert once.startswith(f"before\n{report.BEGIN}\n") and once.endswith(f"{report.END}\nafter\n")
    assert "old" not in once
    assert "A Processor" in once and "2026-01-02" in once and "1 thread" in once
    assert "**0.50x**" in once  # losses are shown
    assert "(plots/ratio.png)" in once
    assert (tmp_path / "plots" / "ratio.png").read_bytes().startswith(b"\x89PNG")
    assert report.main(arguments) == 0
    assert readme.read_text() == once


@pytest.mark.parametrize("text", ["no markers", f"{report.END}\n{report.BEGIN}", report.BEGIN])
def test_report_refuses_a_readme_without_markers(tmp_path: Path, text: str, capsys):
    readme, saved = write_readme(tmp_path, text)
    assert report.main([str(saved), "--readme", str(readme)]) == 2
    assert "the readme needs one" in capsys.readouterr().err
    assert readme.read_text() == text


def test_report_refuses_other_files(tmp_path: Path, capsys):
    readme, saved = write_readme(tmp_path, f"{report.BEGIN}{report.END}")
    saved.write_text("[]")
    assert report.main([str(saved), "--readme", str(readme)]) == 2
    assert report.main([str(tmp_path / "none"), "--readme", str(readme)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "holds no results" in errors[0] and "can't be read" in errors[1]


@pytest.mark.parametrize(
    "parts", [{}, {"machine": {"gpu": "A GPU"}, "command": "", "limits": {}, "results": []}]
)
def test_report_refuses_half_a_document(tmp_path: Path, parts: dict, capsys):
    saved = tmp_path / "bench.json"
    saved.write_text(json.dumps({"schema": make_document(WON)["schema"], **parts}))
    assert report.main([str(saved), "--page", str(tmp_path / "page.md")]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_report_puts_no_gpu_into_the_readme_and_no_page_where_a_folder_is(tmp_path: Path, capsys):
    readme, saved = write_readme(tmp_path, f"{report.BEGIN}{report.END}")
    before = readme.read_text()
    saved.write_text(json.dumps(gpu_document(WON)))
    assert report.main([str(saved), "--readme", str(readme)]) == 2
    assert report.main([str(saved), "--page", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "--page writes those of a GPU" in errors[0] and "Is a directory" in errors[1]
    assert readme.read_text() == before


def test_the_page_of_the_documentation_shows_the_saved_results():
    saved = report.read_document(REPOSITORY / "benchmarks/results/h200.json")
    assert (REPOSITORY / "docs/performance_cuda.md").read_text() == report.page(saved, [])


def test_plots_show_what_there_is(tmp_path: Path):
    drawn = plots.draw(make_document(WON, LOST), tmp_path)
    assert [path.name for path in drawn] == ["ratio.png"]  # none of these has a limit


# ---- command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "tpu"], "'tpu' is not a device; the devices are cpu, cuda"),
        (["--threads", "0"], "expected thread counts such as 1,2, got '0'"),
        (["--threads", "1,x"], "expected thread counts such as 1,2, got '1,x'"),
        (["--modes", "backward"], "'backward' is not a mode; the modes are forward"),
        (["--filter", "("], "'(' is not a regular expression"),
        (["--seconds", "-1"], "expected a number of seconds above 0, got '-1'"),
        (["--json", "no/such/folder/file.json"], "is not a file in an existing folder"),
        (["--filter", "no such case"], "no case matches --filter and --modes"),
    ],
)
def test_bad_arguments_give_one_sentence(flags: list[str], message: str, capsys):
    try:
        code = cli.main(flags)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_quick_run_writes_valid_json(tmp_path: Path):
    saved = tmp_path / "results.json"
    flags = ["--quick", "--seconds", "0.01", "--filter", "overhead", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *flags, "--json", str(saved)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = saved.read_text()
    document = json.loads(text)
    wanted = [case.key for case in all_cases() if case.op == "overhead"]
    assert [results.key(result) for result in document["results"]] == wanted
    assert all(result["contenders"]["fastnn"]["median"] > 0 for result in document["results"])
    assert "fastnn is ahead of the best peer in" in done.stdout
    assert str(REPOSITORY) not in text and str(tmp_path) not in text
