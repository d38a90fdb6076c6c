"""benchmarks.timing: contenders in turn, on fresh inputs, after a warm-up."""

from __future__ import annotations

import random

import pytest

from benchmarks.timing import Plan, Summary, measure, summarise
from support.benchmark_fakes import PLAN

pytestmark = pytest.mark.cpu_only("the benchmarks")


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
    assert len(log) == PLAN.min_rounds + 1  # plus one call to warm up


def test_measure_warms_up_before_each_sample_of_quick_calls():
    _, log = measure_fakes({"a": 1e-3, "b": 1e-3})
    counts = [count for _, count, _ in log]
    assert counts[-8:] == [1, 10] * 4


def test_measure_counts_the_interruptions_of_each_contenders_samples():
    interrupted = iter(range(10**6))  # one more at each query
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
