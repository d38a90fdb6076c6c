"""The results of examples/mnist.py: a table of the epochs, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

LABELS = {"fastnn": "fastnn", "train_step": "train_step", "torch": "PyTorch"}
COLORS = {"fastnn": "#d1495b", "train_step": "#edae49", "torch": "#30638e"}
# The curves coincide up to rounding: PyTorch's goes below as a broad band and fastnn's on top as
# thin lines, so that all can be seen.
LINES = {
    "torch": {"linewidth": 5, "alpha": 0.4},
    "train_step": {"linewidth": 2.2},
    "fastnn": {"linewidth": 1.3, "linestyle": "--"},
}


@dataclass(frozen=True)
class Epoch:
    """One epoch's results: mean of the batch losses, test accuracy, seconds of training."""

    loss: float
    accuracy: float
    seconds: float


@dataclass
class Run:
    """One backend's results."""

    backend: str
    epochs: list[Epoch] = field(default_factory=list)
    batch_losses: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of training over all epochs."""
        return sum(epoch.seconds for epoch in self.epochs)


def time_ratio(fused: Run, stock: Run) -> float:
    """Return how many times as fast the fused run was, by the median of its epochs."""
    ours, theirs = (median(epoch.seconds for epoch in run.epochs) for run in (fused, stock))
    return theirs / ours


def loss_difference(first: Run, second: Run) -> float:
    """Return the largest absolute difference of two runs' epoch losses."""
    losses = np.array([[epoch.loss for epoch in run.epochs] for run in (first, second)])
    # numpy's max, unlike Python's, gives NaN if any difference is NaN.
    return float(np.abs(losses[0] - losses[1]).max())


def format_table(runs: Sequence[Run]) -> str:
    """Return the results per epoch, the backends side by side, then the comparison."""
    width = 11 * len(runs)
    names = "".join(f"{LABELS[run.backend]:>11}" for run in runs)
    lines = [
        f"{'':5}"
        + "".join(f"   {title:>{width}}" for title in ("train loss", "test acc", "seconds")),
        "epoch" + f"   {names}" * 3,
    ]
    for number, epochs in enumerate(zip(*(run.epochs for run in runs), strict=True), start=1):
        losses = "".join(_format_loss(epoch.loss) for epoch in epochs)
        accuracies = "".join(f"{epoch.accuracy:11.4f}" for epoch in epochs)
        seconds = "".join(f"{epoch.seconds:11.3f}" for epoch in epochs)
        lines.append(f"{number:5}   {losses}   {accuracies}   {seconds}")
    totals = "".join(f"{run.seconds:11.3f}" for run in runs)
    lines.append(f"total{'':{2 * (width + 3)}}   {totals}")
    *ours, stock = runs
    lines += [""] if ours else []
    for run in ours:
        lines.append(
            f"{LABELS[run.backend]}: {time_ratio(run, stock):.2f} times as fast as PyTorch; "
            f"the epoch losses differ by at most {loss_difference(run, stock):.1e}"
        )
    return "\n".join(lines)


def _format_loss(loss: float) -> str:
    # A run that diverges ends in losses of any size: they too must fit their column.
    return f"{loss:11.4f}" if loss < 1e4 else f"{loss:11.1e}"


def smooth(losses: Sequence[float], window: int) -> np.ndarray:
    """Return the moving average of the batch losses over full windows."""
    return np.convolve(losses, np.full(window, 1 / window), mode="valid")


def draw(runs: Sequence[Run], path: Path) -> bool:
    """Draw loss curves and times per epoch into a PNG; False if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")  # draws into files, so it needs no display
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _draw_losses(left, runs)
    _draw_times(right, runs)
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)
    return True


def _draw_losses(axes, runs: Sequence[Run]) -> None:
    for run in reversed(runs):
        per_epoch = len(run.batch_losses) // len(run.epochs)
        window = max(1, per_epoch // 20)
        curve = smooth(run.batch_losses, window)
        position = (np.arange(len(curve)) + window) / per_epoch
        color, label = COLORS[run.backend], LABELS[run.backend]
        axes.plot(position, curve, color=color, label=label, **LINES[run.backend])
    axes.set(title="Training loss", xlabel="epoch", ylabel=f"loss (mean of {window} batches)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_times(axes, runs: Sequence[Run]) -> None:
    width = 0.8 / len(runs)
    numbers = np.arange(1, len(runs[0].epochs) + 1)
    for index, run in enumerate(runs):
        offset = (index - (len(runs) - 1) / 2) * width
        seconds = [epoch.seconds for epoch in run.epochs]
        label = f"{LABELS[run.backend]}: {run.seconds:.2f} s"
        if run is not runs[-1]:
            label += f" ({time_ratio(run, runs[-1]):.2f} x as fast)"
        axes.bar(numbers + offset, seconds, width, color=COLORS[run.backend], label=label)
    # Whole epochs only, also where there is but one.
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlim(0.4, len(numbers) + 0.6)
    axes.set(title="Training time per epoch", xlabel="epoch", ylabel="seconds")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.margins(y=0.45)  # room for the legend above the bars
    axes.legend(loc="upper center", ncols=1)
