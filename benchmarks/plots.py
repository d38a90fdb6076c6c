"""Draws the results: the ratio to the best peer, and the share of the machine's limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.results import best_ratio, gpu
from benchmarks.table import MODE_NAMES, threads_text

# One colour and marker per thread count, in the order of the results.
STYLES = (("#30638e", "o"), ("#d1495b", "D"), ("#edae49", "s"), ("#66a182", "^"))
SHORT_DTYPES = {"float32": "", "bfloat16": " bf16"}
ROW_INCHES, PANEL_INCHES, WIDTH_INCHES = 0.2, 0.75, 13.0

#: What a figure shows of a result; None leaves it out.
Value = Callable[[dict], float | None]


class MissingMatplotlib(Exception):
    """The plots need a package that is not installed."""


def require_matplotlib() -> None:
    """Raises with what to do where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise MissingMatplotlib(
            "the plots need matplotlib: 'pip install matplotlib' brings it"
        ) from None
    matplotlib.use("Agg")  # draws into files, so it needs no display


def draw(document: dict, folder: Path) -> list[Path]:
    """Draws both figures into the folder and returns their files; one with no data is left out."""
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    results = document["results"]
    (where,) = gpu(document) or [document["machine"]["cpu"]]
    figures = {
        "ratio.png": (
            best_ratio,
            f"Best peer / fastnn, time or peak memory ({where})",
            _ratio_axis,
        ),
        "share.png": (_share, f"Share of the machine's limit ({where})", _share_axis),
    }
    return [
        path
        for name, (value, title, decorate) in figures.items()
        if (path := _draw(results, value, title, decorate, folder / name)) is not None
    ]


def _share(result: dict) -> float | None:
    return result["share"]


def _draw(
    results: list[dict], value: Value, title: str, decorate: Callable, path: Path
) -> Path | None:
    from matplotlib import pyplot as plt

    shown = [result for result in results if value(result) is not None]
    if not shown:
        return None
    threads = list(dict.fromkeys(result["threads"] for result in shown))
    columns = _balance(_panels(shown))
    height = max(map(_height, columns))
    figure = plt.figure(figsize=(WIDTH_INCHES / 2 * len(columns), height + 1), layout="constrained")
    for part, column in zip(_subfigures(figure, len(columns)), columns, strict=True):
        # An empty panel at the foot of the shorter column keeps the rows of both alike.
        heights = [_height([panel]) for panel in column] + [max(height - _height(column), 1e-3)]
        panels = part.subplots(len(heights), 1, height_ratios=heights)
        panels[-1].set_axis_off()
        for axes, (op, rows) in zip(panels, column, strict=False):
            _draw_panel(axes, op, rows, threads, value)
            # One scale for all panels, or their dots could not be compared.
            decorate(axes, [value(result) for result in shown])
    _legend(figure, threads)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    figure.savefig(path, format="png", dpi=110)
    plt.close(figure)
    return path


Panel = tuple[str, list[dict]]


def _panels(results: list[dict]) -> list[Panel]:
    order = list(dict.fromkeys(result["op"] for result in results))
    ordered = sorted(results, key=lambda result: order.index(result["op"]))
    return [(op, list(rows)) for op, rows in groupby(ordered, key=lambda result: result["op"])]


def _row_name(result: dict) -> str:
    dtype = SHORT_DTYPES.get(result["dtype"], f" {result['dtype']}")
    return f"{result['label']}{dtype} {MODE_NAMES[result['mode']]}"


def _row_names(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(map(_row_name, rows)))


def _height(panels: Sequence[Panel]) -> float:
    return sum(PANEL_INCHES + ROW_INCHES * len(_row_names(rows)) for _, rows in panels)


def _balance(panels: list[Panel]) -> list[list[Panel]]:
    """Two columns of about the same height, in order; one where there is little to show."""
    if _height(panels) < 5 or len(panels) == 1:
        return [panels]
    splits = [(panels[:cut], panels[cut:]) for cut in range(1, len(panels))]
    return list(min(splits, key=lambda split: max(map(_height, split))))


def _subfigures(figure, count: int):
    return [figure] if count == 1 else figure.subfigures(1, count, wspace=0.02)


def _draw_panel(axes, op: str, rows: list[dict], threads: list[int], value: Value) -> None:
    names = _row_names(rows)
    for count, (colour, marker) in zip(threads, STYLES * len(threads), strict=False):
        points = [
            (value(row), names.index(_row_name(row))) for row in rows if row["threads"] == count
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=30, color=colour, marker=marker, zorder=3)
    axes.set_title(op, loc="left", fontsize=10, fontweight="bold")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="both", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _ratio_axis(axes, values: list[float]) -> None:
    """Logarithmic, so that twice as fast and half as fast are equally far from 1."""
    low, high = min(0.7, *values) * 0.9, max(2.0, *values) * 1.15
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [tick for tick in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.axvline(1, color="black", linewidth=1, zorder=2)
    axes.axvspan(low, 1, color="#d1495b", alpha=0.08, zorder=0)


def _share_axis(axes, values: list[float]) -> None:
    top = max(1.05, *values) * 1.03
    axes.set_xlim(0, top)
    axes.set_xticks([tick / 4 for tick in range(int(top * 4) + 1)])
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.axvline(1, color="black", linewidth=1, zorder=2)


def _legend(figure, threads: list[int]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=threads_text(count))
        for count, (colour, marker) in zip(threads, STYLES * len(threads), strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
