"""torch.distributed with fastnn: two gloo processes match one process on whole batches."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastnn
from support import processes
from support.capabilities import COLUMNS
from support.marks import needs_extension, needs_grad_dtype
from support.operator_cases import CASES, RowCall
from support.optimizers import Recorder, randn
from support.sample_inputs import OPS
from support.small_training import (
    ATOL,
    BATCH,
    HEADS,
    OPTIONS,
    SIZES,
    STEPS,
    batch,
    expected_outcome,
    make_model,
    make_optimizer,
    outcome,
    train,
)

pytestmark = pytest.mark.cpu_only("processes talk over gloo, whatever the kernels")

RANKS = 2
PACKAGE = Path(fastnn.__file__).parent


def rows_of(rank: int) -> slice:
    """A rank's share of a batch."""
    return slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)


def assert_as_in_one_process(actual: dict[str, Tensor], head: str = "cross_entropy") -> None:
    torch.testing.assert_close(actual, expected_outcome(head), rtol=0, atol=ATOL)


# --- replicated parameters ------------------------------------------------------------------------


def train_replicated(rank: int, head: str, options: dict[str, Any]) -> dict[str, Tensor]:
    model = DistributedDataParallel(make_model(head), **options)
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer, head, rows=rows_of(rank))
    return outcome(model.module, optimizer)


@pytest.mark.capability("processes", "`DistributedDataParallel`", operators=[*COLUMNS])
@pytest.mark.parametrize(
    ("head", "options"),
    [
        *((head, {}) for head in HEADS),
        # Gradients are views of the memory that is communicated.
        ("cross_entropy", {"gradient_as_bucket_view": True}),
        # Traverses the graph, through our nodes, for parameters that it doesn't reach.
        ("cross_entropy", {"find_unused_parameters": True}),
        ("cross_entropy", {"static_graph": True}),
    ],
    ids=lambda value: next(iter(value), "default") if isinstance(value, dict) else value,
)
def test_distributed_data_parallel(tmp_path, head, options):
    first, second = processes.run_ranks(tmp_path, RANKS, train_replicated, head, options)
    assert_as_in_one_process(first, head)
    torch.testing.assert_close(second, first, rtol=0, atol=0)  # the same gradients


class WithIdleLayer(nn.Module):
    """The model plus a layer of ours that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.used = make_model()
        self.idle = fastnn.nn.LinearReLU(3, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.used(input)


def train_with_idle_layer(rank: int) -> tuple[dict[str, Tensor], bool]:
    model = DistributedDataParallel(WithIdleLayer(), find_unused_parameters=True)
    optimizer = make_optimizer(model.parameters())
    before = [parameter.clone() for parameter in model.module.idle.parameters()]
    train(model, optimizer, rows=rows_of(rank))
    after = list(model.module.idle.parameters())
    untouched = all(map(torch.equal, before, after)) and not any(
        p in optimizer.state for p in after
    )
    return outcome(model.module.used, optimizer), untouched


def test_distributed_data_parallel_with_a_layer_that_is_not_used(tmp_path):
    for results, untouched in processes.run_ranks(tmp_path, RANKS, train_with_idle_layer):
        assert_as_in_one_process(results)
        assert untouched


# --- train_step -----------------------------------------------------------------------------------


def train_replicated_by_train_step(rank: int, options: dict[str, Any]) -> dict[str, Tensor]:
    model = DistributedDataParallel(make_model(), **options)
    optimizer = make_optimizer(model.parameters())
    step = fastnn.train_step(model, fastnn.nn.CrossEntropyLoss(), optimizer)
    for index in range(STEPS):
        step(*(tensor[rows_of(rank)] for tensor in batch(index)))
    return outcome(model.module, optimizer)


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}], ids=str)
def test_train_step_over_distributed_data_parallel(tmp_path, options):
    for results in processes.run_ranks(tmp_path, RANKS, train_replicated_by_train_step, options):
        assert_as_in_one_process(results)


def accumulate_replicated(rank: int, by_hand: bool, options: dict[str, Any]) -> dict[str, Tensor]:
    model = DistributedDataParallel(make_model(), **options)
    optimizer, loss_fn = make_optimizer(model.parameters()), fastnn.nn.CrossEntropyLoss()
    step = fastnn.train_step(model, loss_fn, optimizer, accumulate=2)
    for index in range(STEPS):
        input, target = (tensor[rows_of(rank)] for tensor in batch(index))
        if not by_hand:
            step(input, target)
            continue
        (loss_fn(model(input), target) / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    return outcome(model.module, optimizer)


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}], ids=str)
def test_train_step_accumulates_over_distributed_data_parallel(tmp_path, options):
    runs = []
    for by_hand in (False, True):
        folder = tmp_path / str(by_hand)
        folder.mkdir()
        runs.append(processes.run_ranks(folder, RANKS, accumulate_replicated, by_hand, options))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


# --- a sharded optimizer --------------------------------------------------------------------------


def train_with_sharded_state(rank: int, as_views: bool) -> dict[str, Any]:
    # Imported here, because the import gives dozens of warnings about torch's own deprecations.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(make_model())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(),
        optimizer_class=fastnn.optim.SGD,
        parameters_as_bucket_view=as_views,
        **OPTIONS,
    )
    train(model, optimizer, rows=rows_of(rank))
    optimizer.consolidate_state_dict(to=0)
    return {
        "class": type(optimizer.optim).__name__,
        "buffers": len(optimizer.optim.state),
        "parameters": model.module.state_dict(),
        "optimizer": optimizer.state_dict() if rank == 0 else None,
    }


@pytest.mark.capability("processes", "`ZeroRedundancyOptimizer`", operators=["SGD"])
@pytest.mark.parametrize("as_views", [False, True], ids=["tensors", "views"])
def test_zero_redundancy_optimizer(tmp_path, as_views):
    ranks = processes.run_ranks(tmp_path, RANKS, train_with_sharded_state, as_views)
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    # Each parameter's buffer is kept once, and no rank keeps all.
    assert sum(rank["buffers"] for rank in ranks) == len(list(model.parameters()))
    assert all(rank["buffers"] for rank in ranks)
    # The optimizer itself can load the consolidated state.
    optimizer.load_state_dict(ranks[0]["optimizer"])
    for rank in ranks:
        model.load_state_dict(rank["parameters"])
        assert_as_in_one_process(outcome(model, optimizer))


# --- sharded parameters ---------------------------------------------------------------------------


def make_sharded_model(head: str, reshard_after_forward: bool = True) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    model = make_model(head)
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward)


def train_sharded(rank: int, head: str, reshard_after_forward: bool) -> dict[str, Tensor]:
    model = make_sharded_model(head, reshard_after_forward)
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer, head, rows=rows_of(rank))
    shards = outcome(model, optimizer)
    assert all(isinstance(shard, DTensor) for shard in shards.values())
    assert all(shard.to_local().shape[0] < shard.shape[0] for shard in shards.values())
    return {name: shard.full_tensor() for name, shard in shards.items()}


@pytest.mark.capability("processes", "FSDP2: `fully_shard`", operators=[*COLUMNS])
@pytest.mark.parametrize(
    ("head", "reshard_after_forward"), [*((head, True) for head in HEADS), ("cross_entropy", False)]
)
def test_fully_shard(tmp_path, head, reshard_after_forward):
    arguments = (head, reshard_after_forward)
    for results in processes.run_ranks(tmp_path, RANKS, train_sharded, *arguments):
        assert_as_in_one_process(results, head)


def make_fused_model() -> nn.Sequential:
    """The same model of PyTorch's own layers, after fuse."""
    layers = fastnn.unfuse(make_model())
    flat = [
        one for layer in layers for one in (layer if isinstance(layer, nn.Sequential) else [layer])
    ]
    return fastnn.fuse(nn.Sequential(*flat))


def train_fused(rank: int, shard: str) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (RANKS,))
    model = make_fused_model()
    if shard == "columns":
        columns = ColwiseParallel(output_layouts=Replicate())
        model = parallelize_module(model, mesh, {"0": columns, "4": columns})
    else:
        for layer in model if shard == "layers" else [model[2], model[3]]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    assert type(fastnn.fuse(model, inplace=True)) is type(model)
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer, rows=slice(None) if shard == "columns" else rows_of(rank))
    fastnn.unfuse(model, inplace=True)
    assert not any("Fused" in base.__name__ for base in type(model).__mro__[1:])
    values = outcome(model, optimizer).values()
    return [one.full_tensor() if isinstance(one, DTensor) else one for one in values]


@pytest.mark.parametrize("shard", ["layers", "some layers", "columns"])
def test_layers_of_a_fused_model_that_are_sharded(tmp_path, shard):
    expected = list(expected_outcome().values())
    for results in processes.run_ranks(tmp_path, RANKS, train_fused, shard):
        torch.testing.assert_close(results, expected, rtol=0, atol=ATOL)


# Shape, placements of the parameter and of its gradient; None if the first step has no gradient.
SPREADS = {
    "alike": [
        ((5, 4), Shard(0), Shard(0)),  # parts of 3 and 2 rows
        ((1, 4), Shard(0), Shard(0)),  # nothing for the second rank
        ((5, 4), Shard(1), Shard(1)),
        ((5, 4), Replicate(), Replicate()),
        ((5, 4), Shard(0), None),
    ],
    "otherwise": [
        ((5, 4), Shard(0), Replicate()),
        ((5, 4), Shard(0), Shard(1)),
        ((5, 4), Replicate(), Partial()),  # equal shapes, but the parts must be summed
    ],
}
FUSED_STEP = "fastnn.sgd_step_.default"


def make_whole_params(spreads: str) -> list[Tensor]:
    return [randn(shape, torch.float64, seed=i) for i, (shape, _, _) in enumerate(SPREADS[spreads])]


def spread(tensor: Tensor, placement: Placement) -> DTensor:
    mesh = init_device_mesh("cpu", (RANKS,))
    if isinstance(placement, Partial):  # torch 2.9's distribute_tensor rejects it
        return DTensor.from_local(tensor / RANKS, mesh, [placement])
    return distribute_tensor(tensor, mesh, [placement])


def take_steps(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, spreads: str
) -> list[Tensor]:
    """The parameters and their buffers after some steps."""
    for step in range(3):
        for i, (shape, placement, grad_placement) in enumerate(SPREADS[spreads]):
            grad = randn(shape, torch.float64, seed=100 * (step + 1) + i)
            if isinstance(params[i], DTensor):
                grad = spread(grad, grad_placement or placement)
            params[i].grad = None if step == 0 and grad_placement is None else grad
        optimizer.step()
    buffers = [optimizer.state[param].get("momentum_buffer") for param in params]
    return [tensor.detach() for tensor in (*params, *buffers) if tensor is not None]


def step_spread_params(
    rank: int, spreads: str, options: dict[str, Any]
) -> tuple[list[Tensor], list[str]]:
    params = [
        nn.Parameter(spread(param, placement))
        for param, (_, placement, _) in zip(
            make_whole_params(spreads), SPREADS[spreads], strict=True
        )
    ]
    versions = [param._version for param in params]
    with Recorder() as recorder:
        results = take_steps(params, fastnn.optim.SGD(params, **options), spreads)
    # Otherwise a backward through a parameter stepped since would not raise.
    assert all(p._version > before for p, before in zip(params, versions, strict=True))
    return [result.full_tensor() for result in results], recorder.mutating


@needs_extension
@pytest.mark.parametrize(
    ("spreads", "options"),
    [
        ("alike", {"lr": 0.1}),
        ("alike", {**OPTIONS, "dampening": 0.3}),
        ("alike", {**OPTIONS, "nesterov": True, "maximize": True, "fused": True}),
        ("otherwise", OPTIONS),
    ],
    ids=["alike-plain", "alike-dampening", "alike-nesterov", "otherwise"],
)
def test_each_process_steps_its_part(tmp_path, spreads, options):
    whole = [nn.Parameter(param) for param in make_whole_params(spreads)]
    stock = torch.optim.SGD(whole, **{**options, "fused": False})
    expected = take_steps(whole, stock, spreads)
    ranks = processes.run_ranks(tmp_path, RANKS, step_spread_params, spreads, options)
    for results, operators in ranks:
        torch.testing.assert_close(results, expected, rtol=0, atol=ATOL)
        # Only the fused operator runs; torch's own communicate what lies elsewhere.
        assert {operator == FUSED_STEP for operator in operators} == {spreads == "alike"}


def step_with_float32_momentum(
    place: Callable[[Tensor], Tensor],
) -> tuple[list[Tensor], list[str]]:
    """A parameter and its buffer after some steps, and the operators that wrote to them."""
    param = nn.Parameter(place(torch.ones(5, 4, dtype=torch.bfloat16)))
    # Powers of two: float32 is exact, however the elements are distributed over vectors.
    optimizer = fastnn.optim.SGD(
        [param], lr=0.25, momentum=0.5, weight_decay=0.25, float32_momentum=True
    )
    with Recorder() as recorder:
        for step in range(3):
            param.grad = place(torch.full((5, 4), (step + 1) / 4, dtype=torch.bfloat16))
            optimizer.step()
    return [param.detach(), optimizer.state[param]["momentum_buffer"]], recorder.mutating


def step_spread_with_float32_momentum(rank: int) -> tuple[list[Tensor], list[str]]:
    results, operators = step_with_float32_momentum(lambda tensor: spread(tensor, Shard(0)))
    return [result.full_tensor() for result in results], operators


@needs_extension
def test_each_process_has_float32_momentum_of_its_part(tmp_path):
    expected, _ = step_with_float32_momentum(lambda tensor: tensor)
    assert [tensor.dtype for tensor in expected] == [torch.bfloat16, torch.float32]
    for results, operators in processes.run_ranks(
        tmp_path, RANKS, step_spread_with_float32_momentum
    ):
        torch.testing.assert_close(results, expected, rtol=0, atol=0)
        assert set(operators) == {FUSED_STEP}


def step_along_narrow_gradients(rank: int) -> list[list[Tensor]]:
    """Steps of fastnn's and of torch's optimizer."""
    results = []
    for optimizer_class in (fastnn.optim.SGD, torch.optim.SGD):
        param = nn.Parameter(spread(torch.ones(5, 4), Shard(0)))
        param.grad_dtype = torch.bfloat16
        param.grad = spread(torch.ones(5, 4, dtype=torch.bfloat16), Shard(0))
        optimizer = optimizer_class([param], **OPTIONS)
        for _ in range(3):
            optimizer.step()
        steps = outcome(nn.ParameterList([param]), optimizer).values()
        results.append([tensor.full_tensor() for tensor in steps])
    return results


@needs_grad_dtype
def test_gradients_of_another_dtype_take_torchs_way(tmp_path):
    for ours, stock in processes.run_ranks(tmp_path, RANKS, step_along_narrow_gradients):
        torch.testing.assert_close(ours, stock, rtol=0, atol=0)


# --- tensor parallelism ---------------------------------------------------------------------------


def train_parallel_layers(rank: int) -> dict[str, Tensor]:
    """Each rank computes some columns of each layer and gathers the others' for the next one."""
    mesh = init_device_mesh("cpu", (RANKS,))
    columns = ColwiseParallel(output_layouts=Replicate())
    model = parallelize_module(make_model(), mesh, {str(layer): columns for layer in range(3)})
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer)
    assert all(parameter.placements == (Shard(0),) for parameter in model.parameters())
    return {name: shard.full_tensor() for name, shard in outcome(model, optimizer).items()}


@pytest.mark.capability("processes", "tensor parallelism", operators=["linear_relu"])
def test_layers_split_by_columns(tmp_path):
    for results in processes.run_ranks(tmp_path, RANKS, train_parallel_layers):
        assert_as_in_one_process(results)


def calls() -> dict[str, RowCall]:
    """One call of each function, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {op: CASES[op].rows(BATCH, SIZES[-1]) for op in OPS}


def value_and_gradients(op: str, call: RowCall) -> list[Tensor]:
    arguments = call.arguments()
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    value = getattr(fastnn.functional, op)(*arguments)
    return [value.detach(), *torch.autograd.grad(value.square().sum(), leaves)]


def distribute_rows(call: RowCall, mesh: DeviceMesh) -> RowCall:
    """Shards arguments that have a part for each row, and replicates weights."""

    def copy(argument: Any) -> Any:
        is_tensor = isinstance(argument, Tensor)
        return distribute_tensor(argument, mesh, [Replicate()]) if is_tensor else argument

    by_row = (distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in call.by_row)
    return RowCall(tuple(by_row), tuple(map(copy, call.shared)), call.first)


def call_on_distributed_rows(rank: int) -> dict[str, list[Tensor]]:
    mesh = init_device_mesh("cpu", (RANKS,))
    results = {}
    for op, call in calls().items():
        parts = value_and_gradients(op, distribute_rows(call, mesh))
        results[op] = [part.full_tensor() for part in parts]
    return results


@pytest.mark.capability("processes", "`DTensor` arguments", operators=[*OPS])
def test_functions_of_distributed_rows(tmp_path):
    whole = {op: value_and_gradients(op, call) for op, call in calls().items()}
    for results in processes.run_ranks(tmp_path, RANKS, call_on_distributed_rows):
        torch.testing.assert_close(results, whole, rtol=0, atol=ATOL)


# --- checkpoints ----------------------------------------------------------------------------------

SAVED_AFTER = STEPS // 2


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def train_sharded_and_save(rank: int, path: Path) -> None:
    model = make_sharded_model("cross_entropy")
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer, steps=range(SAVED_AFTER), rows=rows_of(rank))
    checkpoint.save(state_of(model, optimizer), checkpoint_id=path)


@pytest.mark.capability(
    "processes", "`torch.distributed.checkpoint`: two ranks save, one loads", operators=["SGD"]
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # in one process
@pytest.mark.parametrize(
    "optimizer_class", [fastnn.optim.SGD, torch.optim.SGD], ids=["ours", "torch"]
)
def test_checkpoint_saved_by_two_ranks_goes_on_in_one_process(tmp_path, optimizer_class):
    path = tmp_path / "checkpoint"
    processes.run_ranks(tmp_path, RANKS, train_sharded_and_save, path)
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # everything must come from the checkpoint, options included
    optimizer = optimizer_class(model.parameters(), lr=0.0, momentum=0.1)
    state = state_of(model, optimizer)
    checkpoint.load(state, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    train(model, optimizer, steps=range(SAVED_AFTER, STEPS))
    assert_as_in_one_process(outcome(model, optimizer))


# Runs in its own process, because it tests the order of imports.
OPTIMIZER_IN_DDP = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

table = "torch.distributed.optim.utils"
if {table_first}:
    __import__(table)
import fastnn
assert (table in sys.modules) == {table_first}

dist.init_process_group("gloo", init_method="file://{folder}/store", rank=0, world_size=1)
outcomes = []
for optimizer in (fastnn.optim.SGD, torch.optim.SGD):
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(3, 2))
    before = model.module.weight.detach().clone()
    model._register_fused_optim(optimizer, 0.1, momentum=0.9)
    for _ in range(3):
        model(torch.ones(4, 3)).square().sum().backward()
    assert not torch.equal(model.module.weight, before)
    outcomes.append([parameter.detach() for parameter in model.parameters()])
assert all(map(torch.equal, *outcomes))
assert table not in [getattr(finder, "name", None) for finder in sys.meta_path]
dist.destroy_process_group()
print("done")
"""


@pytest.mark.parametrize("table_first", [False, True])
def test_ddp_steps_each_parameter_as_its_gradient_arrives(tmp_path, table_first):
    """PyTorch's table of such optimizers may be imported before fastnn or, slowly, after it."""
    script = OPTIMIZER_IN_DDP.format(table_first=table_first, folder=tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", script]
    process = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "done\n"), process.stderr
