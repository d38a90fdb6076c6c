"""Draws results: a row for each operator, with a dot for each case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.results import best_ratio, geometric_mean, gpu
from benchmarks.table import MODE_NAMES, threads_text

# One colour and marker per series, in order.
STYLES = (("#30638e", "o"), ("#d1495b", "D"), ("#edae49", "s"), ("#66a182", "^"))
# Pages and the README show figures 350 to 740 pixels wide, at which the text must be readable.
WIDTH_INCHES, ROW_INCHES, FOOT_INCHES = 5.4, 0.4, 1.1
FONT_POINTS, DOTS_PER_INCH = 11, 160

#: The value of a result that a figure shows; None omits the result.
Value = Callable[[dict], float | None]
#: The dots of one colour: for each, the row's name and the value.
Dots = list[tuple[str, float]]


class MissingMatplotlib(Exception):
    """The plots need matplotlib, which is not installed."""


def require_matplotlib() -> None:
    """Raises with instructions if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise MissingMatplotlib(
            "the plots need matplotlib: 'pip install matplotlib' brings it"
        ) from None
    matplotlib.use("Agg")  # draws into files, which needs no display


def draw(document: dict, folder: Path, stem: str) -> list[Path]:
    """Draws a run's figures and returns their files; a figure without data is omitted.

    Args:
        document: the run.
        folder: the folder for the files; created if necessary.
        stem: prefix of the files' names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (where,) = gpu(document) or [document["machine"]["cpu"]]
    figures = {
        "ratio": (best_ratio, f"Best peer / fastnn ({where})", ratio_axis),
        "share": (_share, f"Share of the machine's limit ({where})", _share_axis),
    }
    drawn = []
    for name, (value, title, axis) in figures.items():
        series = _by_threads(document["results"], value)
        if series:
            path = folder / f"{stem}_{name}.png"
            draw_rows(series, title, axis, path)
            drawn.append(path)
    return drawn


def _share(result: dict) -> float | None:
    return result["share"]


def _by_threads(results: Sequence[dict], value: Value) -> dict[str, Dots]:
    series: dict[str, Dots] = {}
    for result in results:
        shown = value(result)
        if shown is not None:
            series.setdefault(threads_text(result["threads"]), []).append((_name(result), shown))
    return series


def _name(result: dict) -> str:
    """The operator's name, followed by what is measured if that varies."""
    op, mode = result["op"], result["mode"]
    return op if mode in ("step", "call") else f"{op}, {MODE_NAMES[mode]}"


def draw_rows(series: dict[str, Dots], title: str, axis: Callable, path: Path) -> None:
    """Draws a row for each name, with each series' dots and their geometric mean.

    Args:
        series: the dots by the series' names, which the legend shows.
        title: the figure's title.
        axis: called with the axes and all values to set the scale.
        path: the PNG file to write.
    """
    require_matplotlib()
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for dots in series.values() for name, _ in dots))
    size = (WIDTH_INCHES, FOOT_INCHES + ROW_INCHES * len(names))
    with plt.rc_context({"font.size": FONT_POINTS}):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        for index, (label, dots) in enumerate(series.items()):
            colour, marker = STYLES[index % len(STYLES)]
            # Rows have a height of 1, with their name on top and the series below each other.
            _draw_series(axes, names, dots, 0.1 + 0.3 * index / len(series), colour, marker)
            axes.scatter([], [], color=colour, marker=marker, label=label)
        for row, name in enumerate(names):
            axes.text(0.01, row - 0.25, name, transform=axes.get_yaxis_transform(), va="center")
        axis(axes, [value for dots in series.values() for _, value in dots])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_yticks([])
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right", "left"]].set_visible(False)
        figure.suptitle(title, fontsize=FONT_POINTS, fontweight="bold")
        figure.legend(loc="outside lower center", ncols=len(series), frameon=False)
        figure.savefig(path, format="png", dpi=DOTS_PER_INCH)
        plt.close(figure)


def _draw_series(
    axes, names: list[str], dots: Dots, offset: float, colour: str, marker: str
) -> None:
    height = [names.index(name) + offset for name, _ in dots]
    values = [value for _, value in dots]
    style = {"color": colour, "marker": marker, "linewidths": 0}
    axes.scatter(values, height, s=22, alpha=0.45, zorder=3, **style)
    for row, name in enumerate(names):
        of_row = [value for dot, value in dots if dot == name and value > 0]
        if of_row:
            mean = geometric_mean(of_row)
            axes.plot([mean] * 2, [row + offset - 0.16, row + offset + 0.16], color=colour, lw=2.5)


def ratio_axis(axes, values: list[float]) -> None:
    """A logarithmic axis: twice and half as fast are equally far from 1."""
    low, high = min(0.7, *values) * 0.9, max(2.0, *values) * 1.15
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [tick for tick in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.axvline(1, color="black", linewidth=1, zorder=2)
    axes.axvspan(low, 1, color="#d1495b", alpha=0.08, zorder=0)
    axes.set_xlabel("dot: a case; bar: geometric mean; left of 1x: peer ahead")


def _share_axis(axes, values: list[float]) -> None:
    top = max(1.05, *values) * 1.03
    axes.set_xlim(0, top)
    axes.set_xticks([tick / 2 for tick in range(int(top * 2) + 1)])
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.axvline(1, color="black", linewidth=1, zorder=2)
    axes.set_xlabel("dot: a case; bar: geometric mean")
