"""The documentation's page with a CPU's results."""

from __future__ import annotations

from itertools import groupby

from benchmarks.case import OURS
from benchmarks.page import facts_table, pictures
from benchmarks.results import best_ratio, is_disturbed, overall
from benchmarks.table import MODE_NAMES, amount, markdown_table, ratio_text, share_text, summary

# The makers' own spelling.
INSTRUCTION_SETS = {"default": "the generic kernels", "avx2": "AVX2", "avx512": "AVX-512"}

METHOD = """\
The contenders of a case take turns on fresh random data, and each time is the median over its
calls. Their results are checked against float64 first. "Ratio" is the best peer's time, or peak
memory, divided by fastnn's: above 1 fastnn is ahead. "Limit" is the share that fastnn reaches of
the best large float32 matrix product, or of a copy of as many bytes, in the same run.

A share can exceed 100 %, since the limit is a plain copy: SGD in float32 counts 20 bytes per
element but writes where it has read, and a copy of as many bytes (256 MiB at most) spans more
memory. The zeros of a large `nll_loss` gradient are counted but never written:
[Limits](limits.md)."""


def instruction_set(document: dict) -> str:
    """The name of the instruction set whose kernels ran."""
    return INSTRUCTION_SETS[document["machine"]["capability"]]


def cpu_page(document: dict, images: list[str]) -> str:
    """The whole page, in Markdown."""
    results = [result for result in document["results"] if best_ratio(result) is not None]
    parts = [
        f"# Results with {instruction_set(document)}",
        f"`{document['command']}` measured this.{_disturbed(document['results'])}",
        facts_table(document["machine"]),
        summary(results),
        *pictures(images),
        f"## How it was measured\n\n{METHOD}",
        f"## By operator\n\n{_overview(results)}",
        _losses(results),
        *_every_case(results),
    ]
    return "\n\n".join(parts) + "\n"


def _disturbed(results: list[dict]) -> str:
    count = sum(map(is_disturbed, results))
    if not count:
        return ""
    return f" Other programs took processor time in {count} of {len(results)} cases."


def _overview(results: list[dict]) -> str:
    """Per operator, mode and thread count: the number of cases, the mean, the worst."""

    def group(result: dict) -> tuple[str, str, int]:
        return result["op"], result["mode"], result["threads"]

    order = list(dict.fromkeys(result["op"] for result in results))
    groups: dict[tuple[str, str, int], list[dict]] = {}
    for result in sorted(results, key=lambda result: order.index(result["op"])):
        groups.setdefault(group(result), []).append(result)
    rows = []
    for (op, mode, threads), members in groups.items():
        facts = overall(members)
        rows.append(
            [
                op,
                MODE_NAMES[mode],
                str(threads),
                f"{facts['ahead']} of {facts['cases']}",
                f"{facts['geometric_mean']:.2f}x",
                f"{ratio_text(best_ratio(facts['worst']))}x ({facts['worst']['label']}, "
                f"{facts['worst']['dtype']})",
            ]
        )
    header = ["operator", "mode", "threads", "ahead", "geometric mean", "worst"]
    return markdown_table(header, rows, 2)


def _losses(results: list[dict]) -> str:
    """The cases in which a peer is ahead, worst first."""
    lost = sorted((result for result in results if best_ratio(result) < 1), key=best_ratio)
    if not lost:
        return "## Where a peer is ahead\n\nNo peer is ahead in any case."
    rows = [[result["op"], *_case_cells(result)] for result in lost]
    table = markdown_table(["operator", *CASE_HEADER], rows, 4)
    return f"## Where a peer is ahead\n\nIn {len(lost)} of {len(results)} cases:\n\n{table}"


CASE_HEADER = ("case", "dtype", "mode", "threads", "fastnn", "best peer", "ratio", "limit")


def _case_cells(result: dict) -> list[str]:
    best, ratio = result["contenders"][result["best"]], best_ratio(result)
    other = "" if best["same_algorithm"] else ", another algorithm"
    inference = "" if best["trainable"] else ", computes no gradients"
    return [
        result["label"],
        result["dtype"],
        MODE_NAMES[result["mode"]],
        str(result["threads"]),
        amount(result["contenders"][OURS]["median"], result["unit"]),
        f"{amount(best['median'], result['unit'])} ({result['best']}{other}{inference})",
        f"{ratio_text(ratio)}x" if ratio >= 1 else f"**{ratio_text(ratio)}x**",
        share_text(result),
    ]


def _every_case(results: list[dict]) -> list[str]:
    """A table for each operator."""
    order = list(dict.fromkeys(result["op"] for result in results))
    ordered = sorted(results, key=lambda result: order.index(result["op"]))
    return [
        f"## {op}\n\n{markdown_table(CASE_HEADER, list(map(_case_cells, rows)), 3)}"
        for op, rows in groupby(ordered, key=lambda result: result["op"])
    ]
