"""Fakes of a GPU and of results for the benchmarks' tests."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

from benchmarks import results
from benchmarks.device import Cuda
from benchmarks.timing import Plan

PLAN = Plan(seconds=0.1, sample_seconds=0.01, min_rounds=3)


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


class FakeGpu:
    """Replaces torch.cuda, with its own clock in milliseconds and a log."""

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
    """A time on the fake's clock; as on a GPU, it can't be read before a synchronisation."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.gpu.log.append("event")
        self.moment = self.gpu.now

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.gpu.log[-1] == "synchronise"
        return end.moment - self.moment


def raiser(error: Exception):
    def raises(*args, **options):
        raise error

    return raises


NLL_KEYS = [f"nll_loss 64 x 10 float32 {mode}" for mode in ("forward", "forward_backward")]
