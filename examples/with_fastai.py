"""fastai: threes and sevens, with a fused head, our loss and our SGD under the one-cycle policy.

python examples/with_fastai.py
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from digits import BUNDLED
from fastai.vision.all import (
    ImageDataLoaders,
    Learner,
    OptimWrapper,
    accuracy,
    load_learner,
    resnet18,
    set_seed,
    vision_learner,
)
from idx import read_pair
from PIL import Image

import fastnn


def write_pictures(folder: Path, count: int) -> None:
    """The first ``count`` threes and sevens of MNIST, as ``3_0.png`` and so on."""
    names = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
    images, labels = read_pair(*(BUNDLED / name for name in names))
    for digit in (3, 7):
        for index, image in enumerate(images[labels == digit][:count]):
            Image.fromarray(image).save(folder / f"{digit}_{index}.png")


def digit_of(path: str | Path) -> str:
    return Path(path).name[0]


def build_learner(folder: Path) -> Learner:
    set_seed(0, reproducible=True)
    files = sorted(folder.glob("*.png"))
    dls = ImageDataLoaders.from_path_func(folder, files, digit_of, bs=32, num_workers=0, seed=0)
    learn = vision_learner(
        dls,
        resnet18,
        pretrained=False,
        loss_func=fastnn.nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=fastnn.optim.SGD, momentum=0.9),
        metrics=accuracy,
    )
    learn.model = fastnn.fuse(learn.model, verbose=True)
    return learn


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, 100)
        learn = build_learner(folder)
        print(f"learning rate found: {learn.lr_find(num_it=30, show_plot=False).valley:.2g}")
        learn.fit_one_cycle(2, 0.02)
        learn.export("digits.pkl")
        digit, _, probabilities = load_learner(folder / "digits.pkl").predict(folder / "3_0.png")
        print(f"3_0.png is a {digit}, with probability {probabilities.max():.2f}")


if __name__ == "__main__":
    main()
