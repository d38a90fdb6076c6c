"""fastnn: fused neural-network training kernels for PyTorch.

Import the layers, losses and the optimizer from here and train as before; the numbers are
PyTorch's, only faster:

>>> import torch, fastnn
>>> model = torch.nn.Sequential(fastnn.nn.LinearReLU(8, 4), torch.nn.Linear(4, 3))
>>> optimizer = fastnn.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
>>> loss = fastnn.nn.CrossEntropyLoss()(model(torch.randn(2, 8)), torch.tensor([0, 2]))
>>> loss.backward()
>>> optimizer.step()
"""

from fastnn import autograd, functional, nn, optim, reference
from fastnn._extension import is_available
from fastnn.fusion import FusionReport, fuse, fusion_report, unfuse
from fastnn.training import StepReport, TrainStep, train_step

__all__ = [
    "FusionReport",
    "StepReport",
    "TrainStep",
    "__version__",
    "autograd",
    "functional",
    "fuse",
    "fusion_report",
    "is_available",
    "nn",
    "optim",
    "reference",
    "train_step",
    "unfuse",
]

__version__ = "0.2.0"
