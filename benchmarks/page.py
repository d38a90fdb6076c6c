"""The page of the documentation that shows the results of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.case import OURS
from benchmarks.results import best_ratio, best_rival, key
from benchmarks.table import (
    MODE_NAMES,
    MORE_TIMES,
    amount,
    markdown_table,
    ratio_text,
    share_text,
    summary,
)

# The facts that the page shows, by their names in the document and on the page.
FACTS = {
    "gpu": "card",
    "gpu memory": "memory",
    "gpu L2": "L2",
    "gpu multiprocessors": "multiprocessors",
    "gpu driver": "driver",
    "torch": "torch",
    "capability of torch": "torch's kernels",
    "fastnn": "fastnn",
    "capability": "fastnn's kernels",
    "python": "Python",
    "os": "system",
    "cpu": "processor",
    "processors": "processors",
    "date": "date",
}
PRODUCTS = {"float32": "float32", "tf32": "TF32", "bfloat16": "bfloat16"}
ALT = {
    "ratio": "Dots: the best peer's time or memory divided by fastnn's, a row for each operator",
    "share": "Dots: the share of the machine's limit that fastnn reaches, a row for each operator",
}
# Marks the time of a call that waits for the GPU.
WAITS = "°"

METHOD = """\
The contenders of a case take turns, and each time is the median over its calls. Before each call
the GPU reads four times its L2, so that the call finds none of its data there; then the GPU sleeps
until the call is queued, so that the time the CPU takes to launch it doesn't count. "Loop" is the
time per call of a loop of calls, which is what an eager training loop waits for, and "graph" that
of a loop of replays of a CUDA graph. Loops find their data in the L2 where it fits. A call that
waits for the GPU has no graph, and its time (°) includes the launches after the wait. "Ratio" is
the contender's GPU time divided by fastnn's: above 1 fastnn is ahead. "Limit" is the share that
fastnn reaches of the best large matrix product, or of a copy of as many bytes. The results of
every contender were compared with float64's before it was timed."""


def page(document: dict, images: Sequence[str]) -> str:
    """The whole page, in Markdown."""
    results = document["results"]
    parts = [
        f"# Results on a GPU: {document['machine']['gpu']}",
        f"`{document['command']}` measured this.",
        facts_table(document["machine"]),
        summary([result for result in results if best_ratio(result) is not None]),
        *pictures(images),
        f"## How it was measured\n\n{METHOD}",
        _limits(document["limits"]),
        _losses(results),
        *_operators(results),
        _missing(document),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def pictures(images: Sequence[str]) -> list[str]:
    """The figures of a run, with alternative texts."""
    return [f"![{ALT[Path(image).stem.rsplit('_')[-1]]}]({image})" for image in images]


def facts_table(machine: dict) -> str:
    """The facts about the machine and the versions."""
    rows = [[name, machine[fact]] for fact, name in FACTS.items() if fact in machine]
    return markdown_table(["what", "which"], rows, 2)


def _limits(limits: dict) -> str:
    """The rates that the card reached with simple work."""
    found = next((rates for rates in limits.values() if rates), None)
    if found is None:
        return ""
    rows = [
        [f"{name} matrix product", f"{found['gemm'][dtype] / 1e12:.1f} TFLOP/s"]
        for dtype, name in PRODUCTS.items()
        if dtype in found["gemm"]
    ]
    rows += [
        [f"copy that moves {int(size) / 2**20:.0f} MiB", f"{rate / 1e9:.0f} GB/s"]
        for size, rate in found["copy"].items()
    ]
    if "launch" in found:
        rows.append(
            ["launch of an empty kernel", amount(1 / found["launch"]["kernels"], "seconds")]
        )
    return f"## Limits\n\n{markdown_table(['what', 'reached'], rows, 1)}"


def _losses(results: list[dict]) -> str:
    """The cases in which a peer is ahead in any of the three times, worst first."""
    found = [
        (ratio, [key(result), time, _named(result, peer), f"**{ratio_text(ratio)}x**"])
        for result in results
        for time, (peer, ratio) in _rivals(result).items()
        if ratio < 1
    ]
    if not found:
        return "## Where a peer is ahead\n\nNo peer is ahead in any case."
    rows = [row for _, row in sorted(found, key=lambda pair: pair[0])]
    table = markdown_table(["case", "time", "best peer", "best peer / fastnn"], rows, 3)
    return f"## Where a peer is ahead\n\n{table}"


def _rivals(result: dict) -> dict[str, tuple[str, float]]:
    """The best peer and its ratio, for each kind of time that the case has."""
    rivals = {heading: best_rival(result, time) for time, heading in MORE_TIMES.items()}
    first = "peak memory" if result["mode"] == "memory" else "GPU"
    if result["best"] is not None:
        rivals[first] = result["best"], best_ratio(result)
    return {time: rival for time, rival in rivals.items() if rival is not None}


def _operators(results: list[dict]) -> list[str]:
    """A table for each operator, with a row for each contender."""
    order = list(dict.fromkeys(result["op"] for result in results))
    ordered = sorted(results, key=lambda result: order.index(result["op"]))
    more = MORE_TIMES.values()
    header = ["case", "dtype", "mode", "contender", "GPU", *more, "ratio", "limit"]
    return [
        f"## {op}\n\n" + markdown_table(header, [row for one in rows for row in _rows(one)], 4)
        for op, rows in groupby(ordered, key=lambda result: result["op"])
    ]


def _rows(result: dict) -> list[list[str]]:
    names = [OURS, *sorted(result["ratios"], key=result["ratios"].__getitem__)]
    return [_row(result, name) for name in names]


def _row(result: dict, name: str) -> list[str]:
    contender, is_ours = result["contenders"][name], name == OURS
    case = [result["label"], result["dtype"], MODE_NAMES[result["mode"]]]
    ratio = None if is_ours else result["ratios"][name]
    return [
        *(case if is_ours else [""] * len(case)),
        _named(result, name),
        amount(contender["median"], result["unit"]) + (WAITS if contender.get("waits") else ""),
        *(amount(contender[time], "seconds") if time in contender else "" for time in MORE_TIMES),
        "" if ratio is None else _ratio(ratio),
        share_text(result) if is_ours else "",
    ]


def _named(result: dict, contender: str) -> str:
    trainable = result["contenders"][contender]["trainable"]
    return contender + ("" if trainable else ", computes no gradients")


def _ratio(ratio: float) -> str:
    text = f"{ratio_text(ratio)}x"
    return text if ratio >= 1 else f"**{text}**"


def _missing(document: dict) -> str:
    """What has no time, and the reason."""
    lines = [*document.get("complaints", []), *_reasons(document["results"])]
    if not lines:
        return ""
    return "## What is missing\n\n" + "\n".join(f"- {line}" for line in lines)


def _reasons(results: list[dict]) -> list[str]:
    """One line per contender and reason, with the number of cases."""
    cases: dict[tuple[str, str], list[str]] = {}
    for result in results:
        missing = dict(result["skipped"])
        for name, one in result["contenders"].items():
            if "no_replay" in one:
                missing[f"the graph of {name}"] = one["no_replay"]
        for reason in missing.items():
            cases.setdefault(reason, []).append(key(result))
    return [
        f"{name} ({reason}): {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        for (name, reason), keys in cases.items()
    ]
