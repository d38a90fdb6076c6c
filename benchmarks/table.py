"""The results as text: a table per operator and thread count, and a summary line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from benchmarks.case import OURS
from benchmarks.results import best_ratio, best_rival, gpu, is_disturbed, key, overall

MODE_NAMES = {
    "forward": "fwd",
    "forward_backward": "fwd+bwd",
    "step": "step",
    "call": "call",
    "memory": "peak mem",
}
# Further times in a GPU's results, and their columns' headings.
MORE_TIMES = {"loop": "loop", "replay": "graph"}
TEXT_COLUMNS = 3  # left-aligned; numbers are right-aligned
RED, PLAIN = "\033[31m", "\033[0m"


def format_document(document: dict, colour: bool = False) -> str:
    """All tables, grouped by operator, then the summary."""
    results = document["results"]
    groups = list(dict.fromkeys(_group(result) for result in results))
    ordered = sorted(results, key=lambda result: groups.index(_group(result)))
    where = gpu(document)
    tables = [_format_group(list(rows), where, colour) for _, rows in groupby(ordered, key=_group)]
    return "\n\n".join([*tables, *_legend(results), *_disturbed(results), summary(results)])


def _group(result: dict) -> tuple[str, int]:
    return result["op"], result["threads"]


def _format_group(rows: list[dict], where: Sequence[str], colour: bool) -> str:
    peers = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    more = [name for name in MORE_TIMES if any(name in row["contenders"][OURS] for row in rows)]
    header = ["", "dtype", "mode", OURS, "spread", "rate", "of limit"]
    header += [*(_heading(peer, rows) for peer in peers), "best peer", *map(MORE_TIMES.get, more)]
    lines = [header, *(_cells(row, peers, more) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [_align(line, widths) for line in lines]
    if colour:
        slower = [False, *(is_slower(row) for row in rows)]
        text = [
            f"{RED}{line}{PLAIN}" if red else line for line, red in zip(text, slower, strict=True)
        ]
    title = ", ".join([rows[0]["op"], *where, threads_text(rows[0]["threads"])])
    return "\n".join([title, *text, *_left_out(rows)])


def _align(cells: list[str], widths: list[int]) -> str:
    aligned = [
        cell.ljust(width) if column < TEXT_COLUMNS else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return ("  " + "  ".join(aligned)).rstrip()


def _heading(peer: str, rows: list[dict]) -> str:
    facts = next(row["contenders"][peer] for row in rows if peer in row["contenders"])
    return peer + ("" if facts["trainable"] else "*") + ("" if facts["same_algorithm"] else "+")


def _cells(row: dict, peers: list[str], more: list[str]) -> list[str]:
    ours, best = row["contenders"][OURS], best_ratio(row)
    return [
        row["label"],
        row["dtype"],
        MODE_NAMES[row["mode"]],
        amount(ours["median"], row["unit"]),
        spread(ours),
        rate_text(row),
        share_text(row),
        *(ratio_text(row["ratios"][peer]) if peer in row["ratios"] else "" for peer in peers),
        "" if best is None else f"{ratio_text(best)} {'!' if best < 1 else ' '}",
        *(more_text(row, name) for name in more),
    ]


def more_text(row: dict, time: str) -> str:
    """fastnn's time of this kind, and the best peer's time over it."""
    ours, rival = row["contenders"][OURS].get(time), best_rival(row, time)
    texts = ["" if ours is None else amount(ours, "seconds")]
    return " ".join(texts if rival is None else [*texts, ratio_text(rival[1])])


def is_slower(row: dict) -> bool:
    """Whether any peer is ahead of fastnn."""
    best = best_ratio(row)
    return best is not None and best < 1


def amount(value: float, unit: str) -> str:
    """A time in us or ms, or memory in MiB."""
    if unit == "bytes":
        return f"{value / 2**20:.1f} MiB"
    return f"{value * 1e6:.1f} us" if value < 1e-3 else f"{value * 1e3:.2f} ms"


def ratio_text(ratio: float) -> str:
    """Rounded down, so that nothing below 1 reads 1.00."""
    return f"{math.floor(ratio * 100) / 100:.2f}"


def spread(contender: dict) -> str:
    """Half the interquartile range relative to the median."""
    if contender["median"] == 0:
        return ""
    share = (contender["high"] - contender["low"]) / 2 / contender["median"]
    return f"±{share:.0%}" if share < 10 else ">±999%"


def rate_text(row: dict) -> str:
    """GFLOP/s or GB/s."""
    if row["rate"] is None:
        return ""
    return f"{row['rate'] / 1e9:.1f} {'GFLOP/s' if row['work']['flops'] else 'GB/s'}"


def share_text(row: dict) -> str:
    """The share of the machine's limit."""
    return "" if row["share"] is None else f"{row['share']:.0%}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """A Markdown table whose first columns are text and the rest numbers."""
    rule = ["---" if column < text_columns else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def threads_text(threads: int) -> str:
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


def _left_out(rows: list[dict]) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["skipped"].items():
            reasons.setdefault((name, reason), []).append(key(row).removeprefix(row["op"]).strip())
    return [
        f"  left out: {name} ({reason}){_where(keys, rows)}"
        for (name, reason), keys in reasons.items()
    ]


def _where(keys: list[str], rows: list[dict]) -> str:
    if len(keys) == len(rows):
        return ""
    return f" at {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")


def _legend(results: list[dict]) -> list[str]:
    contenders = [facts for row in results for facts in row["contenders"].values()]
    lines = [
        "The peers' columns: the peer's time or memory / fastnn's; below 1 (!) the peer is ahead."
    ]
    if any("loop" in facts for facts in contenders):
        lines.append(
            "loop, graph: fastnn's time per call in a loop of calls and of a CUDA graph's replays, "
            "and the best peer's divided by it."
        )
    waiting = sorted({n for row in results for n, f in row["contenders"].items() if f.get("waits")})
    if waiting:
        lines.append(f"Waits for the GPU within a call somewhere: {', '.join(waiting)}.")
    if not all(facts["trainable"] for facts in contenders):
        lines.append("* computes no gradients")
    if not all(facts["same_algorithm"] for facts in contenders):
        lines.append("+ another algorithm, for the larger problem as a whole")
    return ["\n".join(lines)] if results else []


def _disturbed(results: list[dict]) -> list[str]:
    count = sum(map(is_disturbed, results))
    if not count:
        return []
    return [
        f"Other programs took processor time in {count} of {len(results)} cases: with several "
        "threads above all, such times say little. Measure again on an idle machine."
    ]


def summary(results: list[dict]) -> str:
    """One line: in how many cases fastnn is ahead of the best peer, the mean, the worst."""
    facts = overall(results)
    if facts is None:
        return "Nothing to compare."
    worst = facts["worst"]
    return (
        f"fastnn is ahead of the best peer in {facts['ahead']} of {facts['cases']} cases; "
        f"geometric mean {facts['geometric_mean']:.2f}x, worst {ratio_text(best_ratio(worst))}x "
        f"({key(worst)}, {threads_text(worst['threads'])}, against {worst['best']})."
    )
