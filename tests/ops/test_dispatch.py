"""The operators as torch sees them: schemas, registrations, shapes, modes, and the fallback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.overrides import TorchFunctionMode
from torch.testing._internal.logging_tensor import LoggingTensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastnn
from support.marks import needs_extension, of_functions
from support.operators import (
    COMPILE_SAMPLES,
    FUNCTIONS,
    MODE_SAMPLES,
    TORCH,
    leaves_of,
    memory_of,
    ours,
    random_grad_like,
    value_and_gradients,
)
from support.sample_inputs import DTYPES, OPS, Sample, on_device, sample_input

# --- the extension is there -----------------------------------------------------------------------


def test_the_extension_is_built():
    """Its own tests are skipped where it is missing: that must not pass for success."""
    wanted = os.environ.get("FASTNN_TEST_FALLBACK", "0") == "0"
    assert fastnn.is_available() == wanted, (
        "fastnn's extension isn't loaded: build it, or set FASTNN_TEST_FALLBACK=1 to test the "
        "plain PyTorch that stands in for it"
    )


SCHEMAS = [
    "linear_relu(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
    "linear_relu_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor output, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    "log_softmax(Tensor input, int dim) -> Tensor",
    "log_softmax_backward(Tensor grad_output, Tensor output, int dim) -> Tensor",
    "nll_loss(Tensor input, Tensor target, Tensor? weight=None, int ignore_index=-100, "
    "str reduction='mean') -> Tensor",
    "nll_loss_forward(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
    "str reduction) -> (Tensor loss, Tensor total_weight)",
    "nll_loss_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, "
    "Tensor total_weight, int ignore_index, str reduction) -> Tensor",
    "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int ignore_index=-100, "
    "str reduction='mean', float label_smoothing=0.0) -> Tensor",
    "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
    "str reduction, float label_smoothing, bool keep) "
    "-> (Tensor loss, Tensor kept, Tensor lse, Tensor total_weight)",
    "cross_entropy_backward(Tensor grad_output, Tensor kept, Tensor target, Tensor? weight, "
    "Tensor? lse, Tensor total_weight, int ignore_index, str reduction, float label_smoothing) "
    "-> Tensor",
    "cross_entropy_backward_(Tensor grad_output, Tensor(a!) kept, Tensor target, Tensor? weight, "
    "Tensor? lse, Tensor total_weight, int ignore_index, str reduction, float label_smoothing) "
    "-> ()",
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
    # And there are no others.
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


# --- opcheck --------------------------------------------------------------------------------------

# Each option once, in the layouts that an operator treats in different ways: the fake kernel must
# give the real one's strides too.
OPCHECK_SAMPLES = {
    "linear_relu": (
        *("7x15_to_9", "7x15_to_9_no_bias", "1d_input", "3d_input_reversed", "all_sliced"),
        *("0x3_to_2", "2x0_to_3", "2x3_to_0"),
    ),
    "log_softmax": (
        *("0d_dim-1", "3d_dim1", "4d_channels_last_dim1", "transposed_dim0", "expanded_dim1"),
        "empty_(3,0)_dim1",
    ),
    "nll_loss": (
        *("5_mean", "7x5_none_weighted", "3x5x4_ignore3_none", "2x5x3x4_sum", "uint8_ignore255"),
        *("2x9x4x5_channels_last", "7x18_input_transposed", "0x5_empty_sum"),
    ),
    "cross_entropy": (
        *("5_mean", "7x5_none_weighted", "3x5x4_ignore3_none", "2x5x3x4_sum", "uint8_ignore255"),
        *("2x9x4x5_channels_last", "7x18_input_transposed", "0x5_empty_sum"),
        *("7x5_smooth0.1_mean_weighted", "3x5x4_smooth0.1_none", "channels_last_smooth"),
        *("7x17_probs", "3x5x4_probs_none_weighted_0.1", "channels_last_probs"),
        "0x5_probs_empty_none",
    ),
}
OPCHECK_CASES = [
    pytest.param(op, name, id=f"{op}-{name}")
    for op, names in OPCHECK_SAMPLES.items()
    for name in names
]

# The operators' own argument lists have neither the deprecated pair nor dtype=.
LOSS_DEFAULTS = {"weight": None, "ignore_index": -100, "reduction": "mean"}


def loss_options(op: str, sample: Sample) -> dict[str, Any]:
    smoothing = {"label_smoothing": 0.0} if op == "cross_entropy" else {}
    return {**LOSS_DEFAULTS, **smoothing, **sample.kwargs}


@needs_extension
@pytest.mark.parametrize(("op", "name"), OPCHECK_CASES)
@pytest.mark.capability("compile", "`torch.library.opcheck`")
def test_opcheck_for_users(op, name):
    sample = sample_input(op, torch.float32, name)
    leaves = leaves_of(op, sample)
    arguments = (*leaves, *sample.args[len(leaves) :])
    opcheck(getattr(torch.ops.fastnn, op).default, arguments, sample.kwargs)


def forward_and_backward_calls(op: str, sample: Sample) -> Iterator[tuple[str, tuple]]:
    """The operators that the one for users is made of, and arguments as it gives them."""
    operators = torch.ops.fastnn
    args = sample.args
    output = ours(op)(*args, **sample.kwargs)
    grad = random_grad_like(op, sample, output)
    if op == "linear_relu":
        bias = len(args) > 2
        yield "linear_relu_backward", (grad, *args[:2], output, [True, True, bias])
        yield "linear_relu_backward", (grad, None, args[1], output, [True, False, bias])
        yield "linear_relu_backward", (grad, args[0], None, output, [False, True, False])
        yield "linear_relu_backward", (grad, None, None, output, [False, False, True])
    elif op == "log_softmax":
        yield "log_softmax_backward", (grad, output, args[1])
    elif op == "nll_loss":
        weight, *options = loss_options(op, sample).values()
        yield "nll_loss_forward", (*args, weight, *options)
        _loss, total_weight = operators.nll_loss_forward(*args, weight, *options)
        yield "nll_loss_backward", (grad, *args, weight, total_weight, *options)
    else:
        weight, *options = loss_options(op, sample).values()
        for keep in (False, True):
            yield "cross_entropy_forward", (*args, weight, *options, keep)
        _loss, kept, *saved = operators.cross_entropy_forward(*args, weight, *options, True)
        for backward in ("cross_entropy_backward", "cross_entropy_backward_"):
            yield backward, (grad, kept, args[1], weight, *saved, *options)


@needs_extension
@pytest.mark.parametrize(("op", "name"), OPCHECK_CASES)
def test_opcheck_forwards_and_backwards(op, name):
    sample = sample_input(op, torch.float32, name)
    for operator, arguments in forward_and_backward_calls(op, sample):
        opcheck(getattr(torch.ops.fastnn, operator).default, arguments)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_fake_outputs_have_the_real_dtypes(op, dtype):
    """The sums' dtype is not the input's."""
    name = OPCHECK_SAMPLES[op][1]
    for operator, arguments in forward_and_backward_calls(op, sample_input(op, dtype, name)):
        operator = getattr(torch.ops.fastnn, operator).default
        opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_extension
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "is_first_step": True},
        {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "maximize": True},
        {"momentum": 0.9, "nesterov": True},
        {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)},
        {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(1.0)},
    ],
    ids=["plain", "first", "momentum", "nesterov", "scaled", "skipped"],
)
@pytest.mark.capability("compile", "`torch.library.opcheck`", operators=["SGD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_sgd_step(dtype, options):
    def tensors(dtype: torch.dtype) -> list[Tensor]:
        shapes = [torch.randn(3, 5), torch.randn(4, 2).t(), torch.randn(())]
        return [tensor.to(dtype) for tensor in shapes]

    buffers = tensors(torch.float32) if options.get("momentum") else []
    arguments = (tensors(dtype), tensors(dtype), buffers)
    options = tree_map_only(Tensor, on_device, options)
    opcheck(torch.ops.fastnn.sgd_step_.default, arguments, {"lr": 0.1, **options})


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
    """The fused operators that are called."""

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
                "where there is one, torch starts a fake tensor's device"
            ),
        ),
    ],
)
def test_devices_without_kernels_get_pytorchs_operators(device, fused):
    """Fake tensors stand for those of the device."""
    functional = fastnn.functional
    with FakeTensorMode(), Recorded() as recorded:
        hidden = functional.linear_relu(*(torch.empty(5, 6, device=device) for _ in range(2)))
        target = torch.empty(5, dtype=torch.long, device=device)
        functional.nll_loss(functional.log_softmax(hidden, 1), target)
        functional.cross_entropy(hidden, target)
    assert recorded.names == fused


DEVICE_KEYS = ("CPU", "CUDA", "MPS", "XPU", "HPU", "XLA", "PrivateUse1", "Meta")
LAYOUT_KEYS = ("SparseCPU", "SparseCsrCPU", "MkldnnCPU", "QuantizedCPU", "NestedTensorCPU")


@needs_extension
@pytest.mark.parametrize("key", [*DEVICE_KEYS, *LAYOUT_KEYS])
@pytest.mark.parametrize("op", OPS)
def test_every_device_and_layout_has_a_kernel_without_autograd(op, key):
    """In inference mode a call goes straight to it."""
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastnn::{op}", key)


def outcome(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> tuple | Tensor:
    """The result, dense, or the kind of error and what it says first."""
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


CONTEXTS = [torch.enable_grad, torch.no_grad, torch.inference_mode]


@needs_extension
@pytest.mark.not_on_a_gpu("layouts of the CPU")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "mkldnn"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.capability("saving", "sparse and MKL-DNN layouts: as in PyTorch, to its errors")
def test_layouts_without_kernels_get_pytorchs_operators(op, layout, context):
    """They have dispatch keys of their own, as other devices have."""
    sample = sample_input(op, torch.float32, MODE_SAMPLES[op])
    for i in range(2 if op == "linear_relu" else 1):
        with context():
            arguments = list(sample.args)
            # Inference tensors: with others autograd's kernel would be asked first.
            dense = arguments[i].clone()
            if layout == "mkldnn":
                arguments[i] = dense.to_mkldnn()
            else:
                arguments[i] = dense.to_sparse(layout=getattr(torch, layout))
            if context is torch.inference_mode:
                assert arguments[i].is_inference()
        assert_same_outcome(op, tuple(arguments), context, **sample.kwargs)


# The arguments that are nested, by their positions.
NESTED_CASES = [
    *[("linear_relu", (i,)) for i in range(3)],
    ("log_softmax", (0,)),
    *[(op, which) for op in ("nll_loss", "cross_entropy") for which in ((0,), (1,), (2,), (0, 1))],
]


@needs_extension
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("op", "positions"), NESTED_CASES)
@pytest.mark.capability("saving", "strided nested tensors: as in PyTorch, to its errors")
def test_strided_nested_tensors_get_pytorchs_operators(op, positions, context):
    """They say that they are strided, and have a dispatch key of their own."""
    rows, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    arguments = {
        "linear_relu": [rows, torch.randn(5, 3), torch.randn(5)],
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
def test_gradients_through_strided_nested_tensors():
    weight, bias = torch.randn(5, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    parts = [torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)]
    gradients = []
    for function in (ours("linear_relu"), TORCH["linear_relu"]):
        output = function(torch.nested.as_nested_tensor(parts), weight, bias)
        total = sum(part.square().sum() for part in output.unbind())
        gradients.append(torch.autograd.grad(total, [*parts, weight, bias]))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def to_meta(value: object) -> object:
    return value.to("meta") if isinstance(value, Tensor) else value


# --- modes, subclasses and names ------------------------------------------------------------------


class FunctionRecorder(TorchFunctionMode):
    """Notes the functions called under it."""

    def __init__(self) -> None:
        self.called: list[Callable] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """Notes the functions that it is an argument of, and hands itself on, as by default."""

    called: list[Callable]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.called.append(func)
        return super().__torch_function__(func, types, args, kwargs)


@of_functions
@pytest.mark.parametrize("op", OPS)
@pytest.mark.capability("saving", "modes: `__torch_function__`, `__torch_dispatch__`")
def test_torch_function_modes_see_the_call_and_its_arguments(implementation, op):
    sample = sample_input(op, torch.float32, MODE_SAMPLES[op])
    direct = ours(op)(*sample.args, **sample.kwargs)
    with FunctionRecorder() as recorder:
        result = ours(op)(*sample.args, **sample.kwargs)
    assert recorder.called[0] is ours(op)
    assert torch.equal(result, direct)


@of_functions
@pytest.mark.parametrize("op", OPS)
@pytest.mark.capability("saving", "tensor subclasses: `__torch_function__`")
def test_torch_function_of_each_argument_is_called(implementation, op):
    sample = sample_input(op, torch.float32, MODE_SAMPLES[op])
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
    sample = sample_input(op, torch.float32, MODE_SAMPLES[op])
    with Recorded() as recorded:
        ours(op)(sample.args[0].as_subclass(Subclass), *sample.args[1:], **sample.kwargs)
    assert recorded.names == {op}


# --- classes that don't know our functions --------------------------------------------------------


class Wrapper(Tensor):
    """Keeps its values in another tensor."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # the compiler's log prints it
        return f"{type(self).__name__}({self.inner})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: object) -> Tensor:
        return cls(inner["inner"])

    # What torch itself needs of any tensor.
    COPIES = (torch.ops.aten.clone.default, torch.ops.aten.detach.default)

    @classmethod
    def on_inner(cls, func: Callable, args: tuple, kwargs: dict | None) -> Any:
        args, kwargs = tree_map_only(cls, lambda wrapper: wrapper.inner, (args, kwargs or {}))
        return func(*args, **kwargs)


class KnowsFunctions(Wrapper):
    """As weight-only quantised weights: torch's functions, and no operator."""

    KNOWN = (F.linear, F.log_softmax, F.nll_loss, F.cross_entropy)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in cls.KNOWN:
            return cls.on_inner(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in cls.COPIES:
            return cls(cls.on_inner(func, args, kwargs))
        raise NotImplementedError(f"{cls.__name__} has no {func}")


class KnowsOperators(Wrapper):
    """As quantised tensors that are written on aten's operators."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            raise NotImplementedError(f"{cls.__name__} has no {func}")
        result = cls.on_inner(func, args, kwargs)
        return cls(result) if func in (*cls.COPIES, torch.ops.aten.t.default) else result


class RefusesOurs(Tensor):
    """As the weights of per-sample gradients: other functions than torch's are refused."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in map(ours, OPS):
            raise RuntimeError(f"{cls.__name__} cannot handle {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs)


class DoesNotKnowOurs(RefusesOurs):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in map(ours, OPS):
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs)


CLASSES = {
    "KnowsFunctions": KnowsFunctions,
    "KnowsOperators": KnowsOperators,
    "LoggingTensor": LoggingTensor,  # knows every operator
    "RefusesOurs": lambda tensor: tensor.as_subclass(RefusesOurs),
    "DoesNotKnowOurs": lambda tensor: tensor.as_subclass(DoesNotKnowOurs),
}
every_class = pytest.mark.parametrize("kind", CLASSES)


def plain(result: Tensor) -> Tensor:
    """The values of a class's result."""
    return result.elem if isinstance(result, LoggingTensor) else result.as_subclass(Tensor)


@every_class
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.capability("saving", "tensor subclasses that know PyTorch's functions or operators")
def test_classes_that_do_not_know_our_functions(implementation, op, context, kind):
    """They get torch's, and so its very numbers."""
    sample = sample_input(op, torch.float32, MODE_SAMPLES[op])
    arguments = {**dict(enumerate(sample.args)), **sample.kwargs}
    expected = TORCH[op](*sample.args, **sample.kwargs)
    for key in [key for key, value in arguments.items() if isinstance(value, Tensor)]:
        with context():
            given = {**arguments, key: CLASSES[kind](arguments[key])}
            positional = [given.pop(i) for i in range(len(sample.args))]
            assert torch.equal(plain(ours(op)(*positional, **given)), expected)


@every_class
@pytest.mark.parametrize("op", OPS)
def test_modes_see_our_function_before_a_class_gets_torchs(op, kind):
    sample = sample_input(op, torch.float32, MODE_SAMPLES[op])
    with FunctionRecorder() as recorder:
        given = CLASSES[kind](sample.args[0])
        recorder.called.clear()
        result = ours(op)(given, *sample.args[1:], **sample.kwargs)
    assert recorder.called[0] is ours(op)
    assert torch.equal(plain(result), TORCH[op](*sample.args, **sample.kwargs))


@pytest.mark.parametrize("kind", ["KnowsFunctions", "KnowsOperators", "RefusesOurs"])
def test_frozen_weights_of_such_a_class_in_a_layer(implementation, kind):
    layer = fastnn.nn.LinearReLU(6, 5)
    plain_weight = layer.weight.detach()
    layer.weight = torch.nn.Parameter(CLASSES[kind](plain_weight), requires_grad=False)
    input = torch.randn(4, 6, requires_grad=True)
    wanted = [input, layer.bias]
    gradients = [
        torch.autograd.grad(output.as_subclass(Tensor).square().sum(), wanted)
        for output in (layer(input), TORCH["linear_relu"](input, plain_weight, layer.bias))
    ]
    assert all(torch.equal(plain(mine), theirs) for mine, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["KnowsFunctions", "KnowsOperators", "RefusesOurs"])
@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_class_weights_of_such_a_class_in_a_loss(implementation, op, kind):
    weight, rows, target = torch.rand(3), torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    loss = {"nll_loss": fastnn.nn.NLLLoss, "cross_entropy": fastnn.nn.CrossEntropyLoss}[op]
    result = loss(weight=CLASSES[kind](weight))(rows, target)
    assert torch.equal(plain(result), TORCH[op](rows, target, weight))


@every_class
def test_what_torch_raises_for_a_class_stands_alone(kind):
    weight = CLASSES[kind](torch.randn(5, 3))
    with pytest.raises(RuntimeError) as theirs:
        F.linear(torch.randn(4, 7), weight)
    with pytest.raises(RuntimeError) as mine:
        fastnn.functional.linear_relu(torch.randn(4, 7), weight)
    assert str(mine.value) == str(theirs.value)
    assert mine.value.__context__ is None


@needs_extension
def test_a_mode_alone_changes_no_error():
    with FunctionRecorder(), pytest.raises(RuntimeError, match="linear_relu: expected input's"):
        fastnn.functional.linear_relu(torch.randn(4, 7), torch.randn(5, 3))


COMPILED_CLASSES = {
    "KnowsFunctions": KnowsFunctions,
    "KnowsOperators": KnowsOperators,
    "TwoTensor": lambda tensor: TwoTensor(tensor, 2 * tensor),
}


@needs_extension
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", COMPILED_CLASSES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.capability("compile", "tensor subclasses that know PyTorch's functions or operators")
def test_such_classes_in_one_graph(op, kind):
    sample = sample_input(op, torch.float32, MODE_SAMPLES[op])
    given = COMPILED_CLASSES[kind](sample.args[0])

    def compiled(function: Callable[..., Tensor]) -> Tensor:
        call = torch.compile(
            lambda x: function(x, *sample.args[1:], **sample.kwargs),
            backend="aot_eager",
            fullgraph=True,
        )
        return call(given)

    mine, theirs = compiled(ours(op)), compiled(TORCH[op])
    assert type(mine) is type(theirs)
    for part in ("a", "b") if kind == "TwoTensor" else ("data",):
        assert torch.equal(getattr(mine, part), getattr(theirs, part))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("op", OPS)
def test_without_gradients(implementation, op, context):
    sample = sample_input(op, torch.float32, MODE_SAMPLES[op])
    leaves = leaves_of(op, sample)
    direct = ours(op)(*sample.args, **sample.kwargs)
    with context():
        result = ours(op)(*leaves, *sample.args[len(leaves) :], **sample.kwargs)
    assert not result.requires_grad
    assert result.grad_fn is None
    assert result.is_inference() == (context is torch.inference_mode)
    assert torch.equal(result, direct)


@pytest.mark.parametrize("op", OPS)
def test_a_function_gives_the_same_bits(op):
    sample = sample_input(op, torch.float32, MODE_SAMPLES[op])
    results = value_and_gradients(FUNCTIONS[op].apply, op, sample)
    direct = value_and_gradients(ours(op), op, sample)
    for result, expected in zip(results, direct, strict=True):
        assert torch.equal(result, expected)


@needs_extension
@pytest.mark.parametrize("op", OPS)
def test_the_operator_itself_is_the_function(op):
    """torch.ops.fastnn.<op>, called directly, with autograd."""
    sample = sample_input(op, torch.float32, MODE_SAMPLES[op])
    results = value_and_gradients(getattr(torch.ops.fastnn, op), op, sample)
    direct = value_and_gradients(ours(op), op, sample)
    for result, expected in zip(results, direct, strict=True):
        assert torch.equal(memory_of(result), memory_of(expected))


# --- in a process of its own ----------------------------------------------------------------------


def run_python(code: str, path: Path) -> Any:
    """What the code prints last, as JSON; the package is imported from ``path``."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=path,  # python -c looks there first
        capture_output=True,
        text=True,
        timeout=120,  # a bound on a hang, not a speed that is asked for
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
    assert "pip install" in messages[0]  # what to do about it
    # Three steps of float32: the same operations but for the order of a few sums.
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
    """A second runtime would have threads of its own, deaf to torch.set_num_threads."""
    code = IMPORT_AND_TRAIN + OPENMP_RUNTIMES
    available, messages, losses, torch_losses, runtimes = run_python(code, PACKAGE.parent)
    assert available
    assert messages == []
    # Three steps of float32: the same operations but for the order of a few sums.
    assert losses == pytest.approx(torch_losses, rel=1e-5)
    assert len(runtimes) == 1
