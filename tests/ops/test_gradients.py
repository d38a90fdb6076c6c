"""Derivatives of any order, against finite differences and torch; changes in place."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.multiprocessing.reductions import StorageWeakRef

import fastnn
from support.marks import needs_extension
from support.operators import LINEARS, TORCH, leaves_of, ours, random_grad_like
from support.oracles import assert_within, away_from_kink, expected
from support.sample_inputs import DTYPES, OPS, Sample, sample_input, sample_names
from support.small_cases import Function, assert_close, class_indices, class_weights, normal

pytestmark = pytest.mark.filterwarnings(
    "ignore:size_average and reduce args will be deprecated",
    # vmap warns where torch itself has no batching rule and loops: slow, not wrong.
    "ignore:There is a performance drop",
    "ignore:`torch.jit.script` is deprecated",  # torch's own use of it, in forward mode
)


# --- cases: small, in float64, where finite differences are exact to about 1e-8 -------------------


def linear_arguments(
    shape: tuple[int, ...], outputs: int, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments that keep every ReLU away from its kink, where finite differences would give the
    mean of both slopes. Steps are 1e-6, multiplied by weights of at most about 5."""
    while True:
        input, weight = normal(*shape), normal(outputs, shape[-1])
        added = normal(outputs) if bias else None
        if F.linear(input, weight, added).abs().amin() > 1e-3:
            return input, weight, added


# One for each rank of the input: no batch, a batch, a sequence.
LINEAR_SHAPES = [(3,), (2, 3), (2, 2, 3)]

LOSS_SHAPES = [(3,), (4, 3), (2, 3, 2), (2, 3, 2, 1)]  # (C), (N, C), (N, C, d1), (N, C, d1, d2)

LOG_SOFTMAX_CASES = [((), 0), ((3,), 0), ((2, 3), 1), ((3, 2), 0), ((2, 3, 2), 1), ((2, 3, 2), -1)]


def assert_derivatives(
    implementation: str,
    function: Function,
    inputs: tuple[Tensor | None, ...],
    batched_forward: bool = True,
) -> None:
    """First and second derivatives, backward, forward, batched, and forward over backward.

    Only the first ones for the reference, which consists of torch's operators.
    """
    if implementation == "reference":
        gradcheck(function, inputs)
        return
    gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=batched_forward,
        check_undefined_grad=True,
    )
    gradgradcheck(function, inputs, check_fwd_over_rev=True, check_batched_grad=True)


SOME_WANTED = list(itertools.product((False, True), repeat=3))[1:]


@pytest.mark.parametrize("wanted", SOME_WANTED)
@pytest.mark.parametrize("shape", LINEAR_SHAPES)
@pytest.mark.parametrize("op", LINEARS)
@pytest.mark.capability("autograd", "`gradcheck`, `gradgradcheck`")
def test_linear(implementation, op, shape, wanted):
    """Each non-empty subset of the arguments requires gradients."""
    inputs = linear_arguments(shape, 4, bias=True)
    for tensor, wants in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(wants)
    assert_derivatives(implementation, ours(op), inputs)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", LINEAR_SHAPES)
@pytest.mark.parametrize("op", LINEARS)
def test_linear_without_bias(implementation, op, shape, wanted):
    inputs = linear_arguments(shape, 4, bias=False)
    for tensor, wants in zip(inputs, wanted, strict=False):
        tensor.requires_grad_(wants)
    # Without a batch torch's own linear fails under vmap over jvp, and so does all that uses it.
    assert_derivatives(implementation, ours(op), inputs, batched_forward=len(shape) > 1)


@pytest.mark.parametrize(("shape", "dim"), LOG_SOFTMAX_CASES)
@pytest.mark.capability("autograd", "`gradcheck`, `gradgradcheck`", operators=["log_softmax"])
def test_log_softmax(implementation, shape, dim):
    input = normal(*shape).requires_grad_()
    assert_derivatives(implementation, lambda x: fastnn.functional.log_softmax(x, dim), (input,))


every_loss = pytest.mark.parametrize(
    ("shape", "reduction", "weighted"),
    list(itertools.product(LOSS_SHAPES, ("none", "mean", "sum"), (False, True))),
)


@every_loss
@pytest.mark.capability("autograd", "`gradcheck`, `gradgradcheck`", operators=["nll_loss"])
def test_nll_loss(implementation, shape, reduction, weighted):
    target = class_indices(shape, ignored=True)
    options = {"reduction": reduction, "weight": class_weights() if weighted else None}
    input = normal(*shape).requires_grad_()
    assert_derivatives(
        implementation, lambda x: fastnn.functional.nll_loss(x, target, **options), (input,)
    )


@every_loss
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.capability("autograd", "`gradcheck`, `gradgradcheck`", operators=["cross_entropy"])
def test_cross_entropy(implementation, kind, label_smoothing, shape, reduction, weighted):
    target = class_indices(shape, ignored=True)
    if kind == "probabilities":
        target = torch.rand(shape, dtype=torch.float64)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    weight = class_weights() if weighted else None
    input = normal(*shape).requires_grad_()
    assert_derivatives(
        implementation,
        lambda x: fastnn.functional.cross_entropy(x, target, weight, **options),
        (input,),
    )


# --- every sample again, through the differentiable backward --------------------------------------


@pytest.mark.parametrize(
    ("op", "name"),
    [
        pytest.param(op, name, id=f"{op}-{name}")
        for op in OPS
        for name in sample_names(op)
        if name != "integer_input_cast"  # it has no gradient
    ],
)
def test_create_graph_changes_no_gradient(implementation, op, name):
    """The differentiable backward is another code path; its gradients must match the oracle's."""
    sample = sample_input(op, torch.float32, name)
    leaves = leaves_of(op, sample)
    output = ours(op)(*leaves, *sample.args[len(leaves) :], **sample.kwargs)
    grad_output = random_grad_like(op, sample, output.detach())
    grads = torch.autograd.grad(output, leaves, grad_output.requires_grad_(), create_graph=True)
    exact = expected(op, sample, grad_output.detach())
    for grad_, exact_grad, error in zip(grads, exact.grads, exact.grad_errors, strict=True):
        assert grad_.requires_grad
        # Twice the fused backward's error: it consists of several operators, each of which rounds.
        assert_within("gradient", grad_, exact_grad, error, slack=2)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_all_rows_ignored_with_and_without_create_graph(
    implementation, op, create_graph, label_smoothing
):
    options = {"label_smoothing": label_smoothing} if op == "cross_entropy" else {}
    input = normal(4, 3).requires_grad_()
    loss = ours(op)(input, torch.full((4,), -100), **options)
    (gradient,) = torch.autograd.grad(loss, input, create_graph=create_graph)
    assert torch.equal(gradient, torch.zeros_like(input))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_ignored_rows_drop_nan_with_and_without_create_graph(implementation, op, create_graph):
    input = normal(4, 3).requires_grad_()
    loss = ours(op)(input, torch.tensor([0, -100, 1, -100]), reduction="none")
    grad_output = torch.tensor([1.0, torch.nan, 1.0, torch.inf], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss, input, grad_output, create_graph=create_graph)
    assert torch.equal(gradient[1::2], torch.zeros_like(input[1::2]))
    assert gradient[::2].isfinite().all()


# --- gradients that only torch's composite computes -----------------------------------------------


def assert_as_torch(op: str, inputs: tuple[Tensor, ...], options: dict) -> None:
    """Compares values, gradients and second derivatives for all inputs that want any; in float64
    both run the same operators, except for the order of a sum: 1e-12 is thousands of roundings."""
    __tracebackhide__ = True
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    results = []
    for function in (ours(op), TORCH[op]):
        value = function(*inputs, **options)
        grads = torch.autograd.grad(value.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
        results.append([value, *grads, *second])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("wanted", SOME_WANTED)
def test_probabilities_and_their_weights_may_want_gradients(
    implementation, wanted, label_smoothing, reduction
):
    tensors = normal(4, 3), torch.rand(4, 3, dtype=torch.float64), class_weights()
    for tensor, wants in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(wants)
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    assert_as_torch("cross_entropy", tensors, options)
    leaves = tuple(tensor for tensor in tensors if tensor.requires_grad)

    def function(*given: Tensor) -> Tensor:
        values = iter(given)
        arguments = [next(values) if tensor.requires_grad else tensor for tensor in tensors]
        return fastnn.functional.cross_entropy(*arguments, **options)

    gradcheck(function, leaves, check_forward_ad=True)


def test_logits_from_probabilities_of_one_leaf(implementation):
    """A target computed from the input, as in self-distillation, adds its own gradient."""

    def loss(function: Function, input: Tensor) -> Tensor:
        return function(input, input.softmax(1))

    input = normal(4, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(fastnn.functional.cross_entropy, input), input)
    (torch_gradient,) = torch.autograd.grad(loss(F.cross_entropy, input), input)
    # The gradients are about 0.1 and come from the same operators: 1e-12 is far above rounding.
    torch.testing.assert_close(gradient, torch_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("logits_want", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_class_weights_of_indices_may_not_want_gradients(implementation, op, options, logits_want):
    if op == "nll_loss" and options:
        options = {"reduction": "none"}
    input = normal(4, 3).requires_grad_(logits_want)
    weight = class_weights().requires_grad_()
    arguments = (input, class_indices((4, 3), ignored=False), weight)
    for function in (TORCH[op], ours(op)):
        with pytest.raises(RuntimeError, match=r"weight.*not differentiable|not diff.*'weight'"):
            function(*arguments, **options)


# --- changes in place ----------------------------------------------------------------------------


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("changed", ["input", "output"])
def test_a_saved_tensor_changed_in_place_is_noticed(implementation, changed, create_graph):
    """It raises instead of giving wrong gradients."""
    x, weight, bias = linear_arguments((2, 3), 4, bias=True)
    weight.requires_grad_()
    output = fastnn.functional.linear_relu(x, weight, bias)
    with torch.no_grad():
        (x if changed == "input" else output).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.sum(), weight, create_graph=create_graph)


def wanting(wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """A linear's input, weight and bias; leaves where a gradient is wanted."""
    arguments = linear_arguments((2, 3), 4, bias=True)
    return tuple(map(Tensor.requires_grad_, arguments, wanted))


@pytest.mark.parametrize("wanted", SOME_WANTED)
@pytest.mark.parametrize("op", LINEARS)
def test_linear_keeps_what_torch_keeps(implementation, op, wanted):
    """Compares the number of elements of each tensor that the graph keeps alive."""
    arguments = wanting(wanted)
    kept = []
    for function in (ours(op), TORCH[op]):
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept[-1].append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            function(*arguments)
    assert sorted(kept[0]) == sorted(kept[1])


def bytes_kept(function: Function, *inputs: Tensor) -> int:
    """The memory that the graph of a call keeps alive, each storage counted once."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        function(*inputs)
    storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(storages.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_blocks_keep_no_more_memory_than_torchs(implementation, frozen):
    """Adapter training has such blocks: frozen, with an input that requires a gradient."""
    blocks = [(nn.LayerNorm(8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(6)]
    model = nn.Sequential(*itertools.chain(*blocks)).requires_grad_(not frozen)
    input = torch.randn(64, 8, requires_grad=True)
    stock = bytes_kept(model, input)
    assert bytes_kept(fastnn.fuse(model), input) <= stock


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("changed", range(3), ids=["input", "weight", "bias"])
@pytest.mark.parametrize("wanted", SOME_WANTED)
@pytest.mark.parametrize("op", LINEARS)
def test_linear_after_a_change_in_place(implementation, op, wanted, changed, create_graph):
    """Tensors that no gradient depends on may change before the backward: features that the next
    layer overwrites, weights that an optimizer steps between two losses."""
    arguments = wanting(wanted)
    results = []
    for function in (ours(op), TORCH[op]):
        leaves = [tensor for tensor in arguments if tensor.requires_grad]
        output = function(*arguments)
        with torch.no_grad():
            arguments[changed].add_(1)
        try:
            grads = torch.autograd.grad(output.sum(), leaves, create_graph=create_graph)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            grads = None
        with torch.no_grad():
            arguments[changed].sub_(1)
        results.append(grads)
    # Changed by 1 and back, which rounds; float64 values of order one.
    assert_close(*results)


@pytest.mark.parametrize("made", range(2), ids=["input", "weight"])
@pytest.mark.parametrize("op", LINEARS)
def test_a_bias_trains_behind_inference_tensors(implementation, op, made):
    """Features or frozen weights made in inference mode, which autograd can't save."""
    arguments = list(wanting((False, False, True)))
    with torch.inference_mode():
        arguments[made] = arguments[made].clone()
    results = [
        torch.autograd.grad(function(*arguments).sum(), arguments[2])
        for function in (ours(op), TORCH[op])
    ]
    assert_close(*results)


LOGITS_OVERWRITTEN = {
    "view in numpy": pytest.param(
        lambda logits: logits.detach().view(torch.uint8).numpy().fill(0x3F),
        marks=pytest.mark.not_on_a_gpu("memory that numpy can't see"),
    ),
    ".data": lambda logits: logits.data.fill_(3),
    "clamp_": lambda logits: logits.clamp_(-0.1, 0.1),
    "masked_fill_": lambda logits: logits[:, 1:].fill_(-torch.inf),
    "softmax, out=": lambda logits: torch.softmax(logits.detach(), 1, out=logits.detach()),
}
TARGETS = {
    "index": ({}, False),
    "smoothed and weighted": ({"label_smoothing": 0.1, "weight": class_weights()}, False),
    "probabilities": ({"weight": class_weights()}, True),
}


def loss_of_logits(logits: Tensor, kind: str, reduction: str) -> tuple[Tensor, Tensor]:
    """A loss of four rows, one of them ignored, and an incoming gradient other than 1."""
    options, probabilities = TARGETS[kind]
    options = {
        name: value.to(logits.dtype) if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    target = class_indices((4, 3), ignored=True)
    if probabilities:
        target = torch.linspace(0, 1, 12).reshape(4, 3).to(logits.dtype)
    loss = fastnn.functional.cross_entropy(logits, target, reduction=reduction, **options)
    return loss, torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape).to(loss.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(
    "overwrite",
    [
        pytest.param(*getattr(way, "values", [way]), marks=getattr(way, "marks", ()), id=name)
        for name, way in LOGITS_OVERWRITTEN.items()
    ],
)
def test_logits_may_change_after_the_loss(implementation, overwrite, kind, reduction, dtype):
    """As in torch, which saves the log-softmax, the logits may be changed in any way."""
    leaf = normal(4, 3).to(dtype).requires_grad_()
    loss, grad_output = loss_of_logits(leaf, kind, reduction)
    (expected_grad,) = torch.autograd.grad(loss, leaf, grad_output)
    for create_graph in (False, True):
        logits = leaf + 0
        loss, _ = loss_of_logits(logits, kind, reduction)
        with torch.no_grad():
            overwrite(logits)
        (grad,) = torch.autograd.grad(loss, leaf, grad_output, create_graph=create_graph)
        if create_graph:
            # This code path rounds at other points, several times in a narrow dtype; values are of
            # order one.
            atol = 16 * torch.finfo(dtype).eps
            torch.testing.assert_close(grad.detach(), expected_grad, rtol=0, atol=atol)
        else:
            assert torch.equal(grad, expected_grad)


def test_second_derivatives_after_a_change_of_the_logits(implementation):
    leaf = normal(4, 3).requires_grad_()
    target = class_indices((4, 3), ignored=True)
    results = []
    for function in (fastnn.functional.cross_entropy, F.cross_entropy):
        logits = leaf + 0
        loss = function(logits, target, class_weights(), label_smoothing=0.1)
        with torch.no_grad():
            logits.zero_()
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad.pow(3).sum(), leaf, create_graph=True)
        (third,) = torch.autograd.grad(second.pow(2).sum(), leaf)
        results.append((grad, second, third))
    assert_close(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", TARGETS)
def test_a_graph_that_is_kept_gives_the_same_gradient_again(implementation, kind, reduction, dtype):
    """Even after the caller overwrites the earlier ones; the last backward may free the graph."""
    logits = normal(4, 3).to(dtype).requires_grad_()
    loss, grad_output = loss_of_logits(logits, kind, reduction)
    (first,) = torch.autograd.grad(loss, logits, grad_output, retain_graph=True)
    expected_grad = first.clone()
    first.zero_()
    (ones,) = torch.autograd.grad(loss, logits, torch.ones_like(loss), retain_graph=True)
    expected_ones = ones.clone()
    ones.zero_()
    (second,) = torch.autograd.grad(loss, logits, grad_output, retain_graph=True)
    assert torch.equal(second, expected_grad)
    (last,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    assert torch.equal(last, expected_ones)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits, grad_output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_what_saved_tensor_hooks_hold_is_left_alone(implementation, dtype, factor):
    """A gradient may only reuse the memory of a saved tensor that nothing else can see."""
    logits = normal(4, 3).to(dtype).requires_grad_()
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor
    ):
        loss = fastnn.functional.cross_entropy(logits, torch.tensor([0, 2, 1, 1]))
    before = [tensor.clone() for tensor in held]
    (grad,) = torch.autograd.grad(loss, logits, torch.tensor(factor, dtype=dtype))
    grad.zero_()
    assert all(map(torch.equal, held, before))


@pytest.mark.parametrize("op", ["cross_entropy", "linear_relu", "log_softmax", "nll_loss"])
def test_a_backward_that_failed_leaves_the_graph_as_it_was(implementation, op):
    """A hook may fail where it loads a saved tensor, and later succeed."""
    calls = {
        "log_softmax": lambda x: fastnn.functional.log_softmax(x, 1).sum(),
        "nll_loss": lambda x: fastnn.functional.nll_loss(x, torch.tensor([0, 1])),
        "cross_entropy": lambda x: fastnn.functional.cross_entropy(x, torch.tensor([0, 1])),
        "linear_relu": lambda x: fastnn.functional.linear_relu(x, x.new_ones(2, 3)).sum(),
    }
    fails = True

    def unpack(tensor: Tensor) -> Tensor:
        if fails:
            raise MemoryError
        return tensor

    input = normal(2, 3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        result = calls[op](input)
    with pytest.raises(MemoryError):
        result.backward()
    fails = False
    result.backward(retain_graph=True)
    result.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backwards_of_several_threads_over_one_graph(implementation, dtype):
    logits = normal(64, 33).to(dtype).requires_grad_()
    loss = fastnn.functional.cross_entropy(logits, torch.arange(64) % 33)
    (expected_grad,) = torch.autograd.grad(loss * 3, logits, retain_graph=True)

    def backward(_: int) -> Tensor:
        (grad,) = torch.autograd.grad(loss * 3, logits, retain_graph=True)
        result = grad.clone()
        grad.zero_()
        return result

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(grad, expected_grad) for grad in pool.map(backward, range(32)))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_keeps_no_more_memory_than_torchs(dtype):
    """It doesn't keep the logits alive either, which the layer before it doesn't save."""
    leaf = torch.randn(64, 100, dtype=dtype).requires_grad_()
    target = torch.arange(64)
    functions = (fastnn.functional.cross_entropy, F.cross_entropy)
    mine, theirs = (bytes_kept(function, leaf, target) for function in functions)
    # Narrow dtypes keep two float32 numbers per row, so that the gradient is rounded once, and a
    # float32 total weight.
    wider = 8 * 64 + 2 if dtype.itemsize == 2 else 0
    assert mine <= theirs + wider
    logits = leaf + 0
    memory = StorageWeakRef(logits.untyped_storage())
    loss = fastnn.functional.cross_entropy(logits, target)
    del logits
    assert memory.expired()
    loss.backward()


@needs_extension
def test_a_gradient_of_one_is_handed_over():
    """The kept tensor is returned without a pass over memory, which would change its values."""
    logits, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    _, kept, lse, total = torch.ops.fastnn.cross_entropy_forward(
        logits, target, None, 1, "mean", 0.0, keep=True
    )
    saved = (target, None, lse, total, 1, "mean", 0.0)  # the last two rows are ignored
    marked = kept.clone()
    marked[:] = -0.0
    torch.ops.fastnn.cross_entropy_backward_(torch.tensor(1.0), marked, *saved)
    assert marked.signbit().all()
    version = kept._version
    torch.ops.fastnn.cross_entropy_backward_(torch.tensor(torch.inf), kept, *saved)
    assert torch.equal(kept[2:], torch.zeros(2, 3))
    assert kept._version > version  # autograd sees the write


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 1000])
def test_a_scaled_loss_over_many_rows_keeps_its_gradients(implementation, dtype, classes):
    """With GradScaler's scale: divided by 4096 before it, most would underflow in float16."""
    rows = 4096
    logits = (torch.randn(rows, classes) * 3).to(dtype)
    sample = Sample("scaled", (logits, torch.randint(classes, (rows,))))
    scale = torch.tensor(2.0**15).to(dtype)
    leaf = logits.detach().requires_grad_()
    loss = fastnn.functional.cross_entropy(leaf, sample.args[1])
    (grad,) = torch.autograd.grad(loss, leaf, scale)
    exact = expected("cross_entropy", sample, scale)
    assert_within("gradient", grad, exact.grads[0], exact.grad_errors[0])


def test_a_loss_may_be_scaled_in_place(implementation):
    """No node saves the loss."""
    x = normal(4, 3).requires_grad_()
    target = torch.tensor([0, 2, 1, 1])
    for op in ("nll_loss", "cross_entropy"):
        loss = ours(op)(x, target, reduction="none")
        (gradient,) = torch.autograd.grad(loss.mul_(2).sum(), x)
        (direct,) = torch.autograd.grad(TORCH[op](x, target, reduction="sum"), x)
        assert_close(gradient, 2 * direct)


def test_away_from_kink_helper_drops_the_doubtful_only():
    sample = sample_input("linear_relu", torch.float64, "7x15_to_9")
    grad_output = torch.ones(7, 9, dtype=torch.float64)
    sample.args[0][0] = 0
    sample.args[2][0] = 0  # relu(0) at [0, 0], exactly
    kept = away_from_kink(sample, grad_output)
    assert kept[0, 0] == 0
    assert kept.sum() == 62


@needs_extension
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4)], ids=str)
def test_nll_losss_second_derivative_is_zero_rather_than_missing(shape):
    """As in torch, the gradient is a function of the input."""
    input = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.ones(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.int64)
    loss = fastnn.functional.nll_loss(input, target)
    (first,) = torch.autograd.grad(loss, input, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), input)
    assert torch.equal(second, torch.zeros_like(input))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_second_derivatives_over_ignored_rows_alone_are_zero(implementation, shape, reduction):
    input = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.int64)
    loss = ours("cross_entropy")(input, target, ignore_index=0, reduction=reduction)
    (first,) = torch.autograd.grad(loss.sum(), input, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), input)
    assert torch.equal(second, torch.zeros_like(input))
