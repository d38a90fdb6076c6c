"""skorch: a fused model as scikit-learn's tools treat it."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

import fastnn
from support.examples import STOCK, assert_learns_as_stock, fused_paths, load

program = load("with_skorch")


@pytest.fixture(scope="module")
def digits():
    training, test = program.load_digits(None)
    return training[torch.arange(1500)], test[torch.arange(500)]


def fitted(digits, **more):
    torch.manual_seed(0)
    return program.classifier(**more).fit(digits[0].images, digits[0].labels)


def losses_of(net) -> list[float]:
    return [batch["train_loss"] for epoch in net.history for batch in epoch["batches"]]


def test_it_learns_as_stock(digits, monkeypatch):
    net = fitted(digits)
    assert fused_paths(net.module_) == ["0", "2"]
    assert isinstance(net.criterion_, fastnn.nn.CrossEntropyLoss)
    assert net.score(digits[1].images, digits[1].labels) > 0.5  # by chance: 0.1
    monkeypatch.setattr(program, "fastnn", STOCK)
    stock = fitted(digits)
    assert_learns_as_stock(losses_of(net), losses_of(stock))


def test_probabilities(digits):
    """skorch decides on a softmax by the loss's class."""
    net = fitted(digits, max_epochs=1)
    probabilities = net.predict_proba(digits[1].images)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    logits = net.module_.eval()(digits[1].images)
    np.testing.assert_allclose(probabilities, logits.softmax(1).detach(), rtol=1e-4, atol=1e-6)


def test_pickled_and_cloned(digits):
    net = fitted(digits, max_epochs=1)
    images = digits[1].images
    again = pickle.loads(pickle.dumps(net))
    assert fused_paths(again.module_) == ["0", "2"]
    np.testing.assert_array_equal(again.predict_proba(images), net.predict_proba(images))
    for trained in (again, net):
        torch.manual_seed(1)
        trained.partial_fit(digits[0].images, digits[0].labels)
    # The momentum was saved, too, or the second of these batches would differ.
    assert again.history[-1]["batches"] == net.history[-1]["batches"]
    assert clone(net).optimizer is fastnn.optim.SGD


def test_grid_search(digits):
    net = program.classifier(max_epochs=1)
    grid = {"lr": [1e-5, 0.05], "module__hidden": [16]}
    search = GridSearchCV(net, grid, cv=2, scoring="accuracy", refit=False)
    search.fit(digits[0].images.numpy(), digits[0].labels.numpy())
    assert search.best_params_["lr"] == 0.05


def test_the_program_runs(capsys):
    program.main()
    accuracy = float(capsys.readouterr().out.split()[-1])
    assert accuracy > 0.8
