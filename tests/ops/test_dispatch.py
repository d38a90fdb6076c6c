"""The operators as torch sees them: schemas, registrations, shapes, modes, and the fallback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
from fastnn import _extension
from support.marks import needs_extension, of_functions
from support.modes import CONTEXTS, FunctionRecorder
from support.operator_cases import CASES, COMPILE_SAMPLES
from support.operators import LINEARS, TORCH, ours, value_and_gradients
from support.sample_inputs import OPS, Sample, sample_input

# --- the extension is there -----------------------------------------------------------------------


def test_the_extension_is_built():
    """The extension's tests are skipped if it is missing, which must not count as success."""
    wanted = os.environ.get("FASTNN_TEST_FALLBACK", "0") == "0"
    assert fastnn.is_available() == wanted, (
        "fastnn's extension isn't loaded: build it, or set FASTNN_TEST_FALLBACK=1 to test the "
        "plain PyTorch that stands in for it"
    )


SCHEMAS = [
    "linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
    "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, bool[3] output_mask) "
    "-> (Tensor, Tensor, Tensor)",
    "linear_relu(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
    "linear_relu_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor output, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    "log_softmax(Tensor input, int dim, ScalarType? dtype=None) -> Tensor",
    "log_softmax_backward(Tensor grad_output, Tensor output, int dim, ScalarType? dtype=None) "
    "-> Tensor",
    "nll_loss(Tensor input, Tensor target, Tensor? weight=None, int ignore_index=-100, "
    "str reduction='mean', ScalarType? dtype=None) -> Tensor",
    "nll_loss_forward(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
    "str reduction, ScalarType? dtype=None) -> (Tensor loss, Tensor total_weight)",
    "nll_loss_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, "
    "Tensor total_weight, int ignore_index, str reduction) -> Tensor",
    "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int ignore_index=-100, "
    "str reduction='mean', float label_smoothing=0.0, ScalarType? dtype=None) -> Tensor",
    "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
    "str reduction, float label_smoothing, bool keep, ScalarType? dtype=None) "
    "-> (Tensor loss, Tensor kept, Tensor lse, Tensor total_weight)",
    "cross_entropy_backward(Tensor grad_output, Tensor kept, Tensor target, Tensor? weight, "
    "Tensor? lse, Tensor total_weight, int ignore_index, str reduction, float label_smoothing) "
    "-> Tensor",
    "cross_entropy_backward_(Tensor grad_output, Tensor(a!) kept, Tensor target, Tensor? weight, "
    "Tensor? lse, Tensor total_weight, int ignore_index, str reduction, float label_smoothing) "
    "-> ()",
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, "
    "Tensor? linear_bias=None, Tensor? weight=None, str reduction='mean', int ignore_index=-100, "
    "float label_smoothing=0.0, float? softcap=None, float logit_scale=1.0, float z_loss=0.0, "
    "Tensor? normalizer=None, ScalarType? dtype=None) -> Tensor",
    "linear_cross_entropy_forward(Tensor input, Tensor linear_weight, Tensor target, "
    "Tensor? linear_bias, Tensor? weight, str reduction, int ignore_index, float label_smoothing, "
    "float? softcap, float logit_scale, float z_loss, Tensor? normalizer, ScalarType? dtype, "
    "bool[3] output_mask) "
    "-> (Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor lse)",
    "linear_cross_entropy_backward(Tensor grad_output, Tensor input, Tensor linear_weight, "
    "Tensor target, Tensor? linear_bias, Tensor? weight, Tensor lse, int ignore_index, "
    "float label_smoothing, float? softcap, float logit_scale, float z_loss, ScalarType? dtype, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    "sgd_step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, "
    "float lr, float momentum=0, float dampening=0, float weight_decay=0, bool nesterov=False, "
    "bool maximize=False, bool is_first_step=False, Tensor? grad_scale=None, "
    "Tensor? found_inf=None) -> ()",
    "sgd_step_.tensor_lr(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, "
    "*, Tensor lr, float momentum=0, float dampening=0, float weight_decay=0, bool nesterov=False, "
    "bool maximize=False, bool is_first_step=False, Tensor? grad_scale=None, "
    "Tensor? found_inf=None) -> ()",
]
OP_NAMES = [schema.split("(")[0] for schema in SCHEMAS]


@needs_extension
@pytest.mark.parametrize("schema", SCHEMAS, ids=OP_NAMES)
def test_schema(schema):
    name, _, overload = schema.split("(")[0].partition(".")
    op = getattr(torch.ops.fastnn, name)
    assert getattr(op, overload or "default")._schema == torch._C.parse_schema(f"fastnn::{schema}")
    # There are no other overloads.
    overloads = [f"{name}.{overload}".removesuffix(".default") for overload in op.overloads()]
    assert set(overloads) <= set(OP_NAMES)


@needs_extension
@pytest.mark.parametrize("name", OP_NAMES)
def test_every_operator_has_a_kernel_on_the_cpu_and_shapes_for_compile(name):
    for key in ("CPU", "Meta"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastnn::{name}", key)


@needs_extension
@pytest.mark.parametrize("name", OPS)
def test_operators_for_users_have_an_autograd_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnn::{name}", "Autograd")


# --- values and shapes ---------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize(("op", "name"), COMPILE_SAMPLES)
@pytest.mark.capability("saving", "fake tensors, the meta device")
def test_meta_tensors_get_shapes_and_gradients(op, name):
    sample = sample_input(op, torch.float32, name)
    on_meta = Sample(
        name,
        tuple(to_meta(arg) for arg in sample.args),
        {key: to_meta(value) for key, value in sample.kwargs.items()},
    )
    real, meta = (value_and_gradients(ours(op), op, each) for each in (sample, on_meta))
    for real_result, meta_result in zip(real, meta, strict=True):
        assert meta_result.is_meta
        assert meta_result.shape == real_result.shape
        assert meta_result.dtype == real_result.dtype


class Recorded(TorchDispatchMode):
    """Records the fused operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastnn":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@needs_extension
@pytest.mark.capability(
    "saving",
    "devices without kernels in this build: PyTorch's operators",
    operators=OPS,
)
@pytest.mark.parametrize(
    ("device", "fused"),
    [
        ("cpu", set(OPS)),
        ("mps", set()),
        pytest.param(
            "xpu",
            set(),
            marks=pytest.mark.not_on_a_gpu(
                "torch initializes a fake tensor's device, if there is one"
            ),
        ),
    ],
)
def test_devices_without_kernels_get_pytorchs_operators(device, fused):
    """Uses fake tensors of the device."""
    functional = fastnn.functional
    with FakeTensorMode(), Recorded() as recorded:
        hidden = functional.linear_relu(*(torch.empty(5, 6, device=device) for _ in range(2)))
        hidden = functional.linear(hidden, torch.empty(5, 5, device=device))
        target = torch.empty(5, dtype=torch.long, device=device)
        functional.nll_loss(functional.log_softmax(hidden, 1), target)
        functional.cross_entropy(hidden, target)
        functional.linear_cross_entropy(hidden, torch.empty(3, 5, device=device), target)
    assert recorded.names == fused


DEVICE_KEYS = ("CPU", "CUDA", "MPS", "XPU", "HPU", "XLA", "PrivateUse1", "Meta")
LAYOUT_KEYS = ("SparseCPU", "SparseCsrCPU", "MkldnnCPU", "QuantizedCPU", "NestedTensorCPU")


@needs_extension
@pytest.mark.parametrize("key", [*DEVICE_KEYS, *LAYOUT_KEYS])
@pytest.mark.parametrize("op", OPS)
def test_every_device_and_layout_has_a_kernel_without_autograd(op, key):
    """In inference mode a call skips autograd and goes straight to this kernel."""
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastnn::{op}", key)


def outcome(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> tuple | Tensor:
    """The dense result, or the type and the first line of the error."""
    try:
        result = function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error).splitlines()[0]
    if result.is_nested:
        return torch.nested.to_padded_tensor(result, torch.inf)
    return result if result.layout == torch.strided else result.to_dense()


def assert_same_outcome(
    op: str, arguments: tuple, context: Callable[[], Any], **kwargs: Any
) -> None:
    with context():
        mine, theirs = (outcome(f, *arguments, **kwargs) for f in (ours(op), TORCH[op]))
    if isinstance(theirs, tuple):
        assert mine == theirs
    else:
        assert torch.equal(mine, theirs)


@needs_extension
@pytest.mark.not_on_a_gpu("layouts of the CPU")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "mkldnn"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.capability("saving", "sparse and MKL-DNN layouts: as in PyTorch, to its errors")
def test_layouts_without_kernels_get_pytorchs_operators(op, layout, context):
    """Like other devices, they have dispatch keys of their own."""
    sample = sample_input(op, torch.float32, CASES[op].every_tensor)
    for i in range(2 if op in LINEARS else 1):
        with context():
            arguments = list(sample.args)
            # Inference tensors: other tensors would reach autograd's kernel first.
            dense = arguments[i].clone()
            if layout == "mkldnn":
                arguments[i] = dense.to_mkldnn()
            else:
                arguments[i] = dense.to_sparse(layout=getattr(torch, layout))
            if context is torch.inference_mode:
                assert arguments[i].is_inference()
        assert_same_outcome(op, tuple(arguments), context, **sample.kwargs)


# Which arguments are nested, by position.
NESTED_CASES = [
    *[(op, (i,)) for op in LINEARS for i in range(3)],
    ("log_softmax", (0,)),
    *[(op, which) for op in ("nll_loss", "cross_entropy") for which in ((0,), (1,), (2,), (0, 1))],
]


@needs_extension
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("op", "positions"), NESTED_CASES)
@pytest.mark.capability("saving", "strided nested tensors: as in PyTorch, to its errors")
def test_strided_nested_tensors_get_pytorchs_operators(op, positions, context):
    """They report a strided layout but have a dispatch key of their own."""
    rows, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    linear = [rows, torch.randn(5, 3), torch.randn(5)]
    arguments = {
        "linear": linear,
        "linear_relu": linear,
        "log_softmax": [rows, -1],
        "nll_loss": [rows, target, torch.rand(3)],
        "cross_entropy": [rows, target, torch.rand(3)],
    }[op]
    with context():
        for i in positions:
            parts = [arguments[i], arguments[i][:2]]
            arguments[i] = torch.nested.nested_tensor(parts, layout=torch.strided)
        assert_same_outcome(op, tuple(arguments), context)


@needs_extension
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("op", LINEARS)
def test_gradients_through_strided_nested_tensors(op):
    weight, bias = torch.randn(5, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    parts = [torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)]
    gradients = []
    for function in (ours(op), TORCH[op]):
        output = function(torch.nested.as_nested_tensor(parts), weight, bias)
        total = sum(part.square().sum() for part in output.unbind())
        gradients.append(torch.autograd.grad(total, [*parts, weight, bias]))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def to_meta(value: object) -> object:
    return value.to("meta") if isinstance(value, Tensor) else value


# --- modes, subclasses and names ------------------------------------------------------------------


class Subclass(Tensor):
    """Records the functions that are called with it, and runs them as Tensor does."""

    called: list[Callable]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.called.append(func)
        return super().__torch_function__(func, types, args, kwargs)


@of_functions
@pytest.mark.parametrize("op", OPS)
@pytest.mark.capability("saving", "modes: `__torch_function__`, `__torch_dispatch__`")
def test_torch_function_modes_see_the_call_and_its_arguments(implementation, op):
    sample = sample_input(op, torch.float32, CASES[op].every_tensor)
    direct = ours(op)(*sample.args, **sample.kwargs)
    with FunctionRecorder() as recorder:
        result = ours(op)(*sample.args, **sample.kwargs)
    assert recorder.called[0] is ours(op)
    assert torch.equal(result, direct)


@of_functions
@pytest.mark.parametrize("op", OPS)
@pytest.mark.capability("saving", "tensor subclasses: `__torch_function__`")
def test_torch_function_of_each_argument_is_called(implementation, op):
    sample = sample_input(op, torch.float32, CASES[op].every_tensor)
    direct = ours(op)(*sample.args, **sample.kwargs)
    arguments = {**dict(enumerate(sample.args)), **sample.kwargs}
    tensors = [key for key, value in arguments.items() if isinstance(value, Tensor)]
    assert tensors
    for chosen in tensors:
        given = {**arguments, chosen: arguments[chosen].as_subclass(Subclass)}
        positional = [given.pop(i) for i in range(len(sample.args))]
        Subclass.called = []
        result = ours(op)(*positional, **given)
        assert Subclass.called[0] is ours(op)
        assert type(result) is Subclass
        assert torch.equal(result.as_subclass(Tensor), direct)


@needs_extension
@pytest.mark.parametrize("op", OPS)
def test_a_class_that_hands_our_function_on_keeps_our_operators(op):
    Subclass.called = []
    sample = sample_input(op, torch.float32, CASES[op].every_tensor)
    with Recorded() as recorded:
        ours(op)(sample.args[0].as_subclass(Subclass), *sample.args[1:], **sample.kwargs)
    assert recorded.names == {op}


# --- in a separate process ------------------------------------------------------------------------


def run_python(code: str, path: Path) -> Any:
    """Runs code with the package from ``path``; returns its last line of output, parsed as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=path,  # python -c searches there first
        capture_output=True,
        text=True,
        timeout=120,  # bounds a hang; not a speed requirement
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


IMPORT_AND_TRAIN = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastnn
messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
import torch

def train(linear_relu, cross_entropy, sgd):
    torch.manual_seed(0)
    model = torch.nn.Sequential(linear_relu(8, 6), torch.nn.Linear(6, 3))
    optimizer = sgd(model.parameters(), lr=0.1, momentum=0.9)
    x, target = torch.randn(16, 8), torch.arange(16) % 3
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

class LinearReLU(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()

ours = train(fastnn.nn.LinearReLU, fastnn.nn.CrossEntropyLoss(), fastnn.optim.SGD)
theirs = train(LinearReLU, torch.nn.CrossEntropyLoss(), torch.optim.SGD)
print(json.dumps([fastnn.is_available(), messages, ours, theirs]))
"""

PACKAGE = Path(fastnn.__file__).parent
BROKEN_IMPORTS = {
    "import fails": (
        "import sys; sys.modules['fastnn._C'] = None",
        r"extension can't be loaded: .*fastnn\._C",
    ),
    "another torch": (
        "import torch; torch.__version__ = '0.0.1'",
        r"extension was built for torch \d.* and torch 0\.0\.1 is installed",
    ),
}


def assert_trains_on_the_reference(code: str, path: Path, cause: str) -> None:
    available, messages, losses, torch_losses = run_python(code, path)
    assert not available
    assert len(messages) == 1
    assert re.search(cause, messages[0])
    assert re.search("pip install|in another folder", messages[0])  # what the user can do
    # Three steps of float32: the same operations, except for the order of a few sums.
    assert losses == pytest.approx(torch_losses, rel=1e-5)
    assert losses[2] < losses[0]


@pytest.mark.cpu_only("the extension as it is installed")
@needs_extension
@pytest.mark.parametrize("broken", BROKEN_IMPORTS)
def test_an_extension_that_does_not_load_gives_one_warning_and_the_reference(broken):
    prelude, cause = BROKEN_IMPORTS[broken]
    assert_trains_on_the_reference(prelude + IMPORT_AND_TRAIN, PACKAGE.parent, cause)


@pytest.mark.cpu_only("the extension as it is installed")
def test_an_extension_that_was_not_built_gives_one_warning_and_the_reference(tmp_path):
    built = shutil.ignore_patterns("_C*", "_build_info.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "fastnn", ignore=built)
    assert_trains_on_the_reference(IMPORT_AND_TRAIN, tmp_path, "extension is not built")


@pytest.mark.cpu_only("the extension as it is installed")
def test_a_source_folder_that_hides_a_built_package_says_so(tmp_path, monkeypatch):
    built = tmp_path / "site" / "fastnn"
    (built.parent / "fastnn-1.dist-info").mkdir(parents=True)
    (built.parent / "fastnn-1.dist-info" / "METADATA").write_text("Name: fastnn\nVersion: 1\n")
    monkeypatch.setattr(sys, "path", [str(built.parent)])
    assert not _extension._hides_another()
    built.mkdir()
    (built / "_build_info.json").write_text("{}")
    assert _extension._hides_another()


OPENMP_RUNTIMES = """
import re
torch.set_num_threads(2)
x = torch.randn(2000, 100, requires_grad=True)
fastnn.functional.cross_entropy(x, torch.arange(2000) % 100).backward()
with open("/proc/self/maps") as maps:
    mapped = {line.split()[-1] for line in maps}
print(json.dumps([
    fastnn.is_available(), messages, ours, theirs,
    sorted(path for path in mapped if re.search(r"/lib[gi]?omp[^/]*[.]so", path)),
]))
"""


@pytest.mark.cpu_only("the extension as it is installed")
@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_the_extension_loads_in_silence_trains_and_brings_no_second_openmp():
    """A second runtime would have its own threads, which torch.set_num_threads doesn't affect."""
    code = IMPORT_AND_TRAIN + OPENMP_RUNTIMES
    available, messages, losses, torch_losses, runtimes = run_python(code, PACKAGE.parent)
    assert available
    assert messages == []
    # Three steps of float32: the same operations, except for the order of a few sums.
    assert losses == pytest.approx(torch_losses, rel=1e-5)
    assert len(runtimes) == 1
