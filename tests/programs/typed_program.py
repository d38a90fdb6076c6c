"""A user's program for the type checker (``make lint``): it must infer the types below with the
installed package."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import fastnn
from fastnn.functional import cross_entropy, linear, linear_relu, log_softmax, mlp, nll_loss

x, target = torch.randn(2, 8), torch.tensor([0, 2])

# --- layers and losses ----------------------------------------------------------------------------

assert_type(fastnn.nn.Linear(8, 4)(x), Tensor)
assert_type(fastnn.nn.LinearReLU(8, 4)(x), Tensor)
assert_type(fastnn.nn.MLP(8, 4, 2)(x), Tensor)
assert_type(fastnn.nn.MLP(8, (4, 4), 2, bias=False, dtype=torch.float32)(x), Tensor)
assert_type(fastnn.nn.LogSoftmax(dim=1)(x), Tensor)
assert_type(fastnn.nn.NLLLoss()(x, target), Tensor)
assert_type(fastnn.nn.CrossEntropyLoss(label_smoothing=0.1)(x, target), Tensor)
assert_type(fastnn.nn.CrossEntropyLoss().decodes(x), Tensor)

# --- functions ------------------------------------------------------------------------------------

assert_type(linear(x, torch.randn(4, 8)), Tensor)
assert_type(linear_relu(x, torch.randn(4, 8)), Tensor)
assert_type(mlp(x, [torch.randn(4, 8)]), Tensor)
assert_type(mlp(x, [torch.randn(4, 8)], [None], ("relu",)), Tensor)
assert_type(log_softmax(x, 1, dtype=torch.float64), Tensor)
assert_type(nll_loss(x, target, reduction="sum"), Tensor)
assert_type(cross_entropy(x, target, label_smoothing=0.1), Tensor)
assert_type(fastnn.autograd.LogSoftmax.apply(x, 1), Tensor)

# --- the optimizer --------------------------------------------------------------------------------

optimizer = fastnn.optim.SGD(torch.nn.Linear(8, 4).parameters(), lr=0.1, momentum=0.9)
assert_type(optimizer, fastnn.optim.SGD)
stock: torch.optim.Optimizer = optimizer
torch.optim.lr_scheduler.StepLR(optimizer, 10)
assert_type(fastnn.optim.SGD.from_torch(torch.optim.SGD([torch.nn.Parameter(x)])), fastnn.optim.SGD)

# --- fusion ---------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    size = 8


assert_type(fastnn.fuse(Model()), Model)
assert_type(fastnn.fuse(Model(), inplace=True).size, int)
assert_type(fastnn.fuse(torch.nn.Sequential()), torch.nn.Sequential)
assert_type(fastnn.unfuse(fastnn.nn.LinearReLU(8, 4)), torch.nn.Module)
assert_type(fastnn.fusion_report(Model()).left[0].reason, str)
assert_type(fastnn.is_available(), bool)

# --- training -------------------------------------------------------------------------------------

step = fastnn.train_step(Model(), fastnn.nn.CrossEntropyLoss(), optimizer, accumulate=2)
assert_type(step, fastnn.TrainStep)
assert_type(fastnn.train_step(Model(), cross_entropy, stock, clip_grad_norm=1.0)(x, target), Tensor)
assert_type(step(x, target), Tensor)
assert_type(step((x, x), {"labels": target}), Tensor)
assert_type(step.report().reasons["fused"], str)
step.flush()
