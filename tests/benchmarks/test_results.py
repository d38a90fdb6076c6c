"""benchmarks.results: ratios, shares of the limit, and the best peer."""

from __future__ import annotations

import pytest

from benchmarks import limits, results
from benchmarks.case import Work
from support.benchmark_fakes import LIMITS, LOST, WON, make_document, make_result

pytestmark = pytest.mark.cpu_only("the benchmarks")


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
    # Compared with the next larger copy, or with the largest if none is larger.
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
    assert facts["geometric_mean"] == pytest.approx(1.0)  # the mean of 2 and 0.5
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
