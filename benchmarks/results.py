"""The document of results, and what is computed from it; plain dicts, as in JSON.

A document is ``{"machine": facts, "command": ..., "limits": {threads: rates}, "results": [...],
"complaints": [...]}``; the complaints are about cases without a result.

A result is one case at one thread count: its names, ``work``, the measurements of each contender
(``contenders``: name to median, quartiles and number of samples; in seconds, or bytes in memory
mode), the contenders left out with the reason (``skipped``), the total seconds (``elapsed``), and
the values that :func:`complete` adds. On a GPU a contender also has ``loop`` and ``replay``, the
seconds per call of a loop of calls and of a graph's replays, or ``no_replay``, the reason for a
missing one; ``waits`` says whether its calls wait for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from benchmarks.case import OURS, Work
from benchmarks.limits import limit_for

SCHEMA = 1
MIB = 2**20
# An idle machine interrupts a process a few times a second, a busy one a hundred times or more.
DISTURBED = 30


def complete(result: dict, limits: dict | None) -> dict:
    """Adds the ratios, the rate and its share of the limit.

    Variants of fastnn ("fastnn tiled") are compared, but are not peers.
    """
    contenders = result["contenders"]
    peers = {name: peer for name, peer in contenders.items() if name != OURS}
    ours = _compared(contenders[OURS], result["unit"])
    ratios = {name: _compared(peer, result["unit"]) / ours for name, peer in peers.items()}
    rivals = {name: ratio for name, ratio in ratios.items() if not name.startswith(f"{OURS} ")}
    work = Work(**result["work"])
    limit = limit_for(work, result["dtype"], limits) if limits else None
    rate = (work.flops or work.bytes) / ours if result["unit"] == "seconds" else 0.0
    return result | {
        "ratios": ratios,
        "best": _smallest(rivals),
        "best_trainable": _smallest(
            {name: ratio for name, ratio in rivals.items() if peers[name]["trainable"]}
        ),
        "rate": rate or None,
        "share": rate / limit if limit and rate else None,
    }


def gpu(document: dict) -> list[str]:
    """The GPU's name as a list of one, if the results are a GPU's; else an empty list."""
    machine = document["machine"]
    return [machine["gpu"]] if "gpu" in machine else []


def _compared(contender: dict, unit: str) -> float:
    """The median; memory in whole MiB and at least one, since unrelated pages come and go."""
    median = contender["median"]
    return median if unit == "seconds" else max(1, round(median / MIB))


def _smallest(ratios: dict[str, float]) -> str | None:
    return min(ratios, key=ratios.__getitem__, default=None)


def best_rival(result: dict, time: str) -> tuple[str, float] | None:
    """The best peer by ``loop`` or ``replay``, and its time over fastnn's; None without a peer."""
    times = {name: one[time] for name, one in result["contenders"].items() if time in one}
    peers = {name: seconds for name, seconds in times.items() if not name.startswith(OURS)}
    if OURS not in times or not peers:
        return None
    best = _smallest(peers)
    return best, peers[best] / times[OURS]


def best_ratio(result: dict) -> float | None:
    """The ratio to the best peer; None without a peer."""
    return None if result["best"] is None else result["ratios"][result["best"]]


def is_disturbed(result: dict) -> bool:
    """Whether other programs took processor time while the case was measured."""
    return result["contenders"][OURS]["interruptions"] > DISTURBED


def geometric_mean(ratios: Iterable[float]) -> float:
    """A mean in which twice as fast and half as fast cancel."""
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logarithms) / len(logarithms))


def key(result: dict) -> str:
    """The case's name, as in ``--filter``."""
    return " ".join(result[name] for name in ("op", "label", "dtype", "mode"))


def overall(results: list[dict]) -> dict | None:
    """Number of cases, number ahead, geometric mean and worst case; None if nothing compares."""
    compared = [result for result in results if best_ratio(result) is not None]
    if not compared:
        return None
    ratios = [best_ratio(result) for result in compared]
    return {
        "cases": len(ratios),
        "ahead": sum(ratio >= 1 for ratio in ratios),
        "geometric_mean": geometric_mean(ratios),
        "worst": min(compared, key=best_ratio),
    }
