"""Trains the same MNIST classifier with fastnn and with stock PyTorch and compares the two.

    python examples/mnist.py                     ten epochs on the digits bundled with the repo
    python examples/mnist.py --data DIR          the full MNIST, from its four IDX files
    python examples/mnist.py --notebook          a smaller learning rate, no momentum, five epochs
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
from dataclasses import dataclass
from pathlib import Path

import torch
from digits import Digits, batches, load_digits
from idx import IdxError
from mnist_report import LABELS, Epoch, Run, draw, format_table
from torch import nn

WARM_UP_STEPS = 20
# As the notebooks that teach this network train it: slowly.
NOTEBOOK = {"momentum": 0.0, "lr": 0.003, "epochs": 5}


class DemoError(Exception):
    """The demo cannot run as asked; the message is one sentence for the user."""


@dataclass(frozen=True)
class Options:
    """What the flags ask for."""

    momentum: float = 0.9
    lr: float = 0.01
    epochs: int = 10
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
        print("No progress bar: 'pip install tqdm' adds it.", file=sys.stderr)
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
    add(
        "--notebook",
        action="store_true",
        help="other defaults: lr 0.003, no momentum, 5 epochs (as the notebooks train it)",
    )
    if parser.parse_args(arguments).notebook:
        parser.set_defaults(**NOTEBOOK)
    flags = vars(parser.parse_args(arguments))
    del flags["notebook"]
    return Options(**flags)


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
            print("No plot: 'pip install matplotlib' adds it.", file=sys.stderr)
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
