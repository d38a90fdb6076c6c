"""The digits of the MNIST demo, and the reader of its IDX files."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from support.examples import load
from support.mnist_files import TEST, TRAIN, write_idx, write_mnist

digits, idx, mnist = map(load, ("digits", "idx", "mnist"))

pytestmark = pytest.mark.cpu_only("the example's data")


def test_bundled_digits_are_mnist():
    # MD5 of the published files, unpacked.
    published = ("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637")
    for name, digest in zip(TEST, published, strict=True):
        content = gzip.decompress((digits.BUNDLED / f"{name}.gz").read_bytes())
        assert hashlib.md5(content).hexdigest() == digest


def test_bundled_split_is_disjoint_and_complete():
    training, test = digits.load_digits(None)
    assert (len(training), len(test)) == (8_500, 1_500)
    counts = torch.bincount(torch.cat([training.labels, test.labels]))
    # How often each digit occurs in MNIST's test set.
    assert counts.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    images = torch.cat([training.images, test.images])
    assert len(torch.unique(images, dim=0)) == 10_000  # no two of its digits are equal


def test_normalisation_is_the_notebooks():
    pixels = np.zeros((1, 28, 28), np.uint8)
    pixels[0, 0, :3] = [0, 51, 255]  # 51 is a fifth of 255
    found = digits.to_digits(pixels, np.array([7], np.uint8))
    assert found.images.shape == (1, 784)
    assert found.images.dtype == torch.float32
    torch.testing.assert_close(found.images[0, :3], torch.tensor([-1.0, -0.6, 1.0]))
    assert found.labels.tolist() == [7]
    assert found.labels.dtype == torch.int64


def test_last_short_batch_is_kept():
    ten = digits.Digits(torch.arange(10.0)[:, None], torch.arange(10))
    assert [labels.tolist() for _, labels in digits.batches(ten, 4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]


# ---- the IDX reader ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_round_trip(tmp_path, suffix):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28))
    labels = np.array([0, 9, 5, 3, 1])
    paths = [write_idx(tmp_path / f"images{suffix}", images)]
    paths.append(write_idx(tmp_path / f"labels{suffix}", labels))
    read_images, read_labels = idx.read_pair(*paths)
    assert read_images.dtype == read_labels.dtype == np.uint8
    np.testing.assert_array_equal(read_images, images)
    np.testing.assert_array_equal(read_labels, labels)


def _gz(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def _missing(folder: Path) -> None:
    (folder / f"{TRAIN[0]}.gz").unlink()


def _truncated_header(folder: Path) -> None:
    path = folder / f"{TRAIN[0]}.gz"
    path.write_bytes(gzip.compress(_gz(path)[:10]))


def _empty(folder: Path) -> None:
    (folder / f"{TRAIN[0]}.gz").write_bytes(gzip.compress(b""))


def _truncated_values(folder: Path) -> None:
    path = folder / f"{TRAIN[0]}.gz"
    path.write_bytes(gzip.compress(_gz(path)[:-1]))


def _too_long(folder: Path) -> None:
    path = folder / f"{TRAIN[1]}.gz"
    path.write_bytes(gzip.compress(_gz(path) + b"\0\0"))


def _truncated_gzip(folder: Path) -> None:
    path = folder / f"{TEST[0]}.gz"
    path.write_bytes(path.read_bytes()[:1000])


def _damaged_gzip(folder: Path) -> None:
    path = folder / f"{TEST[0]}.gz"
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # a bit of the checksum
    path.write_bytes(content)


def _garbage_in_gzip(folder: Path) -> None:
    path = folder / f"{TEST[0]}.gz"
    path.write_bytes(path.read_bytes()[:10] + b"\xff" * 100)


def _not_gzip(folder: Path) -> None:
    (folder / f"{TRAIN[1]}.gz").write_bytes(b"<html>404</html>")


def _gzip_named_raw(folder: Path) -> None:
    (folder / f"{TRAIN[0]}.gz").rename(folder / TRAIN[0])


def _wrong_magic(folder: Path) -> None:
    # Labels where images belong: the mistake that renaming files makes.
    labels = folder / f"{TRAIN[1]}.gz"
    (folder / f"{TRAIN[0]}.gz").write_bytes(labels.read_bytes())


def _wrong_count(folder: Path) -> None:
    write_idx(folder / f"{TRAIN[1]}.gz", np.zeros(99))


def _wrong_size(folder: Path) -> None:
    write_idx(folder / f"{TRAIN[0]}.gz", np.zeros((100, 32, 28)))


def _no_images(folder: Path) -> None:
    write_idx(folder / f"{TEST[0]}.gz", np.zeros((0, 28, 28)))
    write_idx(folder / f"{TEST[1]}.gz", np.zeros(0))


def _wrong_label(folder: Path) -> None:
    write_idx(folder / f"{TRAIN[1]}.gz", np.full(100, 10))


def _a_folder(folder: Path) -> None:
    path = folder / f"{TRAIN[1]}.gz"
    path.unlink()
    path.mkdir()


# How a set of files can be spoiled: the file that is named, what was found, what is expected.
SPOILED = [
    (_missing, TRAIN[0], "no such file", f"{TRAIN[0]}.gz"),
    (_empty, TRAIN[0], "found 0 bytes", "expected at least the 16 of the header"),
    (_truncated_header, TRAIN[0], "found 10 bytes", "expected at least the 16 of the header"),
    (_truncated_values, TRAIN[0], "found 78399 bytes", "expected 78400 (100 x 28 x 28"),
    (_too_long, TRAIN[1], "found 102 bytes", "expected 100 (100"),
    (_truncated_gzip, TEST[0], "after 1000 bytes", "the file is truncated"),
    (_damaged_gzip, TEST[0], "CRC check failed", "expected a gzip file"),
    (_garbage_in_gzip, TEST[0], "found damaged data", "expected a gzip file"),
    (_not_gzip, TRAIN[1], "found the first bytes 0x3c68", "not a gzip file"),
    (_gzip_named_raw, TRAIN[0], "0x1f8b", "should end in .gz"),
    (_wrong_magic, TRAIN[0], "found the magic number 0x00000801", "expected 0x00000803"),
    (_wrong_count, TRAIN[1], "found 99 labels", "expected 100, one for each image"),
    (_wrong_size, TRAIN[0], "found images of 32 x 28 pixels", "expected 28 x 28"),
    (_no_images, TEST[0], "found no images", "expected at least one"),
    (_wrong_label, TRAIN[1], "found the label 10", "expected labels from 0 to 9"),
    (_a_folder, TRAIN[1], "Is a directory", "expected a file"),
]


@pytest.mark.parametrize(
    ("spoil", "name", "found", "expected"), SPOILED, ids=[row[0].__name__[1:] for row in SPOILED]
)
def test_unusable_file_is_one_sentence(tmp_path, capsys, spoil, name, found, expected):
    spoil(write_mnist(tmp_path))
    code = mnist.main(["--data", str(tmp_path), "--plot", "none", "--backend", "torch"])
    output, errors = capsys.readouterr()
    assert code == 2
    assert output == ""
    assert errors.startswith(f"mnist.py: error: {tmp_path / name}")
    assert found in errors
    assert expected in errors
    assert errors.count("\n") == 1
    assert errors.endswith(".\n")
