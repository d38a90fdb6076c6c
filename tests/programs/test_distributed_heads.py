"""linear_cross_entropy in two gloo processes, compared with one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastnn
from fastnn._head_statistics import STATISTICS
from support import processes

pytestmark = pytest.mark.cpu_only("processes talk over gloo, whatever the kernels")

RANKS = 2
ROWS, FEATURES, CLASSES = 6, 4, 7


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.detach()


# --- split by classes -----------------------------------------------------------------------------

TARGETS = {
    "indices": torch.tensor([0, 6, -100, 3, 2, 4]),
    "probabilities": torch.arange(42.0).reshape(ROWS, CLASSES).sin().double().softmax(1),
}
VOCABULARY = {
    "mean": {},
    "none": {"reduction": "none"},
    "options": {"reduction": "sum", "softcap": 2.0, "logit_scale": 0.5, "z_loss": 0.1},
    "normalizer": {"normalizer": 3},
    "smoothing": {"label_smoothing": 0.2, "logit_scale": 0.5},
    "returns": {"softcap": 2.0, "returns": STATISTICS},
    # PyTorch runs it: a sum of capped logits.
    "smoothing and a cap": {"label_smoothing": 0.2, "softcap": 2.0},
    "probabilities": {"label_smoothing": 0.2, "z_loss": 0.1},
}


def call_head(mesh: DeviceMesh, kind: str, name: str, classes: int) -> list[Tensor]:
    """The results and the three gradients of a call, with whole or split tensors."""
    torch.manual_seed(0)
    leaves = [torch.randn(ROWS, FEATURES), torch.randn(classes, FEATURES), torch.randn(classes)]
    leaves = [leaf.double() for leaf in leaves]
    if kind != "whole":
        leaves[1:] = (distribute_tensor(each, mesh, [Shard(0)]) for each in leaves[1:])
    if kind == "DTensor":
        leaves[0] = distribute_tensor(leaves[0], mesh, [Replicate()])
    x, w, b = leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    target = TARGETS[name if name in TARGETS else "indices"]
    if classes < CLASSES:
        target = target.clamp_max(classes - 1)
    if kind == "DTensor" and name == "smoothing and a cap":  # torch's operators take no mixture
        target = distribute_tensor(target, mesh, [Replicate()])
    options = {"weight": torch.rand(classes).double(), **VOCABULARY[name]}
    if isinstance(w, DTensor) and name == "smoothing and a cap":
        options["weight"] = distribute_tensor(options["weight"], mesh, [Replicate()])
    results = fastnn.functional.linear_cross_entropy(x, w, target, linear_bias=b, **options)
    results = results if isinstance(results, tuple) else [results]
    total = sum(each.square().sum() for each in results if each.requires_grad)
    return [*map(whole, (*results, *torch.autograd.grad(total, leaves)))]


def split_by_classes(rank: int) -> dict[str, list[Tensor]]:
    mesh = init_device_mesh("cpu", (RANKS,))
    calls = {name: (name, CLASSES) for name in VOCABULARY}
    calls["a process without classes"] = ("mean", 1)
    results = {}
    for label, call in calls.items():
        for kind in ("whole", "tensor", "DTensor"):
            if (label, kind) == ("smoothing and a cap", "tensor"):
                continue
            results[f"{label}, {kind}"] = call_head(mesh, kind, *call)
    return results


@pytest.mark.capability("processes", "tensor parallelism", operators=["linear_cross_entropy"])
def test_split_by_classes(tmp_path):
    """One process has four of the seven classes."""
    for results in processes.run_ranks(tmp_path, RANKS, split_by_classes):
        for name, values in results.items():
            torch.testing.assert_close(values, results[f"{name.split(',')[0]}, whole"])


# --- split by rows --------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = fastnn.nn.LinearReLU(FEATURES, 5)
        self.head = fastnn.nn.LinearCrossEntropyLoss(5, CLASSES, bias=True, z_loss=0.1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.head(self.trunk(x), target)


def gradients(mesh: DeviceMesh | None, kind: str, rows: slice) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Classifier().double()
    x, target = torch.randn(ROWS, FEATURES).double(), torch.arange(ROWS)
    call = model
    if kind == "DistributedDataParallel":
        call = DistributedDataParallel(model)
    elif kind == "fully_shard":
        for part in (model.trunk, model.head, model):
            fully_shard(part, mesh=mesh)
    call(x[rows], target[rows]).backward()
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


def error_of_a_layer_that_is_sharded_by_itself(mesh: DeviceMesh) -> str:
    head = fastnn.nn.LinearCrossEntropyLoss(FEATURES, CLASSES)
    fully_shard(head.linear, mesh=mesh)
    try:
        head(torch.randn(ROWS, FEATURES), torch.arange(ROWS))
    except RuntimeError as error:
        return str(error)
    return "none"


def split_by_rows(rank: int) -> list[dict[str, Tensor] | str]:
    mesh = init_device_mesh("cpu", (RANKS,))
    rows = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    kinds = "DistributedDataParallel", "fully_shard"
    error = error_of_a_layer_that_is_sharded_by_itself(mesh)
    return [*(gradients(mesh, kind, rows) for kind in kinds), error]


@pytest.mark.capability(
    "processes", "`DistributedDataParallel`", operators=["linear_cross_entropy"]
)
@pytest.mark.capability("processes", "FSDP2: `fully_shard`", operators=["linear_cross_entropy"])
def test_split_by_rows(tmp_path):
    """The mean of the processes' means is the mean of all rows."""
    expected = gradients(None, "one process", slice(None))
    for *results, error in processes.run_ranks(tmp_path, RANKS, split_by_rows):
        for result in results:
            torch.testing.assert_close(result, expected)
        # Its weight looks as if it were split by classes, and each process has other rows.
        assert "fully_shard the LinearCrossEntropyLoss" in error
