"""The MNIST demo in examples/: training and the command line."""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fastnn
from fastnn import env
from support.examples import EXAMPLES, load
from support.mnist_files import TRAIN, write_mnist

digits, mnist = map(load, ("digits", "mnist"))
report = load("mnist_report")

pytestmark = pytest.mark.cpu_only("the example, which trains in processes of its own")

# Both backends compute the same float32 formulas but may add in another order: a sum of 784 terms
# is off by about sqrt(784) * 2**-24 = 2e-6 of its size, and so is each step of the weights. For the
# first 20 or so steps that stays below 1e-5 of the loss (measured: 2.4e-7, one unit in the last
# place); an untrained bias, or a weight gradient rounded to bfloat16, moves it by 2e-5 to 1e-3.
STEP_TOLERANCE = 1e-5
# Later on a unit whose input is within rounding of zero may count as positive for one backend only,
# and the step then misses that unit. Done on purpose at random steps, once a run, this moved the
# epoch losses by up to 2e-5 at the demo's learning rate, by up to 7e-4 at ten times its rate.
EPOCH_TOLERANCE = 1e-4
FAST_EPOCH_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def bundled() -> tuple[digits.Digits, digits.Digits]:
    return digits.load_digits(None)


@pytest.fixture(autouse=True)
def one_thread():
    """Run on one thread: on a busy machine, waiting for a second one takes most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_script(*flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the demo as a user does, with the fastnn that this test imports."""
    paths = [str(Path(fastnn.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "mnist.py"), *flags],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# ---- the whole demo ------------------------------------------------------------------------------


def test_script_trains_all_backends_and_draws(tmp_path):
    flags = "--notebook --epochs 1 --threads 1 --plot out.png"
    result = run_script(*flags.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"torch {torch.__version__}, 1 thread," in result.stdout
    instruction_set = env.collect()["instruction set in use"]
    kernels = f"{instruction_set} kernels" if fastnn.is_available() else "plain PyTorch"
    assert f"fastnn {fastnn.__version__} ({kernels}" in result.stdout
    assert "8,500 training and 1,500 test images" in result.stdout
    row = re.search(r"^ +1((?: +[\d.]+){9})$", result.stdout, re.MULTILINE)
    assert row, result.stdout
    numbers = [float(number) for number in row[1].split()]
    losses, accuracies, seconds = numbers[:3], numbers[3:6], numbers[6:]
    # Below the loss of a uniform guess: it learned something in its one epoch.
    assert 0 < losses[0] < math.log(10)
    assert losses == pytest.approx(
        [losses[-1]] * 3, abs=EPOCH_TOLERANCE + 1e-4
    )  # the table shows four digits
    assert accuracies == pytest.approx([accuracies[-1]] * 3, abs=0.01)
    assert accuracies[0] > 0.15  # a guess gets 0.1; one epoch at this lr gets 0.29
    total = re.search(r"^total((?: +[\d.]+){3})$", result.stdout, re.MULTILINE)
    assert total, result.stdout
    assert [float(number) for number in total[1].split()] == seconds
    for name, ours in (("fastnn", seconds[0]), ("train_step", seconds[1])):
        ratio = re.search(rf"^{name}: ([\d.]+) times as fast", result.stdout, re.MULTILINE)
        assert ratio, result.stdout
        assert float(ratio[1]) == pytest.approx(seconds[2] / ours, rel=0.1)  # few digits
    differences = re.findall(r"the epoch losses differ by at most (\S+)", result.stdout)
    assert len(differences) == 2, result.stdout
    assert max(map(float, differences)) <= EPOCH_TOLERANCE
    assert "Plot: out.png" in result.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "batch/s" not in result.stderr  # no progress bar where stderr is no terminal


def test_the_demo_learns_the_digits(bundled):
    (run,) = mnist.train(mnist.Options(backend="train_step"), *bundled)
    assert run.epochs[-1].accuracy > 0.9


# lr 0.03 where there is no momentum to speed it up, so that both settings learn soon.
FAST = [{"lr": 0.03, "momentum": 0.0}, {"lr": 0.003, "momentum": 0.9}]


@pytest.mark.parametrize("loss", ["nll", "cross_entropy"])
@pytest.mark.parametrize("fast", FAST, ids=str)
def test_losses_agree_step_by_step(bundled, loss, fast):
    training, test = bundled
    few = training[torch.arange(670)]  # eleven batches, the last one of 30
    runs = mnist.train(mnist.Options(epochs=2, loss=loss, **fast), few, test)
    assert [run.backend for run in runs] == ["fastnn", "train_step", "torch"]
    assert [len(run.batch_losses) for run in runs] == [22, 22, 22]
    for run in runs[:-1]:
        difference = np.abs(np.subtract(run.batch_losses, runs[-1].batch_losses))
        assert difference.max() <= STEP_TOLERANCE


@pytest.mark.parametrize("loss", ["nll", "cross_entropy"])
@pytest.mark.parametrize("fast", FAST, ids=str)
def test_losses_fall(bundled, loss, fast):
    runs = mnist.train(mnist.Options(epochs=2, loss=loss, **fast), *bundled)
    for run in runs:
        assert np.isfinite(run.batch_losses).all()
        assert run.batch_losses[0] == pytest.approx(math.log(10), abs=0.1)  # an untrained guess
        first, second = run.epochs
        assert second.loss < first.loss - 0.3
        assert second.accuracy > 0.7
        assert min(first.seconds, second.seconds) > 0
    for run in runs[:-1]:
        assert report.loss_difference(run, runs[-1]) <= FAST_EPOCH_TOLERANCE


def test_both_loss_flags_train_alike(bundled):
    # Cross entropy is LogSoftmax and NLLLoss in one: only the model's last layer differs.
    slowly = mnist.Options(**mnist.NOTEBOOK | {"epochs": 1}, backend="fastnn")
    (nll,) = mnist.train(slowly, *bundled)
    (entropy,) = mnist.train(replace(slowly, loss="cross_entropy"), *bundled)
    assert report.loss_difference(nll, entropy) <= EPOCH_TOLERANCE
    kinds = {
        loss: [type(layer) for layer in mnist.build("fastnn", mnist.Options(loss=loss)).model]
        for loss in ("nll", "cross_entropy")
    }
    assert kinds["nll"] == [*kinds["cross_entropy"], fastnn.nn.LogSoftmax]


def test_fastnn_backend_is_built_from_fastnn():
    learner = mnist.build("fastnn", mnist.Options(momentum=0.9, lr=0.01))
    assert [type(layer) for layer in learner.model] == [
        fastnn.nn.LinearReLU,
        fastnn.nn.LinearReLU,
        torch.nn.Linear,
        fastnn.nn.LogSoftmax,
    ]
    assert type(learner.criterion) is fastnn.nn.NLLLoss
    assert type(learner.optimizer) is fastnn.optim.SGD
    assert (learner.optimizer.defaults["lr"], learner.optimizer.defaults["momentum"]) == (0.01, 0.9)


def test_train_step_backend_is_fastnn_s_in_one_call():
    one, loop = (mnist.build(backend, mnist.Options()) for backend in ("train_step", "fastnn"))
    mnist.check_same_weights(one.model, loop.model)
    assert isinstance(one.train_step, fastnn.TrainStep)
    assert type(one.criterion) is type(loop.criterion)
    assert type(one.optimizer) is type(loop.optimizer)


def test_same_seed_same_run_other_seed_other_run(bundled):
    options = mnist.Options(epochs=1, backend="torch")
    first, again, other = (
        mnist.train(replace(options, seed=seed), *bundled)[0].batch_losses for seed in (1, 1, 2)
    )
    assert first == again
    assert first[0] != other[0]
    weights = [mnist.build("torch", replace(options, seed=seed)).model[0].weight for seed in (1, 2)]
    assert not torch.equal(*weights)


def test_full_set_from_a_folder(tmp_path, capsys):
    # One raw file among the gzipped ones: both are read.
    folder = write_mnist(tmp_path)
    raw = folder / TRAIN[0]
    raw.write_bytes(gzip.decompress((folder / f"{TRAIN[0]}.gz").read_bytes()))
    (folder / f"{TRAIN[0]}.gz").unlink()
    code = mnist.main(
        ["--data", str(folder), "--epochs", "2", "--plot", "none", "--backend", "torch"]
    )
    output = capsys.readouterr().out
    assert code == 0
    assert "100 training and 20 test images" in output
    assert re.search(r"^ +2( +[\d.]+){3}$", output, re.MULTILINE), output
    assert "Plot" not in output


# ---- parts ---------------------------------------------------------------------------------------


def test_backends_start_from_the_same_weights():
    ours, theirs = (mnist.build(backend, mnist.Options(seed=3)) for backend in ("fastnn", "torch"))
    mnist.check_same_weights(ours.model, theirs.model)
    with torch.no_grad():
        next(theirs.model.parameters())[0, 0] += 1e-3
    with pytest.raises(mnist.DemoError, match="different weights"):
        mnist.check_same_weights(ours.model, theirs.model)


def test_warm_up_takes_steps_and_leaves_no_trace(bundled, monkeypatch):
    steps = []
    monkeypatch.setattr(mnist.Learner, "step", lambda *batch: steps.append(batch))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    mnist.warm_up("torch", mnist.Options(seed=5), bundled[0])
    assert len(steps) == mnist.WARM_UP_STEPS
    assert torch.equal(torch.get_rng_state(), before)


def test_training_starts_from_the_initial_weights(bundled):
    # The loss of the very first batch, by hand: no warm-up step has touched the timed model.
    options = mnist.Options(epochs=1, seed=4)
    training, _ = bundled
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(4))
    first = training[order[:64]]
    for run in mnist.train(options, *bundled):
        fresh = mnist.build(run.backend, options)
        loss = fresh.criterion(fresh.model(first.images), first.labels).item()
        assert run.batch_losses[0] == pytest.approx(loss, abs=STEP_TOLERANCE)


def test_backends_take_turns_and_see_the_same_batches(bundled, monkeypatch):
    seen = []

    def record(learner, digits, size, bar):
        seen.append((type(learner.optimizer), digits.labels))
        return [1.0], 1.0

    monkeypatch.setattr(mnist, "train_epoch", record)
    mnist.train(mnist.Options(epochs=3), *bundled)
    ours, theirs = fastnn.optim.SGD, torch.optim.SGD
    turn = [ours, ours, theirs]
    assert [kind for kind, _ in seen] == [*turn, *reversed(turn), *turn]
    orders = [labels for _, labels in seen]
    for epoch in range(3):
        first, *others = orders[3 * epoch : 3 * epoch + 3]
        assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(orders[0], orders[3])  # shuffled anew in each epoch


def test_accuracy():
    class FirstPixelIsTheLabel(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(images[:, 0].long(), 10)

    four = digits.Digits(torch.tensor([[3.0], [1.0], [4.0], [1.0]]), torch.tensor([3, 1, 4, 5]))
    assert mnist.evaluate(FirstPixelIsTheLabel(), four) == 0.75


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal_only(monkeypatch):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        bar = mnist.progress_bar(2)
        bar.set_description("fastnn epoch 1/1")
        bar.update()
        bar.close()
        assert ("fastnn epoch 1/1" in stream.getvalue()) == shown


def test_torch_backend_runs_on_torch_alone(tmp_path, monkeypatch, capsys):
    for module in ("tqdm", "matplotlib", "fastnn"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    monkeypatch.chdir(tmp_path)
    data = write_mnist(tmp_path)
    assert mnist.main(["--epochs", "1", "--backend", "torch", "--data", str(data)]) == 0
    output, errors = capsys.readouterr()
    assert "total" in output
    assert errors.splitlines() == [
        "No progress bar: 'pip install tqdm' adds it.",
        "No plot: 'pip install matplotlib' adds it.",
    ]
    assert not (tmp_path / "mnist.png").exists()


def test_missing_fastnn_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastnn", None)
    assert mnist.main(["--plot", "none"]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert "fastnn cannot be imported" in errors
    assert "--backend torch" in errors
    assert errors.count("\n") == 1


def test_missing_folder_is_one_sentence(tmp_path, capsys):
    folder = tmp_path / "nowhere"
    assert mnist.main(["--data", str(folder), "--plot", "none", "--backend", "torch"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"mnist.py: error: {folder}: found no such folder, expected")
    assert errors.count("\n") == 1


def test_script_exits_with_2_and_no_traceback(tmp_path):
    result = run_script("--data", "nowhere", "--backend", "torch", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("mnist.py: error: nowhere: ")
    assert result.stderr.count("\n") == 1


# ---- flags ---------------------------------------------------------------------------------------


BAD_FLAGS = [
    (["--lr", "-0.1"], "--lr: expected a number above 0, got -0.1"),
    (["--lr", "0"], "--lr: expected a number above 0, got 0"),
    (["--lr", "nan"], "--lr: expected a number above 0, got nan"),
    (["--lr", "inf"], "--lr: expected a number above 0, got inf"),
    (["--lr", "fast"], "--lr: expected a number above 0, got fast"),
    (["--momentum", "-0.5"], "--momentum: expected a number from 0 to below 1, got -0.5"),
    (["--momentum", "1"], "--momentum: expected a number from 0 to below 1, got 1"),
    (["--epochs", "0"], "--epochs: expected an integer from 1"),
    (["--epochs", "1.5"], "--epochs: expected an integer from 1"),
    (["--batch-size", "0"], "--batch-size: expected an integer from 1"),
    (["--batch-size", "-64"], "--batch-size: expected an integer from 1"),
    (["--threads", "0"], "--threads: expected an integer from 1"),
    (["--threads", "1025"], "--threads: expected an integer from 1 to 1024, got 1025"),
    (["--seed", "-1"], "--seed: expected an integer from 0"),
    (["--loss", "mse"], "--loss: invalid choice: 'mse'"),
    (["--backend", "jax"], "--backend: invalid choice: 'jax'"),
    (["--plot", "out.txt"], "--plot: expected the name of a .png file or 'none', got out.txt"),
    (["--plot", "no/such/folder/out.png"], "--plot: no/such/folder/out.png: the folder"),
    (["--speed", "9"], "unrecognized arguments: --speed 9"),
]


@pytest.mark.parametrize(
    ("flags", "message"), BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS]
)
def test_bad_flags(capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        mnist.parse_options(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_defaults():
    assert mnist.parse_options(["--plot", "none"]) == mnist.Options(
        momentum=0.9,
        lr=0.01,
        epochs=10,
        batch_size=64,
        seed=0,
        loss="nll",
        backend="all",
        threads=None,
        data=None,
        plot=None,
    )


def test_the_notebook_s_settings_are_other_defaults():
    flags = ["--plot", "none", "--notebook"]
    notebook = mnist.parse_options(flags)
    assert (notebook.lr, notebook.momentum, notebook.epochs) == (0.003, 0.0, 5)
    assert mnist.parse_options(["--epochs", "2", *flags]) == replace(notebook, epochs=2)
    assert mnist.parse_options([*flags, "--lr", "0.1"]) == replace(notebook, lr=0.1)


def test_plot_default_and_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mnist.parse_options([]).plot == Path("mnist.png")
    assert mnist.parse_options(["--plot", "none"]).plot is None
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit):
        mnist.parse_options(["--plot", "folder.png"])


def test_every_flag_reaches_the_options(tmp_path):
    flags = (
        f"--momentum 0.9 --lr 0.1 --epochs 2 --batch-size 32 --seed 7 --loss cross_entropy "
        f"--backend torch --threads 3 --data data --plot {tmp_path / 'a.PNG'}"
    )
    assert mnist.parse_options(flags.split()) == mnist.Options(
        momentum=0.9,
        lr=0.1,
        epochs=2,
        batch_size=32,
        seed=7,
        loss="cross_entropy",
        backend="torch",
        threads=3,
        data=Path("data"),
        plot=tmp_path / "a.PNG",
    )


def test_batch_size_and_momentum_reach_the_training(bundled):
    options = mnist.Options(epochs=1, backend="torch", batch_size=4_000)
    (run,) = mnist.train(options, *bundled)
    assert len(run.batch_losses) == 3  # 4000 + 4000 + 500
    for backend in ("fastnn", "torch"):
        assert (
            mnist.build(backend, replace(options, momentum=0.25)).optimizer.defaults["momentum"]
            == 0.25
        )
