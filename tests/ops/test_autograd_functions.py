"""What is specific to the classes of fastnn.autograd. As an ``implementation``, they also run
through the tests of values, gradients, transforms, modes and errors."""

from __future__ import annotations

import gc
import inspect
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
from fastnn.autograd import CrossEntropy, NLLLoss
from support.marks import needs_extension
from support.operator_cases import CASES, COMPILE_SAMPLES
from support.operators import FUNCTIONS, LINEARS, value_and_gradients
from support.sample_inputs import DTYPES, OPS, sample_input
from support.small_cases import assert_close, class_weights, normal

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop",  # vmap over torch's own operators, which then loop
    "ignore:`torch.jit.script` is deprecated",  # torch's own use of it, in forward mode
)


@pytest.mark.parametrize("op", OPS)
def test_they_are_functions_with_all_that_one_has(op):
    function = FUNCTIONS[op]
    assert issubclass(function, torch.autograd.Function)
    for name in ("forward", "setup_context", "backward", "jvp"):
        assert getattr(function, name) is not getattr(torch.autograd.Function, name)
    assert function.generate_vmap_rule


@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_every_option_by_position_and_by_keyword(op):
    """The arguments have the positions of torch's functions."""
    options = {"weight": class_weights(), "size_average": None, "ignore_index": 1, "reduce": None}
    options["reduction"] = "sum"
    if op == "cross_entropy":
        options["label_smoothing"] = 0.1
    input, target = normal(4, 3), torch.tensor([0, 1, 2, 2])
    expected = getattr(F, op)(input, target, **options)
    assert list(options) == list(inspect.signature(getattr(F, op)).parameters)[2:]
    assert_close(FUNCTIONS[op].apply(input, target, *options.values()), expected)
    assert_close(FUNCTIONS[op].apply(input=input, target=target, **options), expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such'"):
        FUNCTIONS[op].apply(input, target, no_such=1)


# --- what is computed, and what is kept -----------------------------------------------------------


class Calls(TorchDispatchMode):
    """Records the calls of fastnn's operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastnn":
            self.calls[function.__name__.split(".")[0]] = args
        return function(*args, **(kwargs or {}))


@needs_extension
@pytest.mark.parametrize("op", OPS)
def test_the_operators_run_unless_their_result_is_differentiated(op):
    forward = op + ("_forward" if op.endswith(("nll_loss", "cross_entropy")) else "")
    # linear_cross_entropy's backward only multiplies the gradients left by the forward.
    backward = [f"{op}_backward"] if op != "linear_cross_entropy" else []
    sample = sample_input(op, torch.float32, CASES[op].every_tensor)
    input = sample.args[0].detach().requires_grad_()
    for create_graph in (False, True):
        with Calls() as recorded:
            output = FUNCTIONS[op].apply(input, *sample.args[1:], **sample.kwargs)
            torch.autograd.grad(output.sum(), input, create_graph=create_graph)
        assert list(recorded.calls) == [forward] + backward * (not create_graph)


@needs_extension
@pytest.mark.parametrize("op", LINEARS)
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, True, True)]
)
def test_linear_computes_and_keeps_what_is_wanted(op, wanted):
    tensors = [normal(4, 3), normal(2, 3), normal(2)]
    for tensor, wants in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(wants)
    output = FUNCTIONS[op].apply(*tensors)
    kept = [tensor is not None for tensor in output.grad_fn.saved_tensors]
    assert kept == [wanted[1], wanted[0]] + [True] * (op == "linear_relu")
    with Calls() as recorded:
        output.sum().backward()
    assert list(recorded.calls[f"{op}_backward"][-1]) == list(wanted)
    assert [tensor.grad is not None for tensor in tensors] == list(wanted)


@needs_extension
def test_cross_entropy_keeps_nothing_without_a_gradient():
    input, target = normal(4, 3), torch.tensor([0, 2, 1, 1])
    for wants, context in ((False, torch.enable_grad), (True, torch.no_grad)):
        with Calls() as recorded, context():
            CrossEntropy.apply(input.detach().requires_grad_(wants), target)
        assert not recorded.calls["cross_entropy_forward"][-1]


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_reference_reads_what_a_kernel_keeps(dtype, reduction, smoothing):
    """Higher-order derivatives are computed from it."""
    input, target = normal(4, 3).to(dtype), torch.tensor([0, 2, 1, -100])
    arguments, options = (target, class_weights().to(dtype)), (-100, reduction, smoothing)
    operators = torch.ops.fastnn
    loss, kept, *others = operators.cross_entropy_forward(input, *arguments, *options, keep=True)
    backward = torch.ones_like(loss), kept, *arguments, *others, *options
    # Both compute in at least float32 and round once: within torch's tolerance for the dtype.
    torch.testing.assert_close(
        fastnn.reference.cross_entropy_backward(*backward),
        operators.cross_entropy_backward(*backward),
    )


@pytest.mark.parametrize("op", LINEARS)
def test_forward_mode_keeps_both_factors_for_the_call_alone(op):
    input, weight = normal(4, 3), normal(2, 3)
    gone = weakref.ref(input)
    output, _ = jvp(lambda x: FUNCTIONS[op].apply(x, weight), (input,), (normal(4, 3),))
    del input
    gc.collect()
    assert gone() is None
    assert output.shape == (4, 2)


def test_nll_losss_second_derivative_is_zero_rather_than_missing():
    input, target = normal(2, 3).requires_grad_(), torch.tensor([0, 2])
    loss = NLLLoss.apply(input, target)
    (first,) = torch.autograd.grad(loss, input, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), input)
    assert torch.equal(second, torch.zeros_like(input))


# --- derivatives with respect to targets and weights ----------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("argument", ["target", "weight"])
def test_batched_probabilities_and_weights_have_derivatives(argument, smoothing):
    """The nesting of transforms hides from ``apply`` that a derivative is wanted."""
    arguments = {
        "input": normal(4, 3),
        "target": torch.rand(4, 3, dtype=torch.float64),
        "weight": class_weights(),
    }
    batch = torch.stack([arguments[argument], 2 * arguments[argument]])

    def losses(function, value: Tensor) -> Tensor:
        options = {**arguments, argument: value}
        return function(**options, label_smoothing=smoothing).square()

    results = [
        grad(lambda values, f=f: vmap(lambda value: losses(f, value))(values).sum())(batch)
        for f in (CrossEntropy.apply, F.cross_entropy)
    ]
    assert_close(*results)


@pytest.mark.parametrize("function", [NLLLoss, CrossEntropy])
def test_batched_weights_of_indices_have_none(function):
    input, target = normal(4, 3), torch.tensor([0, 2, 1, 1])
    weights = torch.stack([class_weights()] * 2)

    def loss(weights: Tensor) -> Tensor:
        return vmap(lambda weight: function.apply(input, target, weight))(weights).sum()

    with pytest.raises(RuntimeError, match="weight of class indices is not differentiable"):
        grad(loss)(weights)
    with pytest.raises(RuntimeError, match="weight of class indices is not differentiable"):
        jvp(loss, (weights,), (weights,))


@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_batched_targets(op):
    input, targets = normal(5, 4, 3), torch.tensor([[0, 2, 1, -100]] * 5)
    targets[3] = 1
    per_sample = vmap(grad(FUNCTIONS[op].apply))(input, targets)
    assert_close(per_sample, vmap(grad(getattr(F, op)))(input, targets))


# --- subclasses -----------------------------------------------------------------------------------


class Scaled(CrossEntropy):
    """A user-defined backward."""

    @staticmethod
    def backward(ctx, *grads):
        grad_input, *others = CrossEntropy.backward(ctx, *grads)
        return 7 * grad_input, *others


def test_a_subclasses_backward_runs_wherever_the_function_does(fresh_dynamo):
    input, target = normal(4, 3).requires_grad_(), torch.tensor([0, 2, 1, 1])
    (gradient,) = torch.autograd.grad(F.cross_entropy(input, target), input)

    def loss(input: Tensor) -> Tensor:
        return Scaled.apply(input, target)

    compiled = torch.compile(loss, backend="aot_eager")
    for function in (loss, compiled):
        assert_close(torch.autograd.grad(function(input), input), (7 * gradient,))
    x = input.detach()
    assert_close(grad(loss)(x), 7 * gradient)
    assert_close(vmap(grad(loss))(x.unsqueeze(0)), 7 * gradient.unsqueeze(0))
    assert_close(grad(lambda xs: vmap(loss)(xs).sum())(x.unsqueeze(0)), 7 * gradient.unsqueeze(0))


# --- compilers ------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize(("op", "name"), COMPILE_SAMPLES)
def test_they_compile_in_one_graph_to_the_same_bits(fresh_dynamo, op, name):
    compiled = torch.compile(FUNCTIONS[op].apply, fullgraph=True, backend="aot_eager")
    sample = sample_input(op, torch.float32, name)
    eager = value_and_gradients(FUNCTIONS[op].apply, op, sample)
    for result, expected in zip(value_and_gradients(compiled, op, sample), eager, strict=True):
        assert torch.equal(result, expected)


@needs_extension
@pytest.mark.filterwarnings("ignore:`torch.jit.trace`")
def test_a_trace_holds_the_operator():
    x = normal(4, 3)
    traced = torch.jit.trace(lambda x: fastnn.autograd.LogSoftmax.apply(x, 1), x)
    assert "fastnn::log_softmax" in str(traced.graph)
    assert_close(traced(2 * x), F.log_softmax(2 * x, 1))
