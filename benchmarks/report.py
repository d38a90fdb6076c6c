"""Writes the README's section of results from a saved run, or a GPU's page of the documentation.

python -m benchmarks.report FILE.json --readme README.md --plots DIR
python -m benchmarks.report FILE.json --page docs/performance_cuda.md
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.case import OURS
from benchmarks.page import page
from benchmarks.plots import MissingMatplotlib, draw
from benchmarks.results import SCHEMA, best_ratio, gpu, is_disturbed, overall
from benchmarks.table import (
    MODE_NAMES,
    amount,
    markdown_table,
    ratio_text,
    share_text,
    summary,
    threads_text,
)

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


class ReportError(Exception):
    """The report can't be written; the message is one sentence for the user."""


def replace_section(text: str, section: str) -> str:
    """The text with the section between the two markers, which stay."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReportError(f"the readme needs one {BEGIN} and after it one {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section.strip()}\n{END}{rest.split(END)[1]}"


def markdown(document: dict, images: Sequence[str]) -> str:
    """The section: what was measured where, a row per operator, every case, the losses first."""
    results = [result for result in document["results"] if best_ratio(result) is not None]
    parts = [
        _provenance(document),
        summary(results),
        *(f"![{Path(image).stem}]({image})" for image in images),
        _overview(results),
        _losses(results),
        _every_case(results),
    ]
    return "\n\n".join(part for part in parts if part)


def _provenance(document: dict) -> str:
    machine = document["machine"]
    threads = list(dict.fromkeys(result["threads"] for result in document["results"]))
    hardware = ", ".join([*gpu(document), machine["cpu"]])
    return (
        f"Measured on {machine['date']} with `{document['command']}`: {hardware} "
        f"({machine['processors']} processors; {' and '.join(map(threads_text, threads))}), "
        f"{machine['os']}, torch {machine['torch']} ({machine['capability of torch']}), "
        f"fastnn {machine['fastnn']} ({machine['capability']} kernels). Ratios are the best peer's "
        "time (or peak memory) divided by fastnn's: above 1 fastnn is ahead. The limit is the best "
        "large float32 matrix product, or a copy of as many bytes, of the same run."
        + _disturbed(document["results"])
    )


def _disturbed(results: list[dict]) -> str:
    count = sum(map(is_disturbed, results))
    if not count:
        return ""
    return f" Other programs took processor time in {count} of {len(results)} cases."


def _overview(results: list[dict]) -> str:
    """Per operator, mode and thread count: how many cases, the mean, the worst."""

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
    """Where a peer is ahead, worst first."""
    lost = sorted((result for result in results if best_ratio(result) < 1), key=best_ratio)
    if not lost:
        return "No peer is ahead in any case."
    rows = [[result["op"], *_case_cells(result)] for result in lost]
    table = markdown_table(["operator", *CASE_HEADER], rows, 4)
    return _details(f"Where a peer is ahead: {len(lost)} of {len(results)} cases", table)


CASE_HEADER = ("case", "dtype", "mode", "threads", "fastnn", "best peer", "ratio", "of limit")


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


def _every_case(results: list[dict]) -> str:
    """A folded table per operator."""
    order = list(dict.fromkeys(result["op"] for result in results))
    ordered = sorted(results, key=lambda result: order.index(result["op"]))
    return "\n\n".join(
        _details(f"All cases: {op}", markdown_table(CASE_HEADER, list(map(_case_cells, rows)), 3))
        for op, rows in groupby(ordered, key=lambda result: result["op"])
    )


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def read_document(path: Path) -> dict:
    """A document that ``python -m benchmarks --json`` has written."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ReportError(f"{path} can't be read: {error.strerror}") from None
    except ValueError:
        document = None
    if not (
        isinstance(document, dict)
        and document.get("schema") == SCHEMA
        and {"machine", "command", "limits"} <= document.keys()
        and document.get("results")
    ):
        raise ReportError(f"{path} holds no results of this version of the benchmarks")
    return document


def write_readme(document: dict, readme: Path, plots: Path | None) -> None:
    """Replaces the readme's section."""
    if gpu(document):
        raise ReportError("the readme shows the results of a CPU; --page writes those of a GPU")
    if not readme.is_file():
        raise ReportError(f"{readme} is not a file")
    text = readme.read_text()
    replace_section(text, "")  # complains before anything is drawn
    images = _images(document, plots, readme.parent)
    readme.write_text(replace_section(text, markdown(document, images)))


def write_page(document: dict, path: Path, plots: Path | None) -> None:
    """Writes the page of a GPU's results anew."""
    if not gpu(document):
        raise ReportError("a page needs the results of a GPU, and these are a CPU's")
    if not path.parent.is_dir():
        raise ReportError(f"{path.parent} is not a folder")
    path.write_text(page(document, _images(document, plots, path.parent)))


def _images(document: dict, plots: Path | None, folder: Path) -> list[str]:
    """Draws the plots, where they are wanted, and returns their paths from the folder."""
    drawn = [] if plots is None else draw(document, plots)
    return [Path(os.path.relpath(path, folder)).as_posix() for path in drawn]


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrites the README's section, or a page, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Write results into the README, or a GPU's into a page of their own.",
    )
    parser.add_argument("results", type=Path, metavar="FILE.json")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--readme", type=Path, default=Path("README.md"))
    target.add_argument("--page", type=Path, metavar="FILE.md", help="the page of a GPU's results")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the plots there, link them")
    options = parser.parse_args(arguments)
    try:
        document = read_document(options.results)
        if options.page is not None:
            write_page(document, options.page, options.plots)
        else:
            write_readme(document, options.readme, options.plots)
    except (ReportError, MissingMatplotlib, OSError) as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
