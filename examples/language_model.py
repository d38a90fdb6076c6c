"""A small language model with tens of thousands of classes: its last layer and its loss as one
operator, compared with the ordinary two.

The text is this repository's documentation; a class is a hashed word. The model sees the embedded
last words and predicts the next one.

    python examples/language_model.py --steps 50 --classes 32768
"""

from __future__ import annotations

import argparse
import re
import time
import zlib
from pathlib import Path

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
    optimizer = fastnn.optim.SGD([*trunk.parameters(), *loss_of.parameters()], lr=0.5)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--classes", type=int, default=32768)
    options = parser.parse_args()
    for head in HEADS:
        losses, seconds = train(head, options.classes, options.batch, options.steps)
        print(
            f"{head:>8}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, {1000 * seconds:.1f} ms a step"
        )


if __name__ == "__main__":
    main()
