"""What only a GPU shows: graphs, streams, devices, and that nothing waits for the device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import needs_gpu

import fastnn
from fastnn import functional

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
    """After five steps of float32: the same operations, in another order of sums."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_training_agrees_with_the_cpu():
    assert_agrees(trained(5), trained(5, "cpu"))


def test_training_gives_the_same_bits_again():
    assert_same_bits(trained(5), trained(5))


def captured(step) -> torch.cuda.CUDAGraph:
    """A graph of the step, after three that ran as they were."""
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
    """Capturing fails where anything synchronises; the replays read what a step has left."""
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
    with torch.cuda.device(0):  # the tensors' device is another
        # Not the same bits: it may be another kind of GPU.
        assert_agrees(trained(5, "cuda:1"), trained(5, "cuda:0"))


BAD_TARGET = """
import torch, fastnn
logits = torch.randn(7, 5, device="cuda")
target = torch.full((7,), 5, device="cuda")
fastnn.functional.cross_entropy(logits, target)
torch.cuda.synchronize()
"""


def test_a_target_out_of_range_trips_a_device_assert():
    """In a process of its own: the device takes no other work after it."""
    process = subprocess.run(
        [sys.executable, "-c", BAD_TARGET], capture_output=True, text=True, check=False
    )
    assert process.returncode != 0
    assert "Target is out of bounds" in process.stderr
