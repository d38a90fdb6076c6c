"""A small language model with tens of thousands of classes: its last layer and its loss as one
operator, compared with the ordinary two.

The text is this repository's documentation; a class is a hashed word. The model sees the embedded
last words and predicts the next one.

    python examples/language_model.py --steps 50 --classes 32768 --plot heads.png
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import resource
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastnn

DOCUMENTS = Path(__file__).resolve().parents[1] / "docs"
CONTEXT, WIDTH = 4, 64


class Trunk(nn.Sequential):
    """Maps the last words to the features of the next."""

    def __init__(self, classes: int) -> None:
        super().__init__(
            nn.Embedding(classes, WIDTH),
            nn.Flatten(1),
            fastnn.nn.LinearReLU(CONTEXT * WIDTH, 2 * WIDTH),
            fastnn.nn.Linear(2 * WIDTH, WIDTH),
        )


class OrdinaryHead(nn.Module):
    """The layer, then the loss: a batch's logits are in memory, more than once."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, classes, bias=False)

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(features), target)


HEADS = {
    "ordinary": OrdinaryHead,
    "fastnn": lambda classes: fastnn.nn.LinearCrossEntropyLoss(WIDTH, classes),
}


def words(classes: int) -> Tensor:
    """The text, as one number per word."""
    text = " ".join(path.read_text() for path in sorted(DOCUMENTS.glob("*.md")))
    hashes = [zlib.crc32(word.encode()) % classes for word in re.findall(r"\w+|\S", text)]
    return torch.tensor(hashes)


def train(head: str, classes: int, batch: int, steps: int) -> tuple[list[float], float]:
    """The losses, and the seconds per step."""
    torch.manual_seed(0)
    trunk, loss_of = Trunk(classes), HEADS[head](classes)
    optimizer = fastnn.optim.SGD([*trunk.parameters(), *loss_of.parameters()], lr=0.1)
    windows = words(classes).unfold(0, CONTEXT + 1, 1)
    losses, start = [], 0.0
    for step in range(steps + 1):
        if step == 1:  # the first one allocates
            start = time.perf_counter()
        rows = windows[torch.randint(len(windows), (batch,))]
        optimizer.zero_grad()
        loss = loss_of(trunk(rows[:, :-1]), rows[:, -1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, (time.perf_counter() - start) / max(steps, 1)


class Training(NamedTuple):
    """What became of a training, and what it took: the memory beyond what was there before it."""

    losses: list[float]
    milliseconds: float
    mebibytes: float


def measure(head: str, classes: int, batch: int, steps: int) -> Training:
    before = peak_memory()
    losses, seconds = train(head, classes, batch, steps)
    return Training(losses, 1000 * seconds, (peak_memory() - before) / 2**20)


def peak_memory() -> int:
    """The most bytes that this process has had at a time."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_in_own_process(*arguments: str | int) -> Training:
    """A process's peak never sinks: each head has one of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *arguments).result()


def draw(trainings: dict[str, Training], path: Path, title: str) -> None:
    """Draws time and memory of the heads side by side; takes matplotlib."""
    import matplotlib

    matplotlib.use("Agg")  # draws into files, so it needs no display
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(7, 3), layout="constrained")
    figure.suptitle(title)
    for axes, name, unit in zip(
        panels, ("milliseconds", "mebibytes"), ("ms a step", "peak memory, MiB"), strict=True
    ):
        values = [getattr(training, name) for training in trainings.values()]
        bars = axes.bar([*trainings], values, color=["#7f8c9b", "#30638e"], width=0.6)
        axes.bar_label(bars, fmt="%.0f")
        axes.set_title(unit)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--classes", type=int, default=32768)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory into a PNG")
    options = parser.parse_args()
    sizes = options.classes, options.batch, options.steps
    trainings = {head: measure_in_own_process(head, *sizes) for head in HEADS}
    for head, (losses, milliseconds, mebibytes) in trainings.items():
        print(
            f"{head:>8}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, {milliseconds:.1f} ms a step, "
            f"{mebibytes:.0f} MiB"
        )
    if options.plot is not None:
        draw(trainings, options.plot, f"{options.classes} classes, batches of {options.batch}")


if __name__ == "__main__":
    main()
