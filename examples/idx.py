"""Reads the IDX files of MNIST with numpy only.

An IDX file is a big-endian header followed by the values: two zero bytes, one byte for the type
of the values (8: unsigned byte), one byte for the number of dimensions, then each dimension's
size as four bytes. MNIST has images of three dimensions (count, rows, columns) and labels of one.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

UNSIGNED_BYTE = 8
IMAGE_SHAPE = (28, 28)
CLASSES = 10


class IdxError(Exception):
    """An IDX file cannot be used; the message names the file, what was found and what fits."""


def find_idx(folder: Path, name: str) -> Path:
    """Return the path of ``name`` in ``folder``, raw or with ``.gz`` appended."""
    if not folder.is_dir():
        raise IdxError(f"{folder}: found no such folder, expected one with the file {name}.gz.")
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.exists():
            return candidate
    raise IdxError(f"{folder / name}: found no such file, expected it there raw or as {name}.gz.")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes with this many dimensions; ``.gz`` is unpacked."""
    content = _read_bytes(path)
    header_size = 4 + 4 * dimensions
    magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if len(content) >= 4 and content[:4] != magic:
        hint = " (a gzip file, whose name should end in .gz)" if content[:2] == b"\x1f\x8b" else ""
        raise IdxError(
            f"{path}: found the magic number 0x{content[:4].hex()}{hint}, expected 0x{magic.hex()}."
        )
    if len(content) < header_size:
        raise IdxError(
            f"{path}: found {len(content)} bytes, expected at least the {header_size} of the "
            "header: the file is truncated."
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    found, expected = len(content) - header_size, math.prod(shape)
    if found != expected:
        problem = "the file is truncated" if found < expected else "the file is too long"
        sizes = " x ".join(str(size) for size in shape)
        raise IdxError(
            f"{path}: found {found} bytes of values, expected {expected} ({sizes}, as its header "
            f"says): {problem}."
        )
    # frombuffer gives a read-only view; torch.from_numpy takes a copy without a warning.
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape).copy()


def read_pair(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read images (count, 28, 28) and their labels (count,), checked against each other."""
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape[1:] != IMAGE_SHAPE:
        rows, columns = images.shape[1:]
        raise IdxError(
            f"{images_path}: found images of {rows} x {columns} pixels, expected "
            f"{IMAGE_SHAPE[0]} x {IMAGE_SHAPE[1]}."
        )
    if len(images) == 0:
        raise IdxError(f"{images_path}: found no images, expected at least one.")
    if len(images) != len(labels):
        raise IdxError(
            f"{labels_path}: found {len(labels)} labels, expected {len(images)}, one for each "
            f"image in {images_path.name}."
        )
    if labels.max() >= CLASSES:
        raise IdxError(
            f"{labels_path}: found the label {labels.max()}, expected labels from 0 to "
            f"{CLASSES - 1}."
        )
    return images, labels


def _read_bytes(path: Path) -> bytes:
    """Return the file's content, unpacked if its name ends in ``.gz``."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise IdxError(f"{path}: found no such file, expected an IDX file.") from None
    except OSError as error:
        reason = error.strerror or error
        raise IdxError(f"{path}: found something unreadable ({reason}), expected a file.") from None
    if path.suffix != ".gz":
        return content
    if content[:2] != b"\x1f\x8b":
        raise IdxError(
            f"{path}: found the first bytes 0x{content[:2].hex()}, expected 0x1f8b: it is not a "
            "gzip file."
        )
    try:
        return gzip.decompress(content)
    except EOFError:
        raise IdxError(
            f"{path}: found the end of the file after {len(content)} bytes, expected more gzip "
            "data: the file is truncated."
        ) from None
    except (OSError, zlib.error) as error:
        raise IdxError(f"{path}: found damaged data ({error}), expected a gzip file.") from None
