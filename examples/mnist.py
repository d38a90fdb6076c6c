"""Trains the same MNIST classifier with fastnn and with stock PyTorch and compares the two.

    python examples/mnist.py                     five epochs on the digits bundled with the repo
    python examples/mnist.py --data DIR          the full MNIST, from its four IDX files
    python examples/mnist.py --help              all flags

The network is the multilayer perceptron 784-128-64-10. It is trained with fastnn in the ordinary
loop, with fastnn in one call a step (fastnn.train_step), and with stock PyTorch. All start from the
same weights and see the same batches in the same order, so that their losses agree up to rounding
and only the time differs.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from idx import IdxError, find_idx, read_pair
from torch import nn

BUNDLED = Path(__file__).resolve().parent / "data" / "mnist"
BUNDLED_TEST_IMAGES = 1_500
# The bundled digits are split the same way whatever --seed is: a seed changes the training only.
SPLIT_SEED = 0
WARM_UP_STEPS = 20
LABELS = {"fastnn": "fastnn", "train_step": "train_step", "torch": "PyTorch"}
COLORS = {"fastnn": "#d1495b", "train_step": "#edae49", "torch": "#30638e"}
# The curves coincide up to rounding: PyTorch's goes below as a broad band and fastnn's on top as
# thin lines, so that all can be seen.
LINES = {
    "torch": {"linewidth": 5, "alpha": 0.4},
    "train_step": {"linewidth": 2.2},
    "fastnn": {"linewidth": 1.3, "linestyle": "--"},
}


class DemoError(Exception):
    """The demo cannot run as asked; the message is one sentence for the user."""


@dataclass(frozen=True)
class Options:
    """What the flags ask for."""

    momentum: float = 0.0
    lr: float = 0.003
    epochs: int = 5
    batch_size: int = 64
    seed: int = 0
    loss: str = "nll"
    backend: str = "all"
    threads: int | None = None
    data: Path | None = None
    plot: Path | None = None

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends to train, in the order in which they are reported."""
        return tuple(LABELS) if self.backend == "all" else (self.backend,)


@dataclass(frozen=True)
class Digits:
    """Normalised images (count, 784), float32, and their labels (count,), int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: torch.Tensor) -> Digits:
        return Digits(self.images[index], self.labels[index])


@dataclass
class Learner:
    """One backend's model with its loss and optimizer."""

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Take one training step on a batch and return its loss."""
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()


@dataclass
class OneCallLearner(Learner):
    """The same, but that a training step is one call."""

    def __post_init__(self) -> None:
        import fastnn

        self.train_step = fastnn.train_step(self.model, self.criterion, self.optimizer)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Take one training step on a batch and return its loss."""
        return self.train_step(images, labels).item()


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


# ---- data ----------------------------------------------------------------------------------------


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


# ---- models --------------------------------------------------------------------------------------


def build_torch(options: Options) -> Learner:
    """Build the classifier from stock PyTorch."""
    layers: list[nn.Module] = [
        nn.Linear(784, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ]
    criterion: nn.Module = nn.CrossEntropyLoss()
    if options.loss == "nll":
        layers.append(nn.LogSoftmax(dim=1))
        criterion = nn.NLLLoss()
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=options.momentum)
    return Learner(model, criterion, optimizer)


def build_fastnn(options: Options) -> Learner:
    """Build the same classifier from fastnn's fused modules."""
    import fastnn

    layers: list[nn.Module] = [
        fastnn.nn.LinearReLU(784, 128),
        fastnn.nn.LinearReLU(128, 64),
        nn.Linear(64, 10),
    ]
    criterion: nn.Module = fastnn.nn.CrossEntropyLoss()
    if options.loss == "nll":
        layers.append(fastnn.nn.LogSoftmax(dim=1))
        criterion = fastnn.nn.NLLLoss()
    model = nn.Sequential(*layers)
    optimizer = fastnn.optim.SGD(model.parameters(), lr=options.lr, momentum=options.momentum)
    return Learner(model, criterion, optimizer)


def build_train_step(options: Options) -> Learner:
    """Build fastnn's classifier with a training step in one call."""
    return OneCallLearner(**vars(build_fastnn(options)))


BUILDERS: dict[str, Callable[[Options], Learner]] = {
    "fastnn": build_fastnn,
    "train_step": build_train_step,
    "torch": build_torch,
}


def build(backend: str, options: Options) -> Learner:
    """Build a backend's learner with the initial weights that belong to the seed."""
    torch.manual_seed(options.seed)
    return BUILDERS[backend](options)


def check_same_weights(first: nn.Module, second: nn.Module) -> None:
    """Raise unless both models hold the same parameters, value for value.

    The parameters are paired by position: a fused layer is one layer where PyTorch has two, so the
    names differ.
    """
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    if not all(torch.equal(ours, theirs) for ours, theirs in pairs):
        raise DemoError("The backends start from different weights, so they don't compare.")


# ---- training ------------------------------------------------------------------------------------


def warm_up(backend: str, options: Options, digits: Digits) -> None:
    """Take some steps with a learner of its own, so that no one-time cost is on the clock.

    The learners to be timed and the random numbers stay as they are.
    """
    with torch.random.fork_rng(devices=[]):
        learner = build(backend, options)
    for images, labels in batches(digits, options.batch_size)[:WARM_UP_STEPS]:
        learner.step(images, labels)


def evaluate(model: nn.Module, digits: Digits) -> float:
    """Return the model's accuracy on the digits."""
    model.eval()
    with torch.no_grad():
        correct = model(digits.images).argmax(dim=1) == digits.labels
    model.train()
    return correct.float().mean().item()


def epoch_order(backends: Sequence[str], epoch: int) -> list[str]:
    """Return which backend trains first in an epoch: they take turns, so that noise hits all."""
    return list(backends) if epoch % 2 == 0 else list(reversed(backends))


def train_epoch(learner: Learner, digits: Digits, size: int, bar: Bar) -> tuple[list[float], float]:
    """Train for one epoch; return the loss of each batch and the seconds it took."""
    losses = []
    start = time.perf_counter()
    for images, labels in batches(digits, size):
        losses.append(learner.step(images, labels))
        bar.update()
    return losses, time.perf_counter() - start


def train(options: Options, training: Digits, test: Digits) -> list[Run]:
    """Train every backend asked for, epoch by epoch in turns, and return their results."""
    learners = {backend: build(backend, options) for backend in options.backends}
    models = [learner.model for learner in learners.values()]
    for model in models[1:]:
        check_same_weights(models[0], model)
    for backend in learners:
        warm_up(backend, options, training)

    runs = {backend: Run(backend) for backend in learners}
    generator = torch.Generator().manual_seed(options.seed)
    steps = math.ceil(len(training) / options.batch_size)
    bar = progress_bar(steps * options.epochs * len(learners))
    for epoch in range(options.epochs):
        # Shuffled once for all backends: the same batches, and no copying on the clock.
        shuffled = training[torch.randperm(len(training), generator=generator)]
        for backend in epoch_order(options.backends, epoch):
            bar.set_description(f"{LABELS[backend]:10} epoch {epoch + 1}/{options.epochs}")
            learner, run = learners[backend], runs[backend]
            losses, seconds = train_epoch(learner, shuffled, options.batch_size, bar)
            accuracy = evaluate(learner.model, test)
            run.batch_losses += losses
            run.epochs.append(Epoch(sum(losses) / len(losses), accuracy, seconds))
    bar.close()
    return list(runs.values())


# ---- reporting -----------------------------------------------------------------------------------


class Bar:
    """A progress bar that shows nothing; also the part of tqdm's interface used here."""

    def update(self) -> None:
        """Count one batch."""

    def set_description(self, text: str) -> None:
        """Show what is being trained."""

    def close(self) -> None:
        """End the bar."""


def progress_bar(total: int) -> Bar:
    """Return tqdm's bar on a terminal, one that shows nothing elsewhere or without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        print("No progress bar: 'pip install tqdm' brings it.", file=sys.stderr)
        return Bar()
    # disable=None: only where stderr is a terminal.
    return tqdm(total=total, unit="batch", disable=None)


def describe_setup(options: Options, training: Digits, test: Digits) -> str:
    """Return the lines printed before training: versions, threads, data, hyperparameters."""
    threads = torch.get_num_threads()
    source = "bundled digits" if options.data is None else str(options.data)
    parts = [f"torch {torch.__version__}", f"{threads} thread{'s' if threads > 1 else ''}"]
    if needs_fastnn(options):
        parts.append(describe_fastnn())
    return (
        f"{', '.join(parts)}\n"
        f"MNIST ({source}): {len(training):,} training and {len(test):,} test images\n"
        f"MLP 784-128-64-10, {options.loss} loss, batch {options.batch_size}, SGD lr {options.lr}, "
        f"momentum {options.momentum}, seed {options.seed}"
    )


def needs_fastnn(options: Options) -> bool:
    """Return whether a backend to be trained is fastnn's."""
    return options.backends != ("torch",)


def describe_fastnn() -> str:
    """Return fastnn's version and which of its kernels run."""
    import fastnn
    from fastnn import env

    kernels = "plain PyTorch, its compiled kernels are missing"
    if fastnn.is_available():
        kernels = f"{env.collect()['instruction set in use']} kernels"
    return f"fastnn {fastnn.__version__} ({kernels})"


def time_ratio(fused: Run, stock: Run) -> float:
    """Return how many times as long the stock run took."""
    return stock.seconds / fused.seconds


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
        name, ratio = LABELS[run.backend], time_ratio(run, stock)
        difference = loss_difference(run, stock)
        lines += [
            f"PyTorch's time / {name}'s time: {ratio:.2f}",
            f"largest difference of the epoch losses: {difference:.1e}",
        ]
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


# ---- command line --------------------------------------------------------------------------------


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected an integer from {low} to {high}, got {text}"
            )
        return value

    return parse


def _number(accepts: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and accepts(value)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return parse


def _plot_path(text: str) -> Path | None:
    # Checked before training, not when the results are about to be drawn.
    if text == "none":
        return None
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected the name of a .png file or 'none', got {text}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: the folder {path.parent} does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: not writable; give another file or 'none'")
    return path


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Parse and check the command line; a wrong flag ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        description="Train an MNIST classifier with fastnn and with stock PyTorch, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Options()
    count = _integer(1, 1_000_000)
    momentum = _number(lambda value: 0 <= value < 1, "a number from 0 to below 1")
    lr = _number(lambda value: value > 0, "a number above 0")
    add = parser.add_argument
    add("--momentum", type=momentum, default=default.momentum, help="SGD's momentum")
    add("--lr", type=lr, default=default.lr, help="SGD's learning rate")
    add("--epochs", type=count, default=default.epochs, help="passes over the training images")
    add("--batch-size", type=count, default=default.batch_size, help="images per step")
    add("--seed", type=_integer(0, 2**63 - 1), default=default.seed, help="of weights and order")
    add(
        "--loss",
        choices=["nll", "cross_entropy"],
        default=default.loss,
        help="nll: LogSoftmax layer and NLLLoss; cross_entropy: CrossEntropyLoss on the logits",
    )
    add(
        "--backend",
        choices=[*LABELS, "all"],
        default=default.backend,
        help="what to train with; train_step: fastnn, a training step in one call",
    )
    add(
        "--threads",
        type=_integer(1, 1024),
        help="CPU threads (default: torch's choice)",
        default=argparse.SUPPRESS,
    )
    add(
        "--data",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="folder with MNIST's four IDX files, raw or .gz (default: the bundled digits)",
    )
    add(
        "--plot",
        type=_plot_path,
        metavar="FILE.png",
        default="mnist.png",
        help="where to draw the results; 'none' draws nothing",
    )
    return Options(**vars(parser.parse_args(arguments)))


def require_fastnn() -> None:
    """Raise a DemoError that says what to do unless fastnn can be imported."""
    try:
        importlib.import_module("fastnn")
    except ImportError as error:
        raise DemoError(
            f"fastnn cannot be imported ({error}): install it with 'pip install "
            "--no-build-isolation .' in the repository's root, or pass --backend torch."
        ) from None


def run_demo(options: Options) -> list[Run]:
    """Train as the options say, print the comparison and draw the plot."""
    if needs_fastnn(options):
        require_fastnn()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    training, test = load_digits(options.data)
    print(describe_setup(options, training, test), flush=True)
    runs = train(options, training, test)
    print(f"\n{format_table(runs)}\n")
    if options.plot is not None:
        if draw(runs, options.plot):
            print(f"Plot: {options.plot}")
        else:
            print("No plot: 'pip install matplotlib' brings it.", file=sys.stderr)
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the command line and return the exit code."""
    options = parse_options(arguments)
    try:
        run_demo(options)
    except (DemoError, IdxError) as error:
        print(f"mnist.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
