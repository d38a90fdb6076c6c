"""Timing of calls on a GPU, with :mod:`torch.cuda` or a fake of it.

Events around a call measure its kernels. The call is queued while the GPU sleeps, so that the CPU's
launch time doesn't count, and after the GPU has read a buffer larger than its L2, so that the L2
holds none of the call's data and has nothing left to write back.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import cached_property
from itertools import repeat
from types import ModuleType

from torch import Tensor

SLEEP = 1e-3  # seconds: several times as long as most calls take to queue
LONGEST_SLEEP = 16e-3
CALIBRATION_CYCLES = 10**7  # a few milliseconds of sleep
WARM_UP_CALLS = 3  # before a capture: libraries and allocators prepare what a graph can't contain


class GpuClock:
    """Measures single calls on the current GPU.

    Args:
        cuda: :mod:`torch.cuda`, or a fake of it.
        make_buffer: allocates a number of bytes on the device.
    """

    def __init__(self, cuda: ModuleType, make_buffer: Callable[[int], Tensor]) -> None:
        self.cuda, self.make_buffer = cuda, make_buffer

    def after_sleep(self, call: Callable[[], object], sleep: float) -> tuple[float, bool]:
        """The GPU's seconds for a call, and whether it was all queued before the sleep ended."""
        asleep, start, end = (self.cuda.Event(enable_timing=True) for _ in range(3))
        cycles = int(sleep * self._cycles_per_second)
        self._buffer.sum()
        asleep.record()
        began = time.perf_counter()
        self.cuda._sleep(cycles)
        start.record()
        call()
        end.record()
        queueing = time.perf_counter() - began
        self.cuda.synchronize()
        slept = asleep.elapsed_time(start) * 1e-3  # milliseconds to seconds
        return start.elapsed_time(end) * 1e-3, queueing < slept

    def capture(self, call: Callable[[], object]):
        """A graph of the call; raises if it can't be captured."""
        graph, stream = self.cuda.CUDAGraph(), self._stream
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                call()
            self.cuda.synchronize()
            self.cuda.empty_cache()  # a capture can't free cached memory
            gc.disable()  # a collection could free memory that must not be freed in a capture
            try:
                graph.capture_begin()
                try:
                    call()
                finally:
                    graph.capture_end()
            finally:
                gc.enable()
        self.cuda.current_stream().wait_stream(stream)
        return graph

    @cached_property
    def _stream(self):
        """The capture stream: the default stream can't capture, and memory is cached per stream."""
        return self.cuda.Stream()

    @cached_property
    def _buffer(self) -> Tensor:
        """Four times the size of the L2: reading it evicts everything else."""
        index = self.cuda.current_device()
        return self.make_buffer(4 * self.cuda.get_device_properties(index).L2_cache_size)

    @cached_property
    def _cycles_per_second(self) -> float:
        """The highest of some tries: at the first one the GPU's clock may still be idling."""
        return max(CALIBRATION_CYCLES / self._sleep_seconds() for _ in range(5))

    def _sleep_seconds(self) -> float:
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.cuda._sleep(CALIBRATION_CYCLES)
        end.record()
        self.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3


class KernelTimer:
    """Times the calls of one contender, with a sleep as long as it takes to queue them.

    A call that waits for the GPU can't be queued during any sleep. ``waits`` is True once even the
    longest was too short; the time then includes the launches after the wait.
    """

    def __init__(self, clock: GpuClock) -> None:
        self.clock, self.sleep, self.waits = clock, SLEEP, False

    def __call__(self, call: Callable[[], object], count: int) -> float:
        return sum(self._seconds(call) for _ in repeat(None, count))

    def _seconds(self, call: Callable[[], object]) -> float:
        seconds, is_queued = self.clock.after_sleep(call, self.sleep)
        while not (is_queued or self.waits):
            self.waits = self.sleep >= LONGEST_SLEEP
            self.sleep = SLEEP if self.waits else 4 * self.sleep
            seconds, is_queued = self.clock.after_sleep(call, self.sleep)
        return seconds
