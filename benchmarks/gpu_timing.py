"""How a call is timed on a GPU, over :mod:`torch.cuda` or what stands in for it.

A call's kernels are measured by events around it. The call is queued while the GPU sleeps, so that
the time its launches take the CPU doesn't count, and after the GPU has read a buffer larger than
its L2, so that nothing of the call's data is there and nothing is left to be written back.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import cached_property
from itertools import repeat
from types import ModuleType

from torch import Tensor

SLEEP = 1e-3  # seconds: several times what it takes to queue most calls
LONGEST_SLEEP = 16e-3
CALIBRATION_CYCLES = 10**7  # a few milliseconds of sleep
WARM_UP_CALLS = 3  # before a capture: libraries and allocators prepare what no graph can hold


class GpuClock:
    """Measures single calls on the current GPU.

    Args:
        cuda: :mod:`torch.cuda`, or what stands in for it.
        make_buffer: returns so many bytes of the device's memory.
    """

    def __init__(self, cuda: ModuleType, make_buffer: Callable[[int], Tensor]) -> None:
        self.cuda, self.make_buffer = cuda, make_buffer

    def after_sleep(self, call: Callable[[], object], sleep: float) -> tuple[float, bool]:
        """The GPU's seconds for a call, and whether all of it was queued before the sleep ended."""
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
        slept = asleep.elapsed_time(start) * 1e-3  # from milliseconds
        return start.elapsed_time(end) * 1e-3, queueing < slept

    def capture(self, call: Callable[[], object]):
        """A graph of the call; raises where the call can't be captured."""
        graph, stream = self.cuda.CUDAGraph(), self._stream
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                call()
            self.cuda.synchronize()
            self.cuda.empty_cache()  # a capture can't free what is only kept for later
            gc.disable()  # a collection could free what must not be freed in a capture
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
        """The one that captures: the default stream can't, and memory is kept for each stream."""
        return self.cuda.Stream()

    @cached_property
    def _buffer(self) -> Tensor:
        """Four times the L2's size: when it has been read, nothing else is left there."""
        index = self.cuda.current_device()
        return self.make_buffer(4 * self.cuda.get_device_properties(index).L2_cache_size)

    @cached_property
    def _cycles_per_second(self) -> float:
        """The highest of some tries: the first may find the GPU at an idle one's clock rate."""
        return max(CALIBRATION_CYCLES / self._sleep_seconds() for _ in range(5))

    def _sleep_seconds(self) -> float:
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.cuda._sleep(CALIBRATION_CYCLES)
        end.record()
        self.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3


class KernelTimer:
    """Times the calls of one contender, with a sleep as long as their queueing needs.

    A call that waits for the GPU can't be queued behind any sleep. ``waits`` is True once even the
    longest was too short; its time then holds the launches that it makes after it has waited.
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
