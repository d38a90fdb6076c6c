"""Models of our layers outlive their Python: torch.export, AOTInductor, traces, torch.fx, ONNX."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import fastnn
from support import perceptron
from support.marks import needs_extension
from support.modules import MODULES, assert_close, inputs_of, make
from support.perceptron import OURS, loss_and_gradients

capability = pytest.mark.capability
every_module = pytest.mark.parametrize("name", MODULES)
# torch's own use of it.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec")

# --- torch.export ---------------------------------------------------------------------------------


@needs_extension
@capability(
    "export",
    "`torch.export`: one call each, dynamic batch",
    operators=["linear_relu", "log_softmax"],
)
def test_export_keeps_the_operators():
    model = torch.nn.Sequential(fastnn.nn.LinearReLU(5, 4), fastnn.nn.LogSoftmax(dim=1))
    input = torch.randn(6, 5)
    exported = torch.export.export(
        model, (input,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert targets == {"fastnn.linear_relu.default", "fastnn.log_softmax.default"}
    other_batch = torch.randn(9, 5)
    assert torch.equal(exported.module()(other_batch), model(other_batch))


@capability("export", "`torch.export`, strict and not")
@every_module
@pytest.mark.parametrize("strict", [False, True])
def test_exported_modules_compute_the_same(fresh_dynamo, strict, name):
    module, inputs = make(name)[0].double(), inputs_of(name)
    exported = torch.export.export(module, inputs, strict=strict)
    assert torch.equal(exported.module()(*inputs), module(*inputs))
    decomposed = exported.run_decompositions()
    assert torch.equal(decomposed.module()(*inputs), module(*inputs))


@needs_extension
@capability("export", "exported, saved, loaded, and trained on", operators=perceptron.USES)
def test_an_exported_model_is_saved_and_trained_on():
    model, inputs = perceptron.make(OURS), perceptron.batch(4)
    rows = {0: Dim("rows")}
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, inputs, dynamic_shapes=(rows, rows)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    other_inputs = perceptron.batch(9)
    eager = loss_and_gradients(model, model, *other_inputs)
    for result, expected in zip(
        loss_and_gradients(loaded, loaded, *other_inputs), eager, strict=True
    ):
        assert torch.equal(result, expected)


@pytest.mark.cpu_only("inductor compiles for the device: the CPU's code around any kernels")
@needs_extension
@capability("export", "AOTInductor package", operators=perceptron.USES)
def test_aot_inductor(fresh_dynamo, tmp_path):
    model, inputs = perceptron.make(OURS), perceptron.batch(4)
    rows = {0: Dim("rows")}
    exported = torch.export.export(model, inputs, dynamic_shapes=(rows, rows))
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "model.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for rows in (4, 9):
        inputs = perceptron.batch(rows)
        # Float64 values of order one: 1e-12 is thousands of roundings.
        torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=1e-12, atol=1e-12)


# --- torch.jit, torch.fx --------------------------------------------------------------------------

deprecated = pytest.mark.filterwarnings(
    "ignore:`torch.jit.*is deprecated",
    "ignore:You are using the legacy TorchScript",
    "ignore:The feature will be removed",
)


@deprecated
@capability("export", "`torch.jit.trace`, saved and loaded")
@every_module
def test_jit_trace(name):
    module, inputs = make(name)[0].double(), inputs_of(name)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, inputs), file)
    file.seek(0)
    traced = torch.jit.load(file)
    other_inputs = (inputs[0].detach().neg().requires_grad_(), *inputs[1:])
    result, expected = traced(*other_inputs), module(*other_inputs)
    assert torch.equal(result, expected)
    (gradient,) = torch.autograd.grad(result.sum(), other_inputs[0])
    (eager_gradient,) = torch.autograd.grad(expected.sum(), other_inputs[0])
    assert torch.equal(gradient, eager_gradient)


@deprecated
@capability("export", "`torch.jit.script`")
@pytest.mark.xfail(
    reason="TorchScript's compiler takes a small part of Python, and is deprecated: trace instead.",
    raises=(RuntimeError, torch.jit.frontend.NotSupportedError),
)
@every_module
def test_jit_script(name):
    torch.jit.script(make(name)[0])


@capability("export", "`torch.fx.symbolic_trace`: one call each, which it prints and runs")
@every_module
def test_fx_sees_one_call(name):
    module, inputs = make(name)[0].double(), inputs_of(name)
    traced = torch.fx.symbolic_trace(module)
    (call,) = (node for node in traced.graph.nodes if node.op == "call_function")
    assert call.target.__module__ == "fastnn.functional"
    assert f"fastnn_functional_{call.target.__name__}(" in traced.code
    assert torch.equal(traced(*inputs), module(*inputs))


# --- ONNX -----------------------------------------------------------------------------------------

onnx_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="torch.onnx takes onnx and onnxscript; running its models, onnxruntime",
)
of_no_kernels = pytest.mark.cpu_only("an exported model has none of our kernels")
dynamo_exporter = {"dynamo": True, "verbose": False, "dynamic_shapes": ({0: Dim("rows")},)}
trace_exporter = {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "rows"}}}


def operators_of(path: Path) -> list[str]:
    import onnx

    return [node.op_type for node in onnx.load(path).graph.node]


def run_onnx(path: Path, *inputs: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    arrays = [tensor.detach().cpu().numpy() for tensor in inputs]
    (output,) = session.run(None, dict(zip(names, arrays, strict=True)))
    return torch.as_tensor(output, device=inputs[0].device)


@deprecated
@of_no_kernels
@onnx_packages
@capability("export", "`torch.onnx.export`, run in onnxruntime", operators=perceptron.USES[:3])
@pytest.mark.parametrize("exporter", [dynamo_exporter, trace_exporter], ids=["dynamo", "trace"])
def test_onnx_runs_a_model(tmp_path, exporter):
    """The model only contains ONNX's own operators."""
    model, path = perceptron.make(OURS, torch.float32).eval(), tmp_path / "model.onnx"
    torch.onnx.export(model, perceptron.batch(4, torch.float32)[:1], path, **exporter)
    assert operators_of(path) == ["Gemm", "Relu", "Gemm", "LogSoftmax"]
    for rows in (4, 9):
        x, _ = perceptron.batch(rows, torch.float32)
        assert_close(run_onnx(path, x), model(x))


# By the operator's name and an option: the loss, and which of inputs_of(name)'s targets it uses.
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.25])
ONNX_LOSSES = {
    "NLLLoss-weighted": lambda: fastnn.nn.NLLLoss(weight=WEIGHT),
    "NLLLoss-none": lambda: fastnn.nn.NLLLoss(ignore_index=2, reduction="none"),
    "CrossEntropyLoss-weighted": lambda: fastnn.nn.CrossEntropyLoss(weight=WEIGHT),
    "CrossEntropyLoss-none": lambda: fastnn.nn.CrossEntropyLoss(ignore_index=2, reduction="none"),
    # torch's exporter drops smoothing from torch's own loss, so its model computes something else.
    "CrossEntropyLoss-smooth": lambda: fastnn.nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1),
    "CrossEntropyLoss-probabilities": fastnn.nn.CrossEntropyLoss,
}


@of_no_kernels
@onnx_packages
@capability("export", "`torch.onnx.export`, run in onnxruntime")
@pytest.mark.parametrize("name", ONNX_LOSSES)
def test_onnx_runs_a_loss(tmp_path, name):
    loss, path = ONNX_LOSSES[name]().eval(), tmp_path / "loss.onnx"
    x, target = inputs_of(name.partition("-")[0], torch.float32)
    if name.endswith("probabilities"):
        target = torch.rand(x.shape).softmax(1)
    torch.onnx.export(loss, (x, target), path, dynamo=True, verbose=False)
    assert_close(run_onnx(path, x, target), loss(x, target))


@of_no_kernels
@onnx_packages
@capability("export", "`torch.onnx.export` of a program of `torch.export`")
@pytest.mark.xfail(
    reason="It has fastnn's operators already: give `torch.onnx.export` the model itself.",
    raises=torch.onnx.errors.OnnxExporterError,
)
@needs_extension
@every_module
def test_onnx_of_an_exported_program(name):
    program = torch.export.export(make(name)[0].double(), inputs_of(name))
    torch.onnx.export(program, dynamo=True, verbose=False)
