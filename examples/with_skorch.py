"""skorch: a fused MLP as a scikit-learn classifier.

python examples/with_skorch.py
"""

from __future__ import annotations

import torch
from digits import load_digits
from skorch import NeuralNetClassifier
from torch import nn

import fastnn


def mlp(hidden: int = 128) -> nn.Module:
    return fastnn.fuse(
        nn.Sequential(
            nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    )


def classifier(**more) -> NeuralNetClassifier:
    options = {
        "criterion": fastnn.nn.CrossEntropyLoss,
        "optimizer": fastnn.optim.SGD,
        "optimizer__momentum": 0.9,
        "lr": 0.05,
        "batch_size": 64,
        "max_epochs": 3,
        "iterator_train__shuffle": True,
        "train_split": None,
        "verbose": 0,
    }
    return NeuralNetClassifier(mlp, **options | more)


def main() -> None:
    torch.manual_seed(0)
    training, test = load_digits(None)
    net = classifier(verbose=1)
    net.fit(training.images, training.labels)
    print(f"accuracy on digits not trained on: {net.score(test.images, test.labels):.3f}")


if __name__ == "__main__":
    main()
