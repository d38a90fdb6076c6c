"""The table and the picture that the MNIST demo ends with."""

from __future__ import annotations

import math

import pytest

from support.examples import load

report = load("mnist_report")

pytestmark = pytest.mark.cpu_only("the example's report")


def make_run(backend: str, losses: list[float], seconds: float) -> report.Run:
    epochs = [report.Epoch(loss, 0.5, seconds) for loss in losses]
    return report.Run(backend, epochs, batch_losses=[losses[0]] * 10 * len(losses))


def test_table_of_all_backends():
    runs = [
        make_run("fastnn", [2.0, 1.0], 0.5),
        make_run("train_step", [2.0, 1.125], 0.4),
        make_run("torch", [2.0, 1.25], 1.0),
    ]
    lines = report.format_table(runs).splitlines()
    assert lines[1].split() == ["epoch", *["fastnn", "train_step", "PyTorch"] * 3]
    others = [*["0.5000"] * 3, "0.500", "0.400", "1.000"]
    assert lines[2].split() == ["1", "2.0000", "2.0000", "2.0000", *others]
    assert lines[3].split() == ["2", "1.0000", "1.1250", "1.2500", *others]
    assert lines[4].split() == ["total", "1.000", "0.800", "2.000"]
    assert len({len(line) for line in lines[:5]}) == 1  # the columns line up
    assert lines[-3:] == [
        "",
        "fastnn: 2.00 times as fast as PyTorch; the epoch losses differ by at most 2.5e-01",
        "train_step: 2.50 times as fast as PyTorch; the epoch losses differ by at most 1.2e-01",
    ]


def test_table_of_one_backend_compares_nothing():
    table = report.format_table([make_run("torch", [2.0], 1.0)])
    assert "fastnn" not in table
    assert table.splitlines()[-1].split() == ["total", "1.000"]


def test_table_columns_hold_any_loss():
    usual = report.format_table([make_run("torch", [2.0] * 4, 1.0)])
    strange = report.format_table([make_run("torch", [9999.99994, 1e30, math.inf, math.nan], 1.0)])
    assert [len(line) for line in strange.splitlines()] == [len(s) for s in usual.splitlines()]
    losses = [line.split()[1] for line in strange.splitlines()[2:6]]
    assert losses == ["9999.9999", "1.0e+30", "inf", "nan"]


def test_a_nan_loss_is_not_hidden_from_the_difference():
    diverged = make_run("fastnn", [1.0, math.nan, 1.0], 1.0)
    assert math.isnan(report.loss_difference(diverged, make_run("torch", [1.0, 1.0, 3.0], 1.0)))


@pytest.mark.parametrize("backends", [tuple(report.LABELS), ("torch",)])
def test_plot_shows_curves_and_bars(tmp_path, backends, monkeypatch):
    from matplotlib import pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    runs = [make_run(backend, [2.0, 1.0, 0.5], 1.0) for backend in backends]
    path = tmp_path / "plot.png"
    assert report.draw(runs, path)
    left, right = figures[0].axes
    names = {report.LABELS[backend] for backend in backends}
    assert {line.get_label() for line in left.lines} == names
    assert len(right.patches) == 3 * len(backends)
    assert {text.get_text().split(":")[0] for text in right.get_legend().get_texts()} == names
    assert (left.get_xlabel(), right.get_xlabel(), right.get_ylabel()) == (
        "epoch",
        "epoch",
        "seconds",
    )
    assert "loss" in left.get_ylabel()
    pixels = plt.imread(path)
    assert pixels.shape[1] > pixels.shape[0] >= 400
    assert pixels.std() > 0.05  # not blank
    monkeypatch.undo()
    plt.close(figures[0])


def test_plot_of_one_epoch_has_whole_ticks(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    assert report.draw([make_run("torch", [2.0], 1.0)], tmp_path / "plot.png")
    right = figures[0].axes[1]
    low, high = right.get_xlim()
    assert [tick for tick in right.get_xticks() if low <= tick <= high] == [1]
    monkeypatch.undo()
    plt.close(figures[0])


def test_moving_average():
    assert report.smooth([1.0, 3.0, 5.0, 7.0], 2).tolist() == [2.0, 4.0, 6.0]
