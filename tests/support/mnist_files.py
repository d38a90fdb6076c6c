"""Writes small files in MNIST's format."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def write_idx(path: Path, values: np.ndarray) -> Path:
    """Write an IDX file of unsigned bytes, gzipped if the path ends in .gz."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_mnist(folder: Path, suffix: str = ".gz") -> Path:
    """Write a full set of four small files (100 training and 20 test images of noise)."""
    rng = np.random.default_rng(0)
    for (images, labels), count in ((TRAIN, 100), (TEST, 20)):
        write_idx(folder / (images + suffix), rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / (labels + suffix), rng.integers(0, 10, count))
    return folder
