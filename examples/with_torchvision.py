"""torchvision: the training step of PyTorch's autograd tutorial; then, what can be fused in VGG.

python examples/with_torchvision.py
"""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import resnet18, vgg16

import fastnn


def step() -> nn.Module:
    """A ResNet has no Linear before a ReLU, so only the optimizer is replaced."""
    torch.manual_seed(0)
    model = resnet18()
    optimizer = fastnn.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    data, labels = torch.rand(100, 3, 64, 64), torch.rand(100, 1000)
    prediction = model(data)
    loss = (prediction - labels).sum()
    loss.backward()
    optimizer.step()
    return model


def main() -> None:
    for name, parameter in step().named_parameters():
        print(f"{name:32} gradient's norm {parameter.grad.norm():.3g}")
    with torch.device("meta"):  # the structure is enough: VGG's weights take half a gigabyte
        fastnn.fuse(vgg16(), inplace=True, verbose=True)


if __name__ == "__main__":
    main()
