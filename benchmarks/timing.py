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

WARM_UP = 0.1  # of the time to be measured
DRAWING = 0.25  # the drawing of fresh inputs may take so much of the time measured

#: Makes as many calls as it is told and returns the seconds that they took.
Sampler = Callable[[int], float]


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    seconds: float  # timed, per contender
    sample_seconds: float  # one sample, about: far above the clock's own 0.1 us
    min_rounds: int  # where one call alone takes long
    # A call that takes so many seconds needs none to warm it up: it runs through all caches.
    long_call: float = 0.1


FULL = Plan(seconds=1.0, sample_seconds=1e-3, min_rounds=7)
QUICK = Plan(seconds=0.15, sample_seconds=3e-4, min_rounds=3)


@dataclass(frozen=True)
class Summary:
    """One contender's samples, in seconds per call or in bytes: median, quartiles, the least."""

    median: float
    low: float
    high: float
    least: float
    samples: int
    # How often a second the system took the processor away: only another program's threads make
    # it do so, a sign that the times are not to be trusted.
    interruptions: float = 0.0

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def summarise(samples: Sequence[float], interruptions: float = 0.0) -> Summary:
    """The median, not the mean: an interruption lengthens a few samples a lot."""
    if len(samples) == 1:
        return Summary(*list(samples) * 4, 1, interruptions)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(median, low, high, min(samples), len(samples), interruptions)


def involuntary_switches() -> int:
    """How often the system took the processor from this process's threads; 0 where it can't say."""
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
        draw: makes fresh inputs and returns each contender's sampler over them.
        plan: how long.
        rng: shuffles the order in each round, so that nobody always follows the same neighbour.
        clock: what the drawing of inputs is timed with.
        switches: how often this process has been interrupted so far.
    """
    samplers, drawing = _timed(draw, clock)
    call_seconds = {name: _warm_up(sampler, plan) for name, sampler in samplers.items()}
    counts = {name: max(1, round(plan.sample_seconds / s)) for name, s in call_seconds.items()}
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    switched, timed = dict.fromkeys(samplers, 0), dict.fromkeys(samplers, 0.0)
    rounds = 0
    gc.collect()
    gc.disable()  # as timeit does: a collection would hit whoever's turn it is
    try:
        while rounds < plan.min_rounds or sum(timed.values()) < plan.seconds * len(samplers):
            # Fresh inputs in each round, unless making them would take too much of the time.
            if rounds and drawing <= DRAWING * sum(timed.values()):
                samplers, seconds = _timed(draw, clock)
                drawing += seconds
            order = list(samplers)
            rng.shuffle(order)
            for name in order:
                if call_seconds[name] < plan.long_call:
                    # Not counted: brings inputs, code and the allocator's free blocks back into
                    # the caches that the one before has used.
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
    """Calls until the plan's warm-up has passed; returns the seconds that one call takes."""
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
