"""Where the cases run, and all that differs there: data, clocks, memory, limits, facts."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import repeat
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import machine, resident, timing
from fastnn import _extension

#: Makes a call as often as it is told, and returns the seconds that the calls took.
Timer = Callable[[Callable[[], object], int], float]

# The modes that ask what an operator's kernels take. The others ask for what a loop waits, which on
# a GPU is the launching of kernels above all.
KERNEL_MODES = ("forward", "forward_backward")


class Device:
    """The CPU, and what any other device has in common with it."""

    name = "cpu"
    # Sizes of the matrix products that the limit is looked for with. Where bfloat16 has no
    # instructions of its own, converting to float32 is the better way, and a small size says so
    # without taking minutes.
    gemm_sizes: Mapping[torch.dtype, Sequence[int]] = {
        torch.float32: (1024, 2048),
        torch.bfloat16: (512,),
    }

    def complaint(self) -> str | None:
        """Why nothing can be measured here, in one sentence; None where it can."""
        return None

    def default_threads(self) -> tuple[int, ...]:
        """One, and all that this process may use."""
        affinity = getattr(os, "sched_getaffinity", None)
        usable = len(affinity(0)) if affinity else os.cpu_count()
        return tuple(sorted({1, usable or 1}))

    def facts(self) -> dict[str, str]:
        """What the results depend on, beside the facts of the machine; the same key replaces."""
        return {}

    def place(self, tensor: Tensor) -> Tensor:
        """The tensor on this device; a leaf stays one, and asks for its gradient as before."""
        if tensor.device.type == self.name:
            return tensor
        return tensor.detach().to(self.name).requires_grad_(tensor.requires_grad)

    def synchronize(self) -> None:
        """Waits for what is queued; a CPU operator has finished when it returns."""

    def timer(self, mode: str) -> Timer:
        """What times the calls of a mode's contenders."""
        return self.time_calls

    def time_calls(self, call: Callable[[], object], count: int) -> float:
        """The seconds that pass until ``count`` calls, one after the other, are done."""
        self.synchronize()
        start = time.perf_counter_ns()
        for _ in repeat(None, count):
            call()
        self.synchronize()
        return (time.perf_counter_ns() - start) * 1e-9

    def interruptions(self) -> int:
        """How often other programs have disturbed the timing so far."""
        return timing.involuntary_switches()

    def available_bytes(self) -> float:
        """The memory that can be used; infinite where the system doesn't tell."""
        return machine.available_bytes()

    def measures_memory(self) -> bool:
        """Whether ``peak_growth`` works."""
        return resident.supported()

    def peak_growth(self, call: Callable[[], object]) -> int:
        """How many bytes more than before are in use while the call runs, at the most."""
        return resident.peak_growth(call)


def _gpu_memory(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cuda")


class Cuda(Device):
    """The current GPU.

    Args:
        cuda: :mod:`torch.cuda`, or what stands in for it.
        make_buffer: returns so many bytes of the device's memory.
    """

    name = "cuda"
    # float32 as torch multiplies it by default, which is without TF32: its contenders do so too.
    gemm_sizes = dict.fromkeys((torch.float32, torch.bfloat16), (4096, 8192))

    def __init__(
        self,
        cuda: ModuleType = torch.cuda,
        make_buffer: Callable[[int], Tensor] = _gpu_memory,
    ) -> None:
        self.cuda, self.make_buffer = cuda, make_buffer

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
        return {
            "gpu": self.cuda.get_device_name(),
            "capability": f"CUDA sm_{major}{minor}",
            "capability of torch": f"CUDA {torch.version.cuda}",
            "float32 matmul precision": torch.get_float32_matmul_precision(),
        }

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def timer(self, mode: str) -> Timer:
        return self.time_kernels if mode in KERNEL_MODES else self.time_calls

    def time_kernels(self, call: Callable[[], object], count: int) -> float:
        """The GPU's own time for ``count`` calls, which find nothing of their data in its L2."""
        spans = [[self.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in spans:
            # Outside of the span. While the GPU writes, Python queues the call behind it, so that
            # its kernels need not wait to be launched; those of a small backward may even so.
            self._flush.zero_()
            start.record()
            call()
            end.record()
        self.synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) * 1e-3  # from milliseconds

    @cached_property
    def _flush(self) -> Tensor:
        """Twice the L2's size: when it is written, nothing else is left there."""
        index = self.cuda.current_device()
        return self.make_buffer(2 * self.cuda.get_device_properties(index).L2_cache_size)

    def interruptions(self) -> int:
        return 0  # the GPU goes on with what is queued when Python loses the processor

    def available_bytes(self) -> float:
        self.cuda.empty_cache()  # what torch only keeps for later
        free, _ = self.cuda.mem_get_info()
        return free

    def measures_memory(self) -> bool:
        return True

    def peak_growth(self, call: Callable[[], object]) -> int:
        """Of the memory that torch's allocator has handed out, not of what it keeps."""
        gc.collect()
        self.synchronize()
        before = self.cuda.memory_allocated()
        self.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return self.cuda.max_memory_allocated() - before


CPU, CUDA = Device(), Cuda()
DEVICES = {device.name: device for device in (CPU, CUDA)}
