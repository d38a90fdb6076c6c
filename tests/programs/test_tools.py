"""Tools for inspection: profiler traces, FLOP counts, timers, and names in a graph."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import fastnn
from support import perceptron
from support.capabilities import ALIASES
from support.marks import needs_extension
from support.modules import MODULES, inputs_of, make
from support.operators import LINEARS, TORCH, ours
from support.perceptron import CLASSES, FEATURES, HIDDEN, OURS


def capability(row: str, **options):
    return pytest.mark.capability("tools", row, **options)


# --- the profiler ---------------------------------------------------------------------------------

ROWS = 7
# The shapes of the tensors passed to each operator in the perceptron's training step.
LOGITS, PER_ROW = [ROWS, CLASSES], [ROWS]
SHAPES = {
    "linear": [[ROWS, HIDDEN], [CLASSES, HIDDEN], [CLASSES]],
    "linear_backward": [LOGITS, [ROWS, HIDDEN], [CLASSES, HIDDEN]],
    "linear_relu": [[ROWS, FEATURES], [HIDDEN, FEATURES], [HIDDEN]],
    # The input wants no gradient, for which the weight would be needed.
    "linear_relu_backward": [[ROWS, HIDDEN], [ROWS, FEATURES], [ROWS, HIDDEN]],
    "log_softmax": [LOGITS],
    "log_softmax_backward": [LOGITS, LOGITS],
    "nll_loss": [LOGITS, PER_ROW, [CLASSES]],
    "nll_loss_backward": [LOGITS, PER_ROW, [CLASSES]],
    "cross_entropy": [LOGITS, PER_ROW],
    "cross_entropy_backward_": [LOGITS, PER_ROW],
}
NODES = {
    "linear": "LinearBackward",
    "linear_relu": "LinearReLUBackward",
    "log_softmax": "LogSoftmaxBackward",
    "nll_loss": "NLLLossBackward",
    "cross_entropy": "CrossEntropyBackward",
}
# Plus those that the perceptron lacks.
EVERY_NODE = {**NODES, "linear_cross_entropy": "LinearCrossEntropyBackward"}
NAMES_AND_SHAPES = "`torch.profiler` names forward, backward and step, with shapes"


@pytest.fixture
def trace() -> profile:
    """The profile of a training step of the perceptron."""
    model = perceptron.make(OURS)
    optimizer = fastnn.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs = perceptron.batch(ROWS)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as trace:
        optimizer.zero_grad()
        model(*inputs).backward()
        optimizer.step()
    return trace


def events_called(trace: profile, name: str) -> list:
    return [event for event in trace.events() if event.name == name]


@needs_extension
@capability(NAMES_AND_SHAPES)
@pytest.mark.parametrize("op", NODES)
def test_profiler_names_each_operator_with_its_shapes(trace, op):
    for name in {op, f"{op}_backward", f"{op}_backward_"} & SHAPES.keys():
        (event,) = events_called(trace, f"fastnn::{name}")
        # Options and scalars have no shape.
        assert [shape for shape in event.input_shapes if shape] == SHAPES[name]
    assert len(events_called(trace, NODES[op])) == 1


@needs_extension
@capability(NAMES_AND_SHAPES, operators=["SGD"])
def test_profiler_names_the_optimizers_step(trace):
    (step,) = events_called(trace, "Optimizer.step#SGD.step")
    (operator,) = events_called(trace, "fastnn::sgd_step_")
    assert operator.cpu_parent is step
    assert len(events_called(trace, "Optimizer.zero_grad#SGD.zero_grad")) == 1


@needs_extension
def test_chrome_trace_has_the_names(trace, tmp_path):
    path = tmp_path / "trace.json"
    trace.export_chrome_trace(str(path))
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {*NODES.values(), *(f"fastnn::{name}" for name in SHAPES)} <= names


# --- FLOPs ----------------------------------------------------------------------------------------


@needs_extension
@capability("FLOPs: `torch.profiler`, `with_flops=True`")
@pytest.mark.parametrize("op", LINEARS)
@pytest.mark.xfail(
    reason="PyTorch's profiler counts a fixed list of its own operators; use `FlopCounterMode`.",
    raises=AssertionError,
)
def test_profiler_counts_flops(trace, op):
    (event,) = events_called(trace, f"fastnn::{op}")
    assert event.flops


@needs_extension
@capability("FLOPs: `FlopCounterMode`")
@pytest.mark.parametrize("op", LINEARS)
def test_flop_counter_counts_the_matrix_products_as_torch_does(op):
    x, w, b = torch.randn(2, 6, 5), torch.randn(3, 5), torch.randn(3)

    def flops(function, *inputs_with_gradient):
        for tensor in (x, w, b):
            tensor.requires_grad_(any(tensor is other for other in inputs_with_gradient))
        with FlopCounterMode(display=False) as counter:
            result = function(x, w, b)
            if inputs_with_gradient:
                result.sum().backward()
        return counter.get_total_flops()

    for wanted in ((), (w, b), (x,), (x, w, b)):
        expected = flops(TORCH[op], *wanted)
        assert expected > 0
        assert flops(ours(op), *wanted) == expected


@needs_extension
@capability("FLOPs: `FlopCounterMode`", operators=LINEARS)
def test_flop_counter_tells_modules_apart():
    model, inputs = perceptron.make(OURS), perceptron.batch(ROWS)
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    counts = counter.get_flop_counts()
    assert sum(counts["Perceptron.hidden"].values()) == 2 * ROWS * FEATURES * HIDDEN
    assert sum(counts["Perceptron.output"].values()) == 2 * ROWS * HIDDEN * CLASSES


# --- timers and names -----------------------------------------------------------------------------


@capability("`torch.utils.benchmark`")
@pytest.mark.parametrize("name", MODULES)
def test_timer_runs(name):
    module, inputs = make(name)[0].double(), inputs_of(name)
    calls = []
    module.register_forward_hook(lambda *args: calls.append(args))
    timer = Timer("module(*inputs)", globals={"module": module, "inputs": inputs})
    assert timer.timeit(3).mean > 0
    assert len(calls) >= 3


@needs_extension
@capability("`grad_fn.name()` is the operator's")
@pytest.mark.parametrize("name", MODULES)
def test_graph_nodes_have_the_operators_names(name):
    output = make(name)[0].double()(*inputs_of(name))
    assert output.grad_fn.name() == EVERY_NODE[ALIASES[name]]


@needs_extension
@pytest.mark.cpu_only("an import")
@pytest.mark.parametrize("first", ["fastnn", "torch.utils.flop_counter"])
def test_flops_are_counted_whatever_is_imported_first(first):
    """fastnn doesn't import the counter, which is slow if it imports triton."""
    script = f"""
import sys, torch, {first}
print("torch.utils.flop_counter" in sys.modules)
import fastnn
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fastnn.nn.LinearReLU(3, 5)(torch.ones(2, 3))
awaited = [getattr(finder, "name", None) for finder in sys.meta_path]
print(counter.get_total_flops(), "torch.utils.flop_counter" in awaited)
"""
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    # 2 x 3 x 5 products and as many sums
    assert output.splitlines() == [str(first != "fastnn"), "60 False"]
