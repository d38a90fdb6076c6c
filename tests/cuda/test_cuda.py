"""What only a GPU shows: graphs, streams, devices, and that no call waits for the device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastnn
from fastnn import functional
from support.marks import needs_gpu

pytestmark = needs_gpu


def step_of_a_model(device: str = "cuda", lr: float | torch.Tensor = 0.1):
    """A function that trains one step and returns the loss, and the model's parameters."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(fastnn.nn.LinearReLU(20, 33), torch.nn.Linear(33, 10)).to(device)
    optimizer = fastnn.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    x = torch.randn(64, 20).to(device)
    target = (torch.arange(64) % 10).to(device)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss

    return step, list(model.parameters())


def trained(steps: int, device: str = "cuda") -> list[torch.Tensor]:
    step, parameters = step_of_a_model(device)
    for _ in range(steps):
        step()
    return [parameter.detach().cpu() for parameter in parameters]


def assert_same_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def assert_agrees(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Within the error of five float32 steps: the operations are the same, sums differ in order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_training_agrees_with_the_cpu():
    assert_agrees(trained(5), trained(5, "cpu"))


def test_training_gives_the_same_bits_again():
    assert_same_bits(trained(5), trained(5))


def captured(step) -> torch.cuda.CUDAGraph:
    """A graph of the step, captured after three ordinary calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def test_training_in_a_graph():
    """Capturing fails if anything synchronises; replays start from what the last step left."""
    step, parameters = step_of_a_model()
    graph = captured(step)
    for _ in range(2):
        graph.replay()
    assert_same_bits([parameter.detach().cpu() for parameter in parameters], trained(5))


def test_a_graph_reads_the_learning_rate_at_each_replay():
    lr = torch.tensor(0.5, device="cuda")
    step, parameters = step_of_a_model(lr=lr)
    graph = captured(step)
    lr.fill_(0.0)
    before = [parameter.detach().cpu() for parameter in parameters]
    graph.replay()
    assert_same_bits([parameter.detach().cpu() for parameter in parameters], before)
    lr.fill_(0.5)
    graph.replay()
    assert not torch.equal(parameters[0].detach().cpu(), before[0])


def test_a_step_reads_a_pinned_learning_rate_as_it_was():
    """It may be overwritten before the device reaches the step."""
    parameter = torch.nn.Parameter(torch.zeros(3, device="cuda"))
    parameter.grad = torch.ones(3, device="cuda")
    lr = torch.tensor(0.5, device="cpu").pin_memory()
    optimizer = fastnn.optim.SGD([parameter], lr=lr, fused=True)
    torch.cuda._sleep(100_000_000)  # some 50 ms
    optimizer.step()
    lr.fill_(100.0)
    assert parameter.tolist() == [-0.5] * 3


def test_momentum_buffers_made_in_a_graph():
    """Each replay is a first step, as in torch: it sets the buffer to the gradient."""
    parameter = torch.nn.Parameter(torch.zeros(3, device="cuda"))
    parameter.grad = torch.ones(3, device="cuda")
    optimizer = fastnn.optim.SGD([parameter], lr=0.25, momentum=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(2):
        graph.replay()
    assert parameter.tolist() == [-0.5] * 3
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == [1.0] * 3


# ---- train_step, which captures by itself ----


def train_step_and_loop(scheduler=None, **options):
    """The same training with ``train_step`` and with the loop: a function that steps both."""
    torch.manual_seed(0)
    models = []
    for _ in range(2):
        model = torch.nn.Sequential(
            fastnn.nn.LinearReLU(20, 33), torch.nn.BatchNorm1d(33), torch.nn.Linear(33, 10)
        )
        models.append(model.cuda())
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [fastnn.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    schedulers = [scheduler(optimizer) for optimizer in optimizers] if scheduler else []
    step = fastnn.train_step(models[0], functional.cross_entropy, optimizers[0], **options)

    def train(seed: int, rows: int = 64) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, 20, generator=generator).cuda()
        target = torch.randint(10, (rows,), generator=generator).cuda()
        loss = functional.cross_entropy(models[1](x), target)
        optimizers[1].zero_grad()
        loss.backward()
        if norm := options.get("clip_grad_norm"):
            torch.nn.utils.clip_grad_norm_(models[1].parameters(), norm)
        optimizers[1].step()
        optimizers[1].zero_grad()
        torch.testing.assert_close(step(x, target), loss.detach())
        for one in schedulers:
            one.step()
        values = [list(model.state_dict().values()) for model in models]
        assert_agrees(*values)
        assert all(parameter.grad is None for parameter in models[0].parameters())

    return step, train, models, optimizers


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.1}], ids=str)
def test_train_step_replays_the_loop(options):
    step, train, _, _ = train_step_and_loop(**options)
    for index in range(10):
        train(index, rows=64 if index % 5 else 17)
    assert step.report().way == "CUDA graph", step.report()
    captures = step._ways[1]._known.values()
    assert sum(not isinstance(known, int) for known in captures) == 1


def test_train_step_follows_a_scheduler():
    step, train, _, _ = train_step_and_loop(lambda one: torch.optim.lr_scheduler.StepLR(one, 6))
    for index in range(15):
        train(index)
    assert step.report().way == "CUDA graph", step.report()


def test_train_step_sees_what_changes_after_a_capture():
    step, train, models, optimizers = train_step_and_loop()
    for index in range(5):
        train(index)
    for optimizer in optimizers:
        optimizer.load_state_dict(optimizer.state_dict())  # other tensors
    train(5)
    for model in models:
        model[0].weight.data = model[0].weight.data * 0.5
    train(6)
    for model in models:
        model.eval()
    train(7)
    seen = []
    models[0][0].register_forward_hook(lambda *_: seen.append(1))
    train(8)
    assert seen == [1]
    assert step.report().way == "ordinary"


def test_train_step_leaves_what_can_t_be_captured():
    class Waits(torch.nn.ReLU):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    Waits.__module__ = torch.nn.ReLU.__module__  # pretends that PyTorch has such a module
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), Waits()).cuda()
    optimizer = fastnn.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = fastnn.train_step(model, functional.cross_entropy, optimizer)
    x, target = torch.randn(8, 4).cuda(), (torch.arange(8) % 3).cuda()
    losses = [step(x, target).item() for _ in range(8)]
    assert sorted(losses, reverse=True) == losses
    assert step.report().reasons["CUDA graph"].startswith("its capture failed")


def loss_and_gradient(logits: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
    loss = functional.cross_entropy(logits, target)
    return [loss, *torch.autograd.grad(loss, logits)]


# Rows in shared memory, one row per block, and rows shared by several blocks.
@pytest.mark.parametrize(("rows", "classes"), [(1000, 10), (64, 5000), (3, 200_000)])
def test_a_loss_in_a_graph_reads_its_inputs_at_each_replay(rows, classes):
    logits = torch.zeros(rows, classes, device="cuda", requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64, device="cuda")
    graph, results = torch.cuda.CUDAGraph(), []
    captured(lambda: loss_and_gradient(logits, target))  # warms up
    with torch.cuda.graph(graph):
        results = loss_and_gradient(logits, target)
    for _ in range(2):
        with torch.no_grad():
            logits.normal_()
            target.random_(classes)
        graph.replay()
        assert_same_bits(results, loss_and_gradient(logits, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_head_and_its_loss_in_a_graph(reduction, dtype):
    """There are several blocks of rows, and only the device knows which rows are ignored."""
    rows, features, classes = 3000, 64, 1000
    leaves = [
        torch.zeros(size, features, device="cuda", dtype=dtype, requires_grad=True)
        for size in (rows, classes)
    ]
    target = torch.zeros(rows, dtype=torch.int64, device="cuda")

    def results() -> list[torch.Tensor]:
        loss = functional.linear_cross_entropy(*leaves, target, ignore_index=1, reduction=reduction)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss))]

    captured(results)  # warms up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = results()
    for _ in range(2):
        with torch.no_grad():
            for leaf in leaves:
                leaf.normal_()
            target.random_(5)
        graph.replay()
        assert_same_bits(replayed, results())


def test_graphs_that_share_their_memory():
    """Each may reuse the other's temporary memory, since they are replayed in turn."""
    inputs = [torch.randn(64, size, device="cuda", requires_grad=True) for size in (5000, 300)]
    target = torch.arange(64, device="cuda")
    graphs, results = [torch.cuda.CUDAGraph() for _ in inputs], []
    pool = torch.cuda.graph_pool_handle()
    for graph, logits in zip(graphs, inputs, strict=True):
        captured(lambda logits=logits: loss_and_gradient(logits, target))
        with torch.cuda.graph(graph, pool=pool):
            results.append(loss_and_gradient(logits, target))
    for _ in range(2):
        for graph, logits, result in zip(graphs, inputs, results, strict=True):
            with torch.no_grad():
                logits.normal_()
            graph.replay()
            assert_same_bits(result, loss_and_gradient(logits, target))


def test_the_compiler_s_cuda_graphs(fresh_dynamo):
    def step(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(functional.linear_relu(x, weight), target)

    compiled = torch.compile(step, mode="reduce-overhead")
    weight = torch.randn(50, 20, device="cuda", requires_grad=True)
    target = torch.arange(32, device="cuda")
    for _ in range(4):  # the graph is made at the second or third call
        x = torch.randn(32, 20, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(x, weight, target)
        (grad,) = torch.autograd.grad(loss, weight)
        exact = step(x, weight, target)
        torch.testing.assert_close(loss, exact)
        torch.testing.assert_close(grad, torch.autograd.grad(exact, weight)[0])


def test_a_backward_after_a_forward_on_another_stream():
    logits = torch.randn(512, 5000, device="cuda", requires_grad=True)
    target = torch.arange(512, device="cuda")
    expected = loss_and_gradient(logits, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss = functional.cross_entropy(logits, target)
    torch.cuda.current_stream().wait_stream(stream)
    # Autograd runs the backward on the forward's stream, and synchronises with it here.
    (grad,) = torch.autograd.grad(loss, logits)
    assert_same_bits([loss.detach(), grad], expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_over_more_tensors_than_a_launch_takes(momentum):
    """Compares with the CPU: the same operations, which compilers may fuse differently."""
    generator = torch.Generator().manual_seed(0)
    sizes = [*range(1, 1000), 100_003]
    values = [torch.randn(size, generator=generator, device="cpu") for size in sizes]
    stepped = []
    for device in ("cpu", "cuda"):
        params = [torch.nn.Parameter(value.to(device, copy=True)) for value in values]
        optimizer = fastnn.optim.SGD(params, lr=0.1, momentum=momentum, weight_decay=0.01)
        for factor in (1.0, -0.5, 2.0):
            for param, value in zip(params, values, strict=True):
                param.grad = value.to(device) * factor
            optimizer.step()
        stepped.append([param.detach().cpu() for param in params])
    torch.testing.assert_close(stepped[1], stepped[0])


def test_training_on_a_second_stream():
    expected = trained(5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        actual = trained(5)
    stream.synchronize()
    assert_same_bits(actual, expected)


def test_nothing_waits_for_the_device():
    step, _ = step_of_a_model()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("overflow", [False, True])
def test_a_scaled_step_does_not_wait_for_the_device(overflow):
    parameter = torch.nn.Parameter(torch.ones(5, device="cuda"))
    lr = torch.tensor(0.25, device="cuda")
    optimizer = fastnn.optim.SGD([parameter], lr=lr, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0)
    factor = torch.tensor(float("inf") if overflow else 1.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert parameter.tolist() == [1.0 if overflow else 0.75] * 5


def test_training_on_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    with torch.cuda.device(0):  # not the tensors' device
        # Bits may differ: it may be another kind of GPU.
        assert_agrees(trained(5, "cuda:1"), trained(5, "cuda:0"))


BAD_TARGET = """
import torch, fastnn
logits = torch.randn(7, 5, device="cuda")
target = torch.full((7,), 5, device="cuda")
fastnn.functional.cross_entropy(logits, target)
torch.cuda.synchronize()
"""


def test_a_target_out_of_range_trips_a_device_assert():
    """Runs in its own process: the device accepts no other work afterwards."""
    process = subprocess.run(
        [sys.executable, "-c", BAD_TARGET], capture_output=True, text=True, check=False
    )
    assert process.returncode != 0
    assert "Target is out of bounds" in process.stderr
