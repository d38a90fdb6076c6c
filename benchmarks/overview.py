"""What the README and the documentation show about all runs: a picture and a small table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.cpu_page import instruction_set
from benchmarks.plots import draw_rows, ratio_axis
from benchmarks.results import best_ratio, geometric_mean, overall
from benchmarks.table import markdown_table, ratio_text, threads_text


class Row(NamedTuple):
    """A row of the table: an operator, a mode, and PyTorch's eager contenders."""

    op: str
    mode: str
    stock: tuple[str, ...]


_SGD = ("SGD", "SGD foreach", "SGD fused")
ROWS = (
    Row("linear_relu", "forward_backward", ("F.relu(F.linear)",)),
    Row("mlp", "forward_backward", ("torch",)),
    Row("cross_entropy", "forward_backward", ("F.cross_entropy",)),
    Row("linear + cross_entropy", "forward_backward", ("F.linear, F.cross_entropy",)),
    Row("log_softmax", "forward_backward", ("F.log_softmax",)),
    Row("SGD momentum", "step", _SGD),
    Row("MLP step", "step", ("torch", "torch, SGD fused")),
    Row("train_step", "step", ("torch", "torch, SGD fused")),
)
#: Turns a file's path from the repository's root into a link.
Link = Callable[[str], str]


def section(documents: dict[str, dict], pages: dict[str, str], picture: str, link: Link) -> str:
    """The section in Markdown.

    Args:
        documents: the runs by name, one per instruction set.
        pages: the pages of these runs.
        picture: the picture's file.
        link: turns a file's path into the section's link to it.
    """
    sets = {name: instruction_set(document) for name, document in documents.items()}
    runs = ", ".join(f"[{sets[name]}]({link(pages[name])})" for name in documents)
    return "\n\n".join(
        [
            f"![{_alt(documents)}]({link(picture)})",
            "How many times as long others take for forward and backward, or for a step: geometric "
            "mean over all sizes, dtypes and thread counts, and the worst case. Every case: "
            f"{runs}.",
            _table(list(documents.values())),
            _peers(documents, pages, link),
            machines(list(documents.values())),
        ]
    )


def draw_picture(documents: Sequence[dict], path: Path) -> None:
    """Draws the table's cases, with a colour for each run."""
    series = {
        instruction_set(document): [
            (row.op, best_ratio(result)) for row in ROWS for result in _cases(document, row)
        ]
        for document in documents
    }
    draw_rows(series, "The fastest alternative's time / fastnn's", ratio_axis, path)


def _cases(document: dict, row: Row) -> list[dict]:
    return [
        result
        for result in document["results"]
        if (result["op"], result["mode"]) == (row.op, row.mode) and best_ratio(result) is not None
    ]


def _alt(documents: dict[str, dict]) -> str:
    sets = " and ".join(map(instruction_set, documents.values()))
    return f"Dots: the fastest alternative's time divided by fastnn's, by operator, with {sets}"


def _table(documents: Sequence[dict]) -> str:
    sets = list(map(instruction_set, documents))
    header = ["", *(f"eager PyTorch, {name}" for name in sets)]
    header += [f"fastest peer, {name} (worst)" for name in sets]
    rows = []
    for row in ROWS:
        cases = [_cases(document, row) for document in documents]
        if any(cases):
            cells = [*(_eager(of_run, row.stock) for of_run in cases), *map(_fastest, cases)]
            rows.append([row.op, *cells])
    return markdown_table(header, rows, 1)


def _eager(results: list[dict], stock: Sequence[str]) -> str:
    """The mean ratio to the fastest of PyTorch's eager contenders."""
    of_stock = [
        [ratio for name, ratio in result["ratios"].items() if name in stock] for result in results
    ]
    fastest = [min(ratios) for ratios in of_stock if ratios]
    return f"{geometric_mean(fastest):.2f}x" if fastest else ""


def _fastest(results: list[dict]) -> str:
    facts = overall(results)
    if facts is None:
        return ""
    return f"{facts['geometric_mean']:.2f}x ({ratio_text(best_ratio(facts['worst']))}x)"


def _peers(documents: dict[str, dict], pages: dict[str, str], link: Link) -> str:
    """The number of cases in which a peer is ahead, and the most frequent peers."""
    counts, ahead = [], Counter()
    for name, document in documents.items():
        compared = [result for result in document["results"] if best_ratio(result) is not None]
        lost = [result for result in compared if best_ratio(result) < 1]
        ahead.update(result["best"].split(",")[0] for result in lost)
        page = f"{link(pages[name])}#where-a-peer-is-ahead"
        cases = f"{len(lost)} of {len(compared)} cases with {instruction_set(document)}"
        counts.append(f"[{cases}]({page})")
    which = ", ".join(f"`{peer}` ({count})" for peer, count in ahead.most_common(4))
    most = f", most often {which}" if which else ""
    return f"A peer is ahead in {' and in '.join(counts)}{most}."


def machines(documents: Sequence[dict]) -> str:
    """The machine of each run; runs on the same machine share a line."""
    machines: dict[str, list[str]] = {}
    for document in documents:
        facts = document["machine"]
        threads = dict.fromkeys(threads_text(result["threads"]) for result in document["results"])
        where = f"{facts['cpu']}, {' and '.join(threads)}, torch {facts['torch']}"
        machines.setdefault(where, []).append(f"{instruction_set(document)} on {facts['date']}")
    lines = [f"{where} ({', '.join(runs)})" for where, runs in machines.items()]
    return f"Measured on {'; '.join(lines)}, all contenders in turns, medians."
