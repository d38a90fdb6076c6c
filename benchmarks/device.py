"""Where the cases run, and everything that depends on it: data, clocks, memory, limits, facts."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import machine, resident, timing
from benchmarks.gpu_timing import GpuClock, KernelTimer
from benchmarks.timing import Plan
from fastnn import _extension

#: Repeats a call a given number of times and returns the seconds it took.
Timer = Callable[[Callable[[], object], int], float]

MIB = 2**20
# A loop of calls is timed five times, with this many calls each, or fewer if they take long.
LOOPS, LOOP_CALLS, LOOP_SECONDS = 5, 40, 0.02


class Device:
    """The CPU, and the defaults for other devices."""

    name = "cpu"
    # Sizes of the matrix products that measure the limit. Without bfloat16 instructions it is
    # better to convert to float32; a small size shows this without taking minutes.
    gemm_sizes: Mapping[torch.dtype, Sequence[int]] = {
        torch.float32: (1024, 2048),
        torch.bfloat16: (512,),
    }
    tf32_gemm_sizes: Sequence[int] = ()  # empty without TF32
    copy_bytes: Sequence[int] = (MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
    full_plan, quick_plan = timing.FULL, timing.QUICK
    # Whether peak memory needs a process per contender: allocators keep memory once they have it.
    isolates_memory = True
    # Environment variables for the processes that compile or measure.
    environment: Mapping[str, str] = {}

    def limit_seconds(self, plan: Plan) -> float:
        """How long to measure each of the device's limits."""
        return plan.seconds / 4

    def products(self, left: Tensor, right: Tensor) -> list[Callable[[], object]]:
        """The libraries' products of two square matrices; oneDNN's has packed the right one."""
        out = torch.empty_like(left)
        products: list[Callable[[], object]] = [lambda: torch.mm(left, right, out=out)]
        if left.is_cpu and _has_onednn(left.dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(right, len(left))
            multiply = torch.ops.mkldnn._linear_pointwise
            products.append(lambda: multiply(left, packed, None, "none", [], ""))
        return products

    def complaint(self) -> str | None:
        """Why nothing can be measured here, in one sentence; None if it can."""
        return None

    def worker_environment(self, threads: int) -> dict[str, str]:
        """The variables of a process that compiles or measures with so many threads."""
        count = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        return {**os.environ, **count, **self.environment, **machine.compiler_cache()}

    def default_threads(self) -> tuple[int, ...]:
        """One thread, and as many as this process may use."""
        affinity = getattr(os, "sched_getaffinity", None)
        usable = len(affinity(0)) if affinity else os.cpu_count()
        return tuple(sorted({1, usable or 1}))

    def facts(self) -> dict[str, str]:
        """What results depend on besides the machine's facts; replaces those of the same name."""
        return {}

    def generator(self, seed: int) -> torch.Generator:
        """The generator of the inputs, on this device."""
        return torch.Generator(self.name).manual_seed(seed)

    def synchronize(self) -> None:
        """Waits for queued work; a CPU operator is done when it returns."""

    def timer(self) -> Timer:
        """A timer for one contender's calls."""
        return self.time_calls

    def more_times(self, bind: Callable[[], Callable[[], object]], timer: Timer) -> dict:
        """Further measurements besides the timer's samples, by their names in the results."""
        return {}

    def launch_rate(self) -> float | None:
        """Kernel launches per second; None if calls launch none."""
        return None

    def check_health(self) -> None:
        """Raises if a failed case has made the device unusable for this process."""

    def time_calls(self, call: Callable[[], object], count: int) -> float:
        """The seconds that ``count`` consecutive calls take."""
        self.synchronize()
        start = time.perf_counter_ns()
        for _ in repeat(None, count):
            call()
        self.synchronize()
        return (time.perf_counter_ns() - start) * 1e-9

    def prepare_compiler(self) -> None:
        """Configures torch.compile for a comparison, before anything is compiled."""

    def interruptions(self) -> int:
        """How often other programs have interrupted the timing so far."""
        return timing.involuntary_switches()

    def available_bytes(self) -> float:
        """The available memory; infinite if the system doesn't say."""
        return machine.available_bytes()

    def measures_memory(self) -> bool:
        """Whether ``peak_growth`` is supported."""
        return resident.supported()

    def peak_growth(self, call: Callable[[], object]) -> int:
        """The peak memory in use during the call, in bytes above the level before it."""
        return resident.peak_growth(call)


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _gpu_memory(size: int) -> Tensor:
    return torch.zeros(size // 4, device="cuda")


class Cuda(Device):
    """The current GPU.

    Args:
        cuda: :mod:`torch.cuda`, or a fake of it.
        make_buffer: allocates a number of bytes on the device.
    """

    name = "cuda"
    # float32 is multiplied without TF32, torch's default, as in the contenders.
    gemm_sizes = dict.fromkeys((torch.float32, torch.bfloat16), (8192,))
    tf32_gemm_sizes = (8192,)
    copy_bytes = (*Device.copy_bytes, 4096 * MIB)
    # Each sample is a single call: events have no overhead that more calls would have to amortize.
    full_plan = Plan(seconds=0.0, sample_seconds=0.0, min_rounds=30, long_call=0.0)
    quick_plan = Plan(seconds=0.0, sample_seconds=0.0, min_rounds=7, long_call=0.0)
    isolates_memory = False  # torch's allocator counts what each call allocates
    # A pool of compiler processes would start during the timing, mostly for nothing.
    environment: Mapping[str, str] = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}

    def __init__(
        self,
        cuda: ModuleType = torch.cuda,
        make_buffer: Callable[[int], Tensor] = _gpu_memory,
    ) -> None:
        self.cuda = cuda
        self.clock = GpuClock(cuda, make_buffer)

    def limit_seconds(self, plan: Plan) -> float:
        return 0.02

    def complaint(self) -> str | None:
        if not self.cuda.is_available():
            return "--device cuda needs a CUDA device that torch can use, and torch finds none"
        if not _extension.build_info().get("cuda"):
            return "--device cuda needs fastnn's CUDA part, and fastnn was built without it"
        return None

    def default_threads(self) -> tuple[int, ...]:
        return (1,)  # the CPU only launches kernels

    def facts(self) -> dict[str, str]:
        major, minor = self.cuda.get_device_capability()
        card = self.cuda.get_device_properties(self.cuda.current_device())
        return {
            "gpu": self.cuda.get_device_name(),
            "gpu driver": _driver_version(),
            "gpu memory": f"{card.total_memory / 2**30:.0f} GiB",
            "gpu L2": f"{card.L2_cache_size / MIB:.0f} MiB",
            "gpu multiprocessors": str(card.multi_processor_count),
            "capability": f"CUDA sm_{major}{minor}",
            "capability of torch": f"CUDA {torch.version.cuda}",
            "float32 matmul precision": torch.get_float32_matmul_precision(),
        }

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def timer(self) -> Timer:
        return KernelTimer(self.clock)

    def more_times(self, bind: Callable[[], Callable[[], object]], timer: Timer) -> dict:
        """``loop`` and ``replay``: seconds per call in a loop of calls, and of a graph's replays.

        ``waits`` is True for a call that waits for the GPU, which no graph can contain.
        ``no_replay`` is the reason for a missing replay time.
        """
        times: dict = {"waits": timer.waits}
        reason = "it waits for the GPU"
        try:
            call = bind()
            times["loop"] = self.time_loop(call)
            if not timer.waits:
                return times | {"replay": self.time_loop(self.clock.capture(call).replay)}
        except Exception as problem:  # whatever a peer does that a capture doesn't allow
            reason = one_line(problem.__context__ or problem)
        return times | {"no_replay": reason}

    def time_loop(self, call: Callable[[], object]) -> float:
        """Seconds per call in a loop that makes one call after another."""
        once = max(self.time_calls(call, 1), 1e-9)
        count = max(1, min(LOOP_CALLS, int(LOOP_SECONDS / once)))
        return statistics.median(self.time_calls(call, count) / count for _ in range(LOOPS))

    def launch_rate(self) -> float:
        """The launch rate of an empty kernel."""
        count = 1000
        return count / self.time_calls(lambda: self.cuda._sleep(0), count)

    def check_health(self) -> None:
        """Detects an illegal access, which persists, after clearing a failed capture's error."""
        self.cuda.synchronize()
        self.cuda.empty_cache()

    def prepare_compiler(self) -> None:
        """Tunes kernels anew: cached choices were made while other processes were compiling."""
        from torch._inductor import config

        config.autotune_local_cache = False

    def interruptions(self) -> int:
        return 0  # the GPU continues with queued work when Python loses the processor

    def available_bytes(self) -> float:
        self.cuda.empty_cache()  # releases memory that torch merely caches
        free, _ = self.cuda.mem_get_info()
        return free

    def measures_memory(self) -> bool:
        return True

    def peak_growth(self, call: Callable[[], object]) -> int:
        """Counts the memory that torch's allocator has handed out, not what it caches."""
        gc.collect()
        self.synchronize()
        before = self.cuda.memory_allocated()
        self.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return self.cuda.max_memory_allocated() - before


def _driver_version() -> str:
    """The driver version, from nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return said.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def one_line(error: BaseException) -> str:
    """An error's message, short enough for a table."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]


CPU, CUDA = Device(), Cuda()
DEVICES = {device.name: device for device in (CPU, CUDA)}
