"""Interleaved timing: short samples of all contenders in turn, on fresh data, after a warm-up."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

try:
    import resource
except ImportError:  # not on Windows
    resource = None

WARM_UP = 0.1  # as a share of the time to be measured
DRAWING = 0.25  # the largest share of the measured time for drawing fresh inputs

#: Makes a number of calls and returns the seconds that they took.
Sampler = Callable[[int], float]


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    seconds: float  # timed, per contender
    sample_seconds: float  # approximate; far above the clock's resolution of 0.1 us
    min_rounds: int  # used when a single call takes long
    # A call that takes this many seconds needs no warm-up: it goes through all caches.
    long_call: float = 0.1


FULL = Plan(seconds=1.0, sample_seconds=1e-3, min_rounds=7)
QUICK = Plan(seconds=0.15, sample_seconds=3e-4, min_rounds=3)


@dataclass(frozen=True)
class Summary:
    """One contender's samples, in seconds per call or in bytes: median, quartiles, minimum."""

    median: float
    low: float
    high: float
    least: float
    samples: int
    # Involuntary context switches per second: only other programs' threads cause them, so they mean
    # that the times can't be trusted.
    interruptions: float = 0.0

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def summarise(samples: Sequence[float], interruptions: float = 0.0) -> Summary:
    """Summarises by the median, because an interruption lengthens a few samples a lot."""
    if len(samples) == 1:
        return Summary(*list(samples) * 4, 1, interruptions)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(median, low, high, min(samples), len(samples), interruptions)


def involuntary_switches() -> int:
    """How often the system preempted this process's threads; 0 if unknown."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


def measure(
    draw: Callable[[], Mapping[str, Sampler]],
    plan: Plan,
    rng: random.Random,
    clock: Callable[[], float] = time.perf_counter,
    switches: Callable[[], int] = involuntary_switches,
) -> dict[str, Summary]:
    """Times all contenders in turn.

    Args:
        draw: makes fresh inputs and returns a sampler for each contender.
        plan: how long to measure.
        rng: shuffles the order in each round, so that a contender's predecessor varies.
        clock: times the drawing of inputs.
        switches: counts this process's interruptions so far.
    """
    samplers, drawing = _timed(draw, clock)
    call_seconds = {name: _warm_up(sampler, plan) for name, sampler in samplers.items()}
    counts = {name: max(1, round(plan.sample_seconds / s)) for name, s in call_seconds.items()}
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    switched, timed = dict.fromkeys(samplers, 0), dict.fromkeys(samplers, 0.0)
    rounds = 0
    gc.collect()
    gc.disable()  # as timeit does: a collection would hit an arbitrary contender
    try:
        while rounds < plan.min_rounds or sum(timed.values()) < plan.seconds * len(samplers):
            # Fresh inputs in each round, unless drawing them takes too much of the time.
            if rounds and drawing <= DRAWING * sum(timed.values()):
                samplers, seconds = _timed(draw, clock)
                drawing += seconds
            order = list(samplers)
            rng.shuffle(order)
            for name in order:
                if call_seconds[name] < plan.long_call:
                    # Untimed: brings inputs, code and free blocks back into the caches.
                    samplers[name](1)
                before = switches()
                seconds = samplers[name](counts[name])
                switched[name] += switches() - before
                samples[name].append(seconds / counts[name])
                timed[name] += seconds
            rounds += 1
    finally:
        gc.enable()
    return {
        name: summarise(values, switched[name] / max(timed[name], 1e-9))
        for name, values in samples.items()
    }


def _timed(draw: Callable[[], Mapping[str, Sampler]], clock: Callable[[], float]):
    start = clock()
    samplers = draw()
    return samplers, clock() - start


def _warm_up(sampler: Sampler, plan: Plan) -> float:
    """Calls until the plan's warm-up has passed; returns the seconds per call."""
    seconds = spent = sampler(1)
    count = 1
    while seconds / count < plan.long_call:
        seconds = sampler(count)
        spent += seconds
        if spent >= plan.seconds * WARM_UP:
            break
        if seconds < plan.sample_seconds:
            count *= 2
    return max(seconds / count, 1e-9)
