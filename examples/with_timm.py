"""timm: a small vision transformer with ReLU, its twelve MLPs fused.

python examples/with_timm.py
"""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

import fastnn


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Noise with one brighter channel; which one is the class."""
    labels = torch.randint(3, (count,))
    images = torch.rand(count, 3, 32, 32)
    images[torch.arange(count), labels] += 1
    return images, labels


def train() -> tuple[nn.Module, list[float]]:
    """Returns the model and the loss of each step."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", act_layer="relu", img_size=32, patch_size=8, num_classes=3
    )
    model = fastnn.fuse(model, verbose=True)
    loss_fn = fastnn.nn.CrossEntropyLoss()
    optimizer = fastnn.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(20):
        images, labels = pictures(16)
        optimizer.zero_grad()
        loss = loss_fn(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def main() -> None:
    _, losses = train()
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} in the end")


if __name__ == "__main__":
    main()
