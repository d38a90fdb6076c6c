"""Writes the README's and the documentation's sections about saved runs.

python -m benchmarks.report                           all of it, from benchmarks/results
python -m benchmarks.report FILE.json --page FILE.md  the page of one run
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.cpu_page import cpu_page
from benchmarks.overview import Link, draw_picture, section
from benchmarks.page import page as gpu_page
from benchmarks.plots import MissingMatplotlib, draw
from benchmarks.results import SCHEMA, gpu
from benchmarks.sections import head_section, step_section

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
RESULTS = Path("benchmarks/results")
PICTURE = RESULTS / "overview.png"
# The saved runs and their pages.
PAGES = {
    "avx2": "docs/performance_avx2.md",
    "avx512": "docs/performance_avx512.md",
    "h200": "docs/performance_cuda.md",
}
# The runs in the small table.
OVERVIEW = ("avx2", "avx512")


class ReportError(Exception):
    """The report can't be written; the message is one sentence for the user."""


def replace_section(text: str, section: str, path: Path) -> str:
    """Replaces the section between the two markers, which stay."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReportError(f"{path} needs one {BEGIN} and after it one {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section.strip()}\n{END}{rest.split(END)[1]}"


def read_document(path: Path) -> dict:
    """Reads a document written by ``python -m benchmarks --json``."""
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


def page(document: dict, images: Sequence[str]) -> str:
    """The page of a CPU's or a GPU's run."""
    return (gpu_page if gpu(document) else cpu_page)(document, list(images))


def write_page(document: dict, path: Path, plots: Path | None, name: str) -> None:
    """Rewrites a run's page.

    Args:
        document: the run.
        path: the page.
        plots: the folder for its figures; None for no figures.
        name: prefix of the figures' names.
    """
    if not path.parent.is_dir():
        raise ReportError(f"{path.parent} is not a folder")
    drawn = [] if plots is None else draw(document, plots, name)
    path.write_text(page(document, [relative(image, path.parent) for image in drawn]))


def refresh(root: Path) -> None:
    """Rewrites every page, picture and section that shows the saved runs.

    Args:
        root: the repository.
    """
    documents = {name: read_document(root / RESULTS / f"{name}.json") for name in PAGES}
    texts = {root / name: with_section(root, name, documents) for name in SECTIONS}
    draw_picture([documents[name] for name in OVERVIEW], root / PICTURE)
    for path, text in texts.items():
        path.write_text(text)
    for name, target in PAGES.items():
        write_page(documents[name], root / target, root / RESULTS, name)


def with_section(root: Path, name: str, documents: dict[str, dict]) -> str:
    """A page's text with its section brought up to date."""
    path = root / name
    if not path.is_file():
        raise ReportError(f"{path} is not a file")
    text = SECTIONS[name](documents, lambda target: relative(root / target, path.parent))
    return replace_section(path.read_text(), text, path)


def _overview(documents: dict[str, dict], link: Link) -> str:
    return section({name: documents[name] for name in OVERVIEW}, PAGES, PICTURE.as_posix(), link)


# The pages with a section between the markers, and what writes it.
SECTIONS: dict[str, Callable[[dict[str, dict], Link], str]] = {
    "README.md": _overview,
    "docs/performance.md": _overview,
    "docs/train_step.md": lambda documents, link: step_section(documents["avx512"]),
    "docs/linear_cross_entropy.md": lambda documents, link: head_section(documents["avx512"]),
}


def relative(path: Path, folder: Path) -> str:
    """A file's path relative to a folder, for links."""
    return Path(os.path.relpath(path, folder)).as_posix()


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the pages and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Write the pages that show saved runs: all of them, or that of one run.",
    )
    parser.add_argument("results", type=Path, nargs="?", metavar="FILE.json", help="one run")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="the page of that run")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw that run's figures there")
    options = parser.parse_args(arguments)
    if (options.results is None) != (options.page is None):
        parser.error("FILE.json and --page go together")
    try:
        if options.results is None:
            refresh(Path.cwd())
        else:
            document = read_document(options.results)
            write_page(document, options.page, options.plots, options.results.stem)
    except (ReportError, MissingMatplotlib, OSError) as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
