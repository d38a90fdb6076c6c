"""mlp: values, gradients, what its graph keeps, bad arguments."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnn
from support import chains
from support.bad_calls import as_kernels_raise, exception_of, floats
from support.chains import SAMPLES, Chain, layer_by_layer, make
from support.marks import needs_extension
from support.operators import DTYPE_IDS, every_dtype, memory_of
from support.oracles import assert_within
from support.sample_inputs import DTYPES
from support.small_cases import assert_close

every_sample = pytest.mark.parametrize("name", SAMPLES)


def capability(section: str, row: str) -> pytest.MarkDecorator:
    return pytest.mark.capability(section, row, operators=["mlp"])


@pytest.fixture(params=["extension", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The operator, and the plain PyTorch that runs without the extension."""
    if request.param == "reference":
        monkeypatch.setattr(fastnn.functional, "operators", lambda: fastnn.reference)
    return request.param


def gradients(chain: Chain, function: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """The output and the gradients of its leaves, for a non-constant incoming gradient."""
    output = chain.run(function)
    grad = torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output.dtype)
    leaves = [tensor for tensor in chain.tensors if tensor.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


# --- values and gradients -------------------------------------------------------------------------


@every_dtype
@every_sample
def test_values_and_gradients(implementation, name, dtype):
    chain = SAMPLES[name](dtype).as_leaves()
    before = [memory_of(tensor) for tensor in chain.tensors]
    value, *grads = gradients(chain)
    grad = torch.linspace(-1, 1, value.numel()).reshape(value.shape).to(dtype)
    exact = chains.expected(chain, grad)
    assert value.dtype == dtype
    assert_within("value", value, exact.value, exact.value_error)
    for i, (actual, right, error) in enumerate(
        zip(grads, exact.grads, exact.grad_errors, strict=True)
    ):
        assert actual.dtype == dtype
        assert_within(f"gradient {i}", actual, right, error)
    for tensor, bytes_before in zip(chain.tensors, before, strict=True):
        assert torch.equal(memory_of(tensor), bytes_before)


@needs_extension
@every_dtype
@every_sample
def test_the_bits_of_the_layers_one_by_one(name, dtype):
    chain = SAMPLES[name](dtype).as_leaves()
    results = zip(gradients(chain), gradients(chain, layer_by_layer), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in results)
    with torch.no_grad():
        assert torch.equal(chain.run(), chain.run(layer_by_layer))


@needs_extension
@every_sample
def test_the_result_has_the_layouts_of_the_layers(name):
    chain = SAMPLES[name](torch.float32).as_leaves()
    results = zip(gradients(chain), gradients(chain, layer_by_layer), strict=True)
    for ours, theirs in results:
        assert ours.shape == theirs.shape
        assert ours.stride() == theirs.stride()


def test_defaults(implementation):
    """No biases; a ReLU after all layers but the last."""
    chain = make((6, 5, 4, 3), (7,), biases=False)
    output = fastnn.functional.mlp(chain.input, chain.weights)
    assert torch.equal(output, chain.run())
    assert (output < 0).any()
    one = fastnn.functional.mlp(chain.input, chain.weights[:1])
    assert torch.equal(one, fastnn.functional.linear(chain.input, chain.weights[0]))
    by_name = fastnn.functional.mlp(
        input=chain.input, weights=chain.weights, biases=None, activations=("relu", "relu", None)
    )
    assert torch.equal(by_name, output)


@pytest.mark.parametrize("kind", [tuple, iter], ids=["tuples", "iterators"])
def test_other_sequences(implementation, kind):
    chain = make((6, 5, 3), (7,))
    output = fastnn.functional.mlp(
        chain.input, kind(chain.weights), kind(chain.biases), kind(chain.activations)
    )
    assert torch.equal(output, chain.run())


def test_one_parameter_in_several_layers(implementation):
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 5, dtype=torch.float64)
    results = []
    for function in (fastnn.functional.mlp, chains.stock):
        output = function(x, [weight] * 3, [bias] * 3, ["relu", "relu", None])
        results.append([output, *torch.autograd.grad(output.square().sum(), [weight, bias])])
    assert_close(*results)


@every_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["input", "weight 0", "weight 1", "bias 0", "bias 2", "gradient"])
def test_nan_and_infinity_pass_as_in_torch(implementation, dtype, value, where):
    chain = make((5, 4, 3, 2), (3,), dtype=dtype)
    kind, _, layer = where.partition(" ")
    owner = {"input": [chain.input], "weight": chain.weights, "bias": chain.biases}
    if kind in owner:
        owner[kind][int(layer or 0)].view(-1)[0] = value
    results = []
    for function in (fastnn.functional.mlp, chains.stock):
        leaves = chain.as_leaves()
        output = leaves.run(function)
        grad = torch.ones_like(output)
        if kind == "gradient":
            grad[0, 0] = value
        results.append([output, *torch.autograd.grad(output, leaves.tensors, grad)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours == torch.inf, theirs == torch.inf)
        assert torch.equal(ours == -torch.inf, theirs == -torch.inf)


@pytest.mark.cpu_only("the CPU's threads")
@needs_extension
@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", ["MNIST", "wide", "transposed"])
def test_any_number_of_threads_gives_the_same_bits(name, dtype):
    chain = SAMPLES[name](dtype).as_leaves()
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(gradients(chain))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


# --- which gradients ------------------------------------------------------------------------------

ACTIVATIONS = [
    ["relu", "relu", None],
    ["relu", "relu", "relu"],
    [None, None, None],
    ["relu", None, None],
    [None, "relu", None],
]
# Flags of the input, the weights and the biases of three layers.
WANTED = list(itertools.product((False, True), repeat=7))[1:]
by_activations = pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)


@by_activations
@pytest.mark.parametrize("wanted", WANTED, ids=lambda flags: "".join(str(int(f)) for f in flags))
def test_only_the_wanted_gradients(implementation, wanted, activations):
    """First and second derivatives, for each non-empty subset of wanted gradients."""
    chain = make((3, 4, 5, 2), (3,), activations=activations).as_leaves(wanted)
    leaves = [tensor for tensor in chain.tensors if tensor.requires_grad]
    results = []
    for function in (fastnn.functional.mlp, chains.stock):
        output = chain.run(function)
        grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        results.append([output, *grads, *second, *gradients(chain, function)])
    assert_close(*results)


@by_activations
@pytest.mark.parametrize("wanted", WANTED, ids=lambda flags: "".join(str(int(f)) for f in flags))
def test_it_keeps_what_torch_keeps(implementation, wanted, activations):
    """Compares the number of elements of each tensor that the graph keeps alive, counted once."""
    chain = make((3, 4, 5, 2), (6,), activations=activations).as_leaves(wanted)
    kept = []
    for function in (fastnn.functional.mlp, chains.stock):
        tensors: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=tensors: kept.setdefault(tensor.data_ptr(), tensor),
            lambda tensor: tensor,
        ):
            chain.run(function)
        kept.append(sorted(tensor.numel() for tensor in tensors.values()))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("changed", range(7))
@pytest.mark.parametrize("activations", ACTIVATIONS[:3], ids=str)
@pytest.mark.parametrize(
    "wanted",
    [
        *((True,) * 7, (False, *(True,) * 6), (True, *(False,) * 6)),
        *((False, False, True, False, False, False, False), (False,) * 4 + (True,) * 3),
        (False, False, False, True, False, False, True),
    ],
    ids=["all", "parameters", "input", "second weight", "biases", "last layer"],
)
def test_after_a_change_in_place(implementation, wanted, activations, changed, create_graph):
    """As in torch, tensors that no gradient depends on may change before the backward, and changes
    to the others are detected."""
    results = []
    for function in (fastnn.functional.mlp, chains.stock):
        chain = make((3, 4, 5, 2), (3,), activations=activations).as_leaves(wanted)
        leaves = [tensor for tensor in chain.tensors if tensor.requires_grad]
        output = chain.run(function)
        with torch.no_grad():
            chain.tensors[changed].add_(1)
        try:
            grads = torch.autograd.grad(output.sum(), leaves, create_graph=create_graph)
            second = [g for g in grads if g.requires_grad] if create_graph else []
            if second:
                total = sum(g.square().sum() for g in second)
                grads += torch.autograd.grad(
                    total, leaves, allow_unused=True, materialize_grads=True
                )
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            grads = None
        results.append(grads)
    assert (results[0] is None) == (results[1] is None)
    if results[0] is not None:
        assert_close(*results)


def test_an_output_changed_in_place(implementation):
    """The backward needs the output of a ReLU, as in torch."""
    for activation in ("relu", None):
        chain = make((3, 4, 2), (3,), activations=["relu", activation]).as_leaves()
        output = chain.run()
        output.add_(1)
        if activation:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()
        else:
            output.sum().backward()


@by_activations
def test_parameters_that_inference_made(implementation, activations):
    """Autograd can't save them: only the last layer's bias trains, as in torch."""
    with torch.inference_mode():
        frozen = make((3, 4, 5, 2), (3,), activations=activations)
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (fastnn.functional.mlp, chains.stock):
        output = function(frozen.input, frozen.weights, [*frozen.biases[:2], bias], activations)
        results.append(torch.autograd.grad(output.sum(), bias))
    assert_close(*results)


# --- backward -------------------------------------------------------------------------------------


@capability("autograd", "`retain_graph=True`")
def test_a_graph_that_is_kept_gives_the_same_again(implementation):
    chain = make((6, 5, 4, 3), (7,)).as_leaves()
    output = chain.run()
    grad = torch.randn_like(output)
    first = torch.autograd.grad(output, chain.tensors, grad, retain_graph=True)
    clones = [tensor.clone() for tensor in first]
    for tensor in first:
        tensor.zero_()
    graph = torch.autograd.grad(output, chain.tensors, grad, create_graph=True)
    assert_close([g.detach() for g in graph], clones)
    last = torch.autograd.grad(output, chain.tensors, grad)
    assert all(map(torch.equal, last, clones))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, chain.tensors, grad)


@needs_extension
def test_one_node_of_autograd():
    output = make((6, 5, 3), (7,)).as_leaves().run()
    assert output.grad_fn.name() == "MLPBackward"
    assert {edge[0].name() for edge in output.grad_fn.next_functions} == {
        "torch::autograd::AccumulateGrad"
    }


@capability("autograd", "hooks of tensors and of graph nodes")
def test_hooks_on_the_output_and_on_parameters(implementation):
    results = []
    for function in (fastnn.functional.mlp, chains.stock):
        chain = make((6, 5, 3), (7,)).as_leaves()
        seen = []
        chain.weights[0].register_hook(lambda g, seen=seen: seen.append(g.clone()) or 2 * g)
        chain.biases[1].register_hook(lambda g, seen=seen: seen.append(g.clone()))
        output = chain.run(function)
        output.register_hook(lambda g, seen=seen: seen.append(g.clone()) or 3 * g)
        output.sum().backward()
        total = sorted(tensor.sum().item() for tensor in seen)
        results.append([torch.tensor(total), *(tensor.grad for tensor in chain.tensors)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    assert len(results[0][0]) == 3


def test_an_undefined_gradient(implementation):
    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    chain = make((6, 5, 3), (7,)).as_leaves()
    Undefined.apply(chain.run()).sum().backward()
    assert all(tensor.grad is None for tensor in chain.tensors)


@needs_extension
@pytest.mark.cpu_only("the CPU's copy-on-write")
def test_copies_on_write_stay_so():
    chain = make((6, 5, 4, 3), (7,))
    chain = chain.of([torch._lazy_clone(tensor) for tensor in chain.tensors]).as_leaves()
    gradients(chain)
    assert all(torch._C._is_cow_tensor(tensor) for tensor in chain.tensors)


# --- bad arguments --------------------------------------------------------------------------------

GOOD = {
    "input": lambda: floats(2, 3),
    "weights": lambda: [floats(4, 3), floats(5, 4)],
    "biases": lambda: [floats(4), floats(5)],
    "activations": lambda: ["relu", None],
}

# The argument to replace and its bad value; the error, and patterns that its message matches.
BAD_CALLS: dict[str, tuple[str, Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "input is a list": ("input", lambda: [1.0], TypeError, ("input", "must be Tensor", "list")),
    "input is None": ("input", lambda: None, TypeError, ("input", "must be Tensor", "NoneType")),
    "a weight is a number": (
        "weights",
        lambda: [floats(4, 3), 2.0],
        TypeError,
        (r"weights\[1\]", "must be Tensor", "float"),
    ),
    "a weight is None": (
        "weights",
        lambda: [None, floats(5, 4)],
        TypeError,
        (r"weights\[0\]", "must be Tensor", "NoneType"),
    ),
    "a bias is a string": (
        "biases",
        lambda: [floats(4), "abc"],
        TypeError,
        (r"biases\[1\]", "must be Tensor", "str"),
    ),
    "no layers": ("weights", lambda: [], ValueError, ("weights for at least one layer", "none")),
    "a bias too few": ("biases", lambda: [floats(4)], ValueError, ("biases", "2 layers", "got 1")),
    "a bias too many": (
        "biases",
        lambda: [floats(4), None, None],
        ValueError,
        ("biases", "2 layers", "got 3"),
    ),
    "an activation too few": (
        "activations",
        lambda: ["relu"],
        ValueError,
        ("activations", "2 layers", "got 1"),
    ),
    "another activation": (
        "activations",
        lambda: ["relu", "tanh"],
        ValueError,
        (r"activations\[1\]", "'relu' or None", "'tanh'"),
    ),
    "activations is a string": (
        "activations",
        lambda: "relu",
        TypeError,
        ("activations", "a list of 'relu' and None", "not str"),
    ),
    "in_features differ": ("input", lambda: floats(2, 6), RuntimeError, ("input|mat1", "6", "3")),
    "in_features of the second layer differ": (
        "weights",
        lambda: [floats(4, 3), floats(5, 6)],
        RuntimeError,
        ("weight|mat1", "4", "6"),
    ),
    "0-d input": ("input", lambda: floats(), RuntimeError, ("linear|input",)),
    "3-d weight": (
        "weights",
        lambda: [floats(4, 3), floats(1, 5, 4)],
        RuntimeError,
        ("3D|3-D|3 dim|weight",),
    ),
    "a bias of another length": (
        "biases",
        lambda: [floats(4), floats(6)],
        RuntimeError,
        ("bias|tensor", "5", "6"),
    ),
    "a weight of another dtype": (
        "weights",
        lambda: [floats(4, 3), floats(5, 4, dtype=torch.float64)],
        RuntimeError,
        ("weight|dtype", "Float|float", "Double|double|float64"),
    ),
    "a bias of another dtype": (
        "biases",
        lambda: [floats(4), floats(5, dtype=torch.bfloat16)],
        RuntimeError,
        ("bias|dtype", "Float|float", "BFloat16|bfloat16"),
    ),
    "integers": (
        "input",
        lambda: torch.ones(2, 3, dtype=torch.long),
        RuntimeError,
        ("Long|long|dtype",),
    ),
}


@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_arguments(implementation, bad, wants):
    name, value, error, says = BAD_CALLS[bad]
    arguments = {key: make_good() for key, make_good in GOOD.items()}
    arguments["weights"][0].requires_grad_(wants)
    arguments[name] = value()
    tensors = [t for t in torch.utils._pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
    before = [memory_of(tensor) for tensor in tensors]
    raised = exception_of(fastnn.functional.mlp, **arguments)
    error, says = as_kernels_raise(error, says)
    assert isinstance(raised, error), repr(raised)
    for pattern in says:
        assert re.search(pattern, str(raised)), f"{pattern!r} is not in {str(raised)!r}"
    assert all(map(torch.equal, map(memory_of, tensors), before))


GOOD_BACKWARD = {
    "grad_output": lambda: floats(2, 5),
    "inputs": lambda: [floats(2, 3), floats(2, 4)],
    "weights": lambda: [floats(4, 3), floats(5, 4)],
    "output": lambda: floats(2, 5),
    "relu": lambda: [True, True],
    "output_mask": lambda: [True] * 5,
}
BAD_BACKWARDS: dict[str, tuple[str, Callable[[], Any], type[Exception], str]] = {
    "no layers": ("weights", lambda: [], ValueError, "weights for at least one layer"),
    "an input too few": ("inputs", lambda: [floats(2, 3)], ValueError, "inputs"),
    "a flag too few": ("relu", lambda: [True], ValueError, r"\brelu\b"),
    "a mask too short": ("output_mask", lambda: [True] * 4, ValueError, "output_mask"),
    "a mask too long": ("output_mask", lambda: [True] * 6, ValueError, "output_mask"),
    "grad_output of no dimension": ("grad_output", lambda: floats(), RuntimeError, "grad_output"),
    "grad_output of a row less": ("grad_output", lambda: floats(1, 5), RuntimeError, "output"),
    "grad_output of a column less": ("grad_output", lambda: floats(2, 4), RuntimeError, "output"),
    "grad_output of another dtype": (
        "grad_output",
        lambda: floats(2, 5, dtype=torch.float64),
        RuntimeError,
        "output",
    ),
    "output missing": ("output", lambda: None, RuntimeError, r"\boutput\b.*None"),
    "output of a row less": ("output", lambda: floats(1, 5), RuntimeError, r"\boutput\b"),
    "output of another dtype": (
        "output",
        lambda: floats(2, 5, dtype=torch.float64),
        RuntimeError,
        r"\boutput\b",
    ),
    **{
        f"input {i} {what}": (
            "inputs",
            lambda i=i, value=value: [
                value() if i == j else good for j, good in enumerate(GOOD_BACKWARD["inputs"]())
            ],
            RuntimeError,
            rf"inputs\[{i}\]",
        )
        for i, columns in ((0, 3), (1, 4))
        for what, value in {
            "missing": lambda: None,
            "of a row less": lambda c=columns: floats(1, c),
            "of a column less": lambda c=columns: floats(2, c - 1),
            "of no dimension": lambda: floats(),
            "of another dtype": lambda c=columns: floats(2, c, dtype=torch.float64),
        }.items()
    },
    **{
        f"weight {i} {what}": (
            "weights",
            lambda i=i, value=value: [
                value() if i == j else good for j, good in enumerate(GOOD_BACKWARD["weights"]())
            ],
            RuntimeError,
            rf"weights\[{i}\]|inputs\[{i}\]",
        )
        for i, (rows, columns) in ((0, (4, 3)), (1, (5, 4)))
        for what, value in {
            "missing": lambda: None,
            "of a row less": lambda r=rows, c=columns: floats(r - 1, c),
            "of a column less": lambda r=rows, c=columns: floats(r, c - 1),
            "of 1 dimension": lambda r=rows: floats(r),
            "of another dtype": lambda r=rows, c=columns: floats(r, c, dtype=torch.float64),
        }.items()
    },
}


@needs_extension
@pytest.mark.parametrize("bad", BAD_BACKWARDS)
def test_bad_arguments_of_the_backward(bad):
    name, value, error, says = BAD_BACKWARDS[bad]
    arguments = {key: make_good() for key, make_good in GOOD_BACKWARD.items()}
    arguments[name] = value()
    tensors = [t for t in torch.utils._pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
    before = [memory_of(tensor) for tensor in tensors]
    raised = exception_of(torch.ops.fastnn.mlp_backward, **arguments)
    error, patterns = as_kernels_raise(error, (says,))
    assert isinstance(raised, error), repr(raised)
    for pattern in patterns:
        assert re.search(pattern, str(raised)), f"{pattern!r} is not in {str(raised)!r}"
    assert all(map(torch.equal, map(memory_of, tensors), before))


@needs_extension
@pytest.mark.parametrize("mask", list(itertools.product((False, True), repeat=5)), ids=str)
def test_the_backward_takes_no_more_than_it_needs(mask):
    """Tensors that no wanted gradient needs may be missing; the reference gives the same."""
    arguments = {key: make_good() for key, make_good in GOOD_BACKWARD.items()}
    whole = torch.ops.fastnn.mlp_backward(**arguments)
    first = 0 if mask[0] else next((i for i in (0, 1) if mask[1 + i] or mask[3 + i]), 2)
    passes = [i > first or mask[0] for i in (0, 1)]
    masks = [False, passes[1]]
    for i in (0, 1):
        if not (mask[1 + i] or masks[i]):
            arguments["inputs"][i] = None
        if not passes[i]:
            arguments["weights"][i] = None
    arguments["output_mask"] = list(mask)
    wanted = [grad for grad, flag in zip(whole, mask, strict=True) if flag]
    some = torch.ops.fastnn.mlp_backward(**arguments)
    assert len(some) == len(wanted)
    assert all(map(torch.equal, some, wanted))
    by_reference = fastnn.reference.mlp_backward(**arguments)
    torch.testing.assert_close(some, by_reference, rtol=1e-5, atol=1e-5)


@needs_extension
@every_sample
def test_the_forward_gives_every_layers_output(name):
    chain = SAMPLES[name](torch.float64)
    outputs = torch.ops.fastnn.mlp_forward(chain.input, chain.weights, chain.biases, chain.relu)
    by_reference = fastnn.reference.mlp_forward(
        chain.input, chain.weights, chain.biases, chain.relu
    )
    assert_close(outputs, by_reference)


def test_a_tensor_is_no_list_of_layers():
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    with pytest.raises(TypeError, match="argument 'weights' must be a list of Tensors"):
        fastnn.functional.mlp(x, w)
    with pytest.raises(TypeError, match="argument 'activations' must be a list"):
        fastnn.functional.mlp(x, [w], activations="relu")
