"""MNIST's digits as tensors: the full set from a folder, or the bundled test set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from idx import find_idx, read_pair

BUNDLED = Path(__file__).resolve().parent / "data" / "mnist"
BUNDLED_TEST_IMAGES = 1_500
# The bundled digits are split the same way whatever --seed is: a seed changes the training only.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Normalised images (count, 784), float32, and their labels (count,), int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: torch.Tensor) -> Digits:
        return Digits(self.images[index], self.labels[index])


def to_digits(images: np.ndarray, labels: np.ndarray) -> Digits:
    """Turn pixels 0..255 into values -1..1: ToTensor, then Normalize((0.5,), (0.5,))."""
    pixels = torch.from_numpy(images).flatten(1).float()
    return Digits(pixels.div(255).sub(0.5).div(0.5), torch.from_numpy(labels).long())


def load_digits(folder: Path | None) -> tuple[Digits, Digits]:
    """Return training and test digits: the full set in ``folder``, else the bundled ones."""
    if folder is not None:
        return _load_part(folder, "train"), _load_part(folder, "t10k")
    digits = _load_part(BUNDLED, "t10k")
    # The file's first half is easier than its second (they come from different writers), so the
    # split is at random.
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return digits[order[BUNDLED_TEST_IMAGES:]], digits[order[:BUNDLED_TEST_IMAGES]]


def _load_part(folder: Path, part: str) -> Digits:
    images = find_idx(folder, f"{part}-images-idx3-ubyte")
    labels = find_idx(folder, f"{part}-labels-idx1-ubyte")
    return to_digits(*read_pair(images, labels))


def batches(digits: Digits, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut the digits into batches in their order; the last one may be shorter."""
    return list(zip(digits.images.split(size), digits.labels.split(size), strict=True))
