"""Autograd's modes and torch.func's transforms, over the operators and over a model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastnn
from support import perceptron
from support.marks import needs_extension, of_functions
from support.operator_cases import CASES
from support.operators import LINEARS, TORCH, ours
from support.perceptron import OURS, STOCK
from support.sample_inputs import OPS
from support.small_cases import Function, assert_close, class_weights, normal

pytestmark = pytest.mark.filterwarnings(
    # vmap warns where torch itself has no batching rule and loops: slow, not wrong.
    "ignore:There is a performance drop",
    "ignore:`torch.jit.script` is deprecated",  # torch's own use of it, in forward mode
    "ignore:Attempted to insert a get_attr Node",  # torch's own doing, in linearize
)


def capability(row: str, **options):
    return pytest.mark.capability("autograd", row, **options)


# --- the operators --------------------------------------------------------------------------------


def with_options(name: str) -> Callable[[Function], Function]:
    """Turns an operator's function into one of a single (4, 3) tensor, with the options named."""
    op, _, option = name.partition("-")
    call = CASES[op].rows(4, 3)
    _, *others = call.by_row
    for target in others:
        target[2] = -100  # ignored
    if option == "probabilities":
        others = [torch.rand(4, 3, dtype=torch.float64)]
    options = {
        "": {},
        "none": {"reduction": "none"},
        "smooth": {"label_smoothing": 0.1, "weight": class_weights()},
        "probabilities": {},
    }[option]
    return lambda f: lambda x: f(*call.arguments(x, *others), **options)


WITH_OPTIONS = (
    *("nll_loss-none", "cross_entropy-none", "cross_entropy-smooth"),
    "cross_entropy-probabilities",
)


@pytest.fixture(params=(*OPS, *WITH_OPTIONS))
def functions(request, implementation, _seeded) -> tuple[Function, Function]:
    """Our function of one (4, 3) tensor, and torch's."""
    op = request.param.split("-")[0]
    make = with_options(request.param)
    return make(ours(op)), make(TORCH[op])


def sum_of(function: Function) -> Function:
    return lambda x: function(x).sum()


def sum_of_squares(function: Function) -> Function:
    return lambda x: function(x).square().sum()


class TestModes:
    @capability("`torch.func.grad`, `vjp`")
    def test_func_grad_and_vjp(self, functions):
        mine, theirs = functions
        x = normal(4, 3)
        assert_close(grad(sum_of_squares(mine))(x), grad(sum_of_squares(theirs))(x))
        value, pull = vjp(mine, x)
        torch_value, torch_pull = vjp(theirs, x)
        assert_close(value, torch_value)
        cotangent = torch.randn_like(value)
        assert_close(pull(cotangent), torch_pull(cotangent))

    @capability("`torch.func.jvp`, forward-mode AD")
    def test_func_jvp_and_forward_mode(self, functions):
        mine, theirs = functions
        x, tangent = normal(4, 3), normal(4, 3)
        value, derivative = jvp(theirs, (x,), (tangent,))
        assert_close(jvp(mine, (x,), (tangent,)), (value, derivative))
        with forward_ad.dual_level():
            dual = mine(forward_ad.make_dual(x, tangent))
            assert_close(tuple(forward_ad.unpack_dual(dual)), (value, derivative))

    @capability("`torch.func.vmap` over inputs")
    def test_func_vmap(self, functions):
        mine, theirs = functions
        batch = normal(5, 4, 3)
        assert_close(vmap(mine)(batch), torch.stack([theirs(x) for x in batch]))
        last = batch.movedim(0, -1)
        assert_close(vmap(mine, in_dims=-1)(last), vmap(theirs)(batch))

    @capability("per-sample gradients")
    def test_per_sample_gradients(self, functions):
        mine, theirs = functions
        batch = normal(5, 4, 3)
        per_sample = vmap(grad(sum_of(mine)))(batch)
        assert_close(per_sample, vmap(grad(sum_of(theirs)))(batch))

    @capability("`torch.func.jacrev`, `jacfwd`, `hessian`")
    def test_jacobians_and_hessian(self, functions):
        mine, theirs = functions
        x = normal(4, 3)
        assert_close(jacrev(mine)(x), jacrev(theirs)(x))
        assert_close(jacfwd(mine)(x), jacfwd(theirs)(x))
        assert_close(hessian(sum_of_squares(mine))(x), hessian(sum_of_squares(theirs))(x))

    @capability("`is_grads_batched=True`")
    def test_batched_incoming_gradients(self, functions):
        mine, theirs = functions
        x = normal(4, 3).requires_grad_()
        value, torch_value = mine(x), theirs(x)
        batch = torch.randn(5, *value.shape, dtype=torch.float64)
        (grads,) = torch.autograd.grad(value, x, batch, is_grads_batched=True)
        (torch_grads,) = torch.autograd.grad(torch_value, x, batch, is_grads_batched=True)
        assert_close(grads, torch_grads)

    @capability("`retain_graph=True`")
    def test_the_graph_may_be_retained_and_used_again(self, functions):
        mine, theirs = functions
        x = normal(4, 3).requires_grad_()
        total, torch_total = mine(x).sum(), theirs(x).sum()
        (torch_grad,) = torch.autograd.grad(torch_total, x)
        (first,) = torch.autograd.grad(total, x, retain_graph=True)
        (second,) = torch.autograd.grad(total, x)
        assert_close(first, torch_grad)
        assert torch.equal(first, second)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(total, x)

    def test_gradients_accumulate(self, functions):
        mine, _ = functions
        x = normal(4, 3).requires_grad_()
        mine(x).sum().backward()
        once = x.grad.clone()
        mine(x).sum().backward()
        assert torch.equal(x.grad, 2 * once)  # doubling is exact

    @capability("`create_graph=True`")
    def test_second_derivative_through_create_graph(self, functions):
        mine, theirs = functions
        x = normal(4, 3).requires_grad_()
        results = []
        for function in (mine, theirs):
            (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
            results.append((first, second))
        assert_close(results[0], results[1])

    @capability("activation checkpointing, both kinds")
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpoint_recomputes_the_same(self, functions, use_reentrant):
        mine, _ = functions
        x = normal(4, 3).requires_grad_()
        checkpoint(mine, x, use_reentrant=use_reentrant).sum().backward()
        (direct,) = torch.autograd.grad(mine(x).sum(), x)
        assert torch.equal(x.grad, direct)

    @capability("saved-tensor hooks, `save_on_cpu`")
    def test_saved_tensors_pass_through_hooks(self, functions):
        """What the backward needs is saved where hooks (for offloading, say) can reach it."""
        mine, _ = functions
        x = normal(4, 3).requires_grad_()
        packed = []

        def pack(tensor: Tensor) -> Tensor:
            packed.append(tensor)
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total = mine(x).sum()
        assert packed
        (gradient,) = torch.autograd.grad(total, x)
        (direct,) = torch.autograd.grad(mine(x).sum(), x)
        assert torch.equal(gradient, direct)

    @capability("saved-tensor hooks, `save_on_cpu`")
    def test_save_on_cpu(self, functions):
        mine, _ = functions
        x = normal(4, 3).requires_grad_()
        with torch.autograd.graph.save_on_cpu():
            total = mine(x).sum()
        (gradient,) = torch.autograd.grad(total, x)
        (direct,) = torch.autograd.grad(mine(x).sum(), x)
        assert torch.equal(gradient, direct)

    @capability("`torch.func.vmap`, nested")
    def test_nested_vmap(self, functions):
        mine, theirs = functions
        batches = normal(2, 5, 4, 3)
        per_sample = vmap(vmap(grad(sum_of_squares(mine))))(batches)
        assert_close(per_sample, vmap(vmap(grad(sum_of_squares(theirs))))(batches))

    @capability("`torch.func.linearize`, `functionalize`")
    def test_linearize(self, functions):
        mine, theirs = functions
        x, tangent = normal(4, 3), normal(4, 3)
        value, derivative = linearize(mine, x)
        assert_close((value, derivative(tangent)), jvp(theirs, (x,), (tangent,)))

    @of_functions  # torch has no rule for Functions
    @capability("`torch.func.linearize`, `functionalize`")
    def test_functionalize(self, functions):
        mine, theirs = functions
        x = normal(4, 3)
        assert_close(functionalize(sum_of_squares(mine))(x), sum_of_squares(theirs)(x))

    @capability("`torch.autograd.functional`")
    @pytest.mark.parametrize("name", ["jacobian", "vjp", "jvp", "hessian", "hvp", "vhp"])
    def test_autograd_functional(self, functions, name):
        x, v = normal(4, 3), normal(4, 3)
        transform = getattr(torch.autograd.functional, name)
        results = []
        for function in functions:
            if name in ("jacobian", "jvp", "vjp"):
                cotangent = torch.ones_like(function(x)) if name == "vjp" else v
                arguments = (function, x) if name == "jacobian" else (function, x, cotangent)
            else:
                function = sum_of_squares(function)
                arguments = (function, x) if name == "hessian" else (function, x, v)
            results.append(transform(*arguments))
        assert_close(*results)

    @capability("hooks of tensors and of graph nodes")
    def test_hooks(self, functions):
        """They see the same gradients as with torch's operators, and may change them."""
        events = []
        for function in functions:
            seen = []
            x = normal(4, 3).fill_(0.5).requires_grad_()
            x.register_post_accumulate_grad_hook(lambda x, seen=seen: seen.append(x.grad.clone()))
            y = x * 1
            y.register_hook(lambda grad, seen=seen: seen.append(grad.clone()))
            output = function(y)
            output.register_hook(lambda grad: grad * 2)
            output.grad_fn.register_prehook(lambda grads, seen=seen: seen.append(grads[0].clone()))
            output.sum().backward()
            events.append(seen)
        assert len(events[0]) == 3
        assert_close(*events)

    @capability("`autograd.grad` with unused inputs")
    def test_unused_inputs(self, functions):
        mine, _ = functions
        x, unused = normal(4, 3).requires_grad_(), normal(2).requires_grad_()
        total = mine(x).sum()
        with pytest.raises(RuntimeError, match="appears to not have been used"):
            torch.autograd.grad(total, (x, unused), retain_graph=True)
        used, none = torch.autograd.grad(total, (x, unused), retain_graph=True, allow_unused=True)
        assert none is None
        again, zeros = torch.autograd.grad(total, (x, unused), materialize_grads=True)
        assert torch.equal(zeros, torch.zeros(2, dtype=torch.float64))
        assert torch.equal(used, again)

    def test_nothing_outlives_its_use(self, functions):
        """An output that its own node refers to would never be freed."""
        mine, _ = functions
        gc.disable()  # it must be freed without the collector
        try:
            output = mine(normal(4, 3).requires_grad_())
            gone = weakref.ref(output)
            del output
            assert gone() is None
        finally:
            gc.enable()


@pytest.fixture
def no_loops() -> Iterator[None]:
    """Turns vmap's warning that it loops over the samples into an error."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


CONTEXTS = [torch.enable_grad, torch.no_grad, torch.inference_mode]
SAMPLES, CLASSES = 64, 10


def batched_case(op: str) -> tuple[Function, tuple[Tensor, ...]]:
    """An operator's function of one sample, and batched arguments with one part per sample."""
    call = CASES[op].rows(SAMPLES, CLASSES)
    return lambda f: lambda *row: f(*call.arguments(*row)), call.by_row


@capability("`torch.func.vmap` without a loop over the samples")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("op", OPS)
def test_vmap_takes_the_whole_batch_at_once(implementation, no_loops, op, context):
    make, arguments = batched_case(op)
    with context():
        batch = vmap(make(ours(op)))(*arguments)
        assert_close(batch, vmap(make(TORCH[op]))(*arguments))


# A call of a backward, and batched arguments with one part per sample.
BackwardCases = Iterator[tuple[Function, tuple[Tensor, ...]]]
ONE_IGNORED = (0, 2, -100, 1)


def linear_backward_cases(inputs: Tensor) -> BackwardCases:
    operators, weight = torch.ops.fastnn, normal(3, 3)

    def call(g: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return operators.linear_backward(g, x, weight, [True] * 3)

    yield call, (torch.randn_like(inputs), inputs)


def linear_relu_backward_cases(inputs: Tensor) -> BackwardCases:
    operators, weight = torch.ops.fastnn, normal(3, 3)

    def call(g: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return operators.linear_relu_backward(g, x, weight, y, [True] * 3)

    yield call, (torch.randn_like(inputs), inputs, operators.linear_relu(inputs, weight))


def log_softmax_backward_cases(inputs: Tensor) -> BackwardCases:
    operators = torch.ops.fastnn

    def call(g: Tensor, y: Tensor) -> Tensor:
        return operators.log_softmax_backward(g, y, 1)

    yield call, (torch.randn_like(inputs), operators.log_softmax(inputs, 2))


def nll_loss_backward_cases(inputs: Tensor) -> BackwardCases:
    operators, target = torch.ops.fastnn, torch.tensor(ONE_IGNORED)
    for reduction in ("mean", "sum"):

        def call(g: Tensor, x: Tensor, total: Tensor, reduction: str = reduction) -> Tensor:
            return operators.nll_loss_backward(g, x, target, None, total, -100, reduction)

        totals = [operators.nll_loss_forward(x, target, None, -100, reduction)[1] for x in inputs]
        yield call, (normal(5), inputs, torch.stack(totals))


def cross_entropy_backward_cases(inputs: Tensor) -> BackwardCases:
    operators, target = torch.ops.fastnn, torch.tensor(ONE_IGNORED)
    for reduction in ("mean", "sum"):
        options = (-100, reduction, 0.1)

        def call(g: Tensor, kept: Tensor, total: Tensor, options: tuple = options) -> Tensor:
            return operators.cross_entropy_backward(g, kept, target, None, None, total, *options)

        forwards = [
            operators.cross_entropy_forward(x, target, None, *options, True) for x in inputs
        ]
        _, kept, _, totals = zip(*forwards, strict=True)
        yield call, (normal(5), torch.stack(kept), torch.stack(totals))


def linear_cross_entropy_backward_cases(inputs: Tensor) -> BackwardCases:
    operators, target = torch.ops.fastnn, torch.tensor(ONE_IGNORED)
    tensors, options = (normal(6, 3), target, normal(6), None), (-100, 0.1, 2.0, 0.5, 0.1)

    def call(g: Tensor, x: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        return operators.linear_cross_entropy_backward(
            g, x, *tensors, lse, *options, None, [True] * 3
        )

    parts = [
        operators.linear_cross_entropy_forward(
            x, *tensors, "none", *options, None, None, [False] * 3
        )[-1]
        for x in inputs
    ]
    yield call, (normal(5, 4), inputs, torch.stack(parts))


BACKWARD_CASES = {
    "linear": linear_backward_cases,
    "linear_relu": linear_relu_backward_cases,
    "log_softmax": log_softmax_backward_cases,
    "nll_loss": nll_loss_backward_cases,
    "cross_entropy": cross_entropy_backward_cases,
    "linear_cross_entropy": linear_cross_entropy_backward_cases,
}


@needs_extension
@pytest.mark.parametrize("op", OPS)
def test_vmap_of_a_backward_takes_the_whole_batch_at_once(no_loops, op):
    """Called as from a graph that contains the backward's operator."""
    for call, arguments in BACKWARD_CASES[op](normal(5, 4, 3)):
        each = [call(*sample) for sample in zip(*arguments, strict=True)]
        together = vmap(call)(*arguments)
        assert_close(together, tree_map(lambda *parts: torch.stack(parts), *each))


def graph_sizes(function: Function, arguments: tuple[Tensor, ...]) -> list[int]:
    """The number of operators in each graph that the compiler makes from the function."""
    sizes = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable:
        sizes.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return make_boxed_func(graph)

    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    assert_close(compiled(*arguments), function(*arguments))
    return sizes


@needs_extension
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("op", OPS)
def test_compiled_vmap_is_as_small_as_torchs(no_loops, op):
    make, arguments = batched_case(op)
    (mine,), (theirs,) = (
        graph_sizes(vmap(make(function)), arguments) for function in (ours(op), TORCH[op])
    )
    assert mine <= 1.5 * theirs


def test_func_transforms_take_bytes_in_several_dimensions(implementation):
    """Like plain calls; torch's own operators reject them."""
    input = normal(2, 3, 4)
    target = torch.arange(8).remainder(3).reshape(2, 4)
    for op in ("nll_loss", "cross_entropy"):
        exact = grad(lambda x, op=op: TORCH[op](x, target))(input)
        gradient = grad(lambda x, op=op: ours(op)(x, target.to(torch.uint8)))(input)
        assert_close(gradient, exact)


@capability("`torch.func.vmap` over weights")
@pytest.mark.parametrize("op", LINEARS)
def test_linear_of_weights_of_their_own_for_each_sample(implementation, op):
    """An ensemble: vmap over the weights, too."""
    inputs, weights, biases = normal(5, 4, 3), normal(5, 2, 3), normal(5, 2)
    outputs = vmap(ours(op))(inputs, weights, biases)
    each = zip(inputs, weights, biases, strict=True)
    assert_close(outputs, torch.stack([TORCH[op](*arguments) for arguments in each]))


# --- anomaly mode ---------------------------------------------------------------------------------

# By operator: its node's name, and a cause of NaN in its backward (0 * inf, inf - inf, inf / inf).
INFINITE = torch.full((3,), torch.inf)
FIRST = torch.tensor([0])
NANS = {
    "linear": (
        "LinearBackward",
        lambda x: fastnn.functional.linear(x, x.new_zeros(2, 3), x.new_ones(2)) * torch.inf,
    ),
    "linear_relu": (
        "LinearReLUBackward",
        lambda x: fastnn.functional.linear_relu(x, x.new_zeros(2, 3), x.new_ones(2)) * torch.inf,
    ),
    "log_softmax": (
        "LogSoftmaxBackward",
        lambda x: fastnn.functional.log_softmax(x, 1) * torch.inf,
    ),
    "nll_loss": (
        "NLLLossBackward",
        lambda x: fastnn.functional.nll_loss(x, torch.tensor([0]), INFINITE.to(x)),
    ),
    "cross_entropy": (
        "CrossEntropyBackward",
        lambda x: fastnn.functional.cross_entropy(x, torch.tensor([0]), INFINITE.to(x)),
    ),
    "linear_cross_entropy": (
        "LinearCrossEntropyBackward",
        lambda x: fastnn.functional.linear_cross_entropy(x, x.new_zeros(2, 3), FIRST) * torch.inf,
    ),
}


@needs_extension
@capability("anomaly mode names the operator and the line")
@pytest.mark.parametrize("op", OPS)
def test_anomaly_mode_names_the_operator_and_its_line(op):
    node, function = NANS[op]
    x = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    with (
        pytest.warns(UserWarning, match="Anomaly Detection has been enabled"),
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match=f"'{node}' returned nan values in its 0th output"),
        pytest.warns(UserWarning, match=f"(?s)Error detected in {node}.*{op}\\(x, "),
    ):
        function(x).sum().backward()


# --- a model --------------------------------------------------------------------------------------

of_the_model = {"operators": perceptron.USES}


def losses_of(kind) -> tuple[perceptron.Perceptron, Function, dict[str, Tensor]]:
    """A model, its loss as a function of the parameters and one sample, and the parameters."""
    model = perceptron.make(kind)

    def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return functional_call(model, parameters, (x.unsqueeze(0), target.unsqueeze(0)))

    return model, loss, {name: p.detach() for name, p in model.named_parameters()}


@needs_extension
@capability("`functional_call`: per-sample gradients of a model", **of_the_model)
def test_per_sample_gradients_of_a_model():
    model, loss, parameters = losses_of(OURS)
    x, target = perceptron.batch(7)
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, target)
    for i in range(7):
        model.zero_grad()
        model(x[i : i + 1], target[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            assert_close(per_sample[name][i], parameter.grad)


@capability("`call_for_per_sample_grads` of a model", **of_the_model)
def test_per_sample_gradients_by_expanded_weights():
    """Their class knows torch's functions, and rejects all others."""
    x = perceptron.batch(7)[0]
    models = [perceptron.make(kind) for kind in (OURS, STOCK)]
    for model in models:
        call_for_per_sample_grads(model)(x).square().sum().backward()
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert_close(mine.grad_sample, theirs.grad_sample)


@capability("`functional_call`: Hessian and Jacobians of a model", **of_the_model)
def test_second_derivatives_of_a_model():
    x, target = perceptron.batch(1)
    results = []
    for kind in (OURS, STOCK):
        _, loss, parameters = losses_of(kind)
        results.append(
            [
                transform(loss)(parameters, x[0], target[0])
                for transform in (hessian, jacrev, jacfwd)
            ]
        )
    assert_close(*results)


@capability("`torch.func.vmap` over weights", **of_the_model)
def test_an_ensemble():
    """Three models with their own weights in one call, and the gradients of all."""
    models = [perceptron.make(OURS) for _ in range(3)]
    with torch.no_grad():
        for i, model in enumerate(models):
            for parameter in model.parameters():
                parameter.mul_(1 + i)
    stacked, buffers = stack_module_state(models)
    x, target = perceptron.batch(7)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(models[0], (parameters, buffers), (x, target))

    gradients, values = vmap(grad_and_value(loss))(stacked, buffers)
    for i, model in enumerate(models):
        value = model(x, target)
        value.backward()
        assert_close(values[i], value)
        for name, parameter in model.named_parameters():
            assert_close(gradients[name][i], parameter.grad)


@capability("`torch.func.vmap` with `randomness`", **of_the_model)
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_randomness_inside_vmap(randomness):
    """Dropout before and between our operators draws the same as between torch's."""
    xs = torch.stack([perceptron.batch(4)[0]] * 3)
    target = perceptron.batch(4)[1]
    results = []
    for kind in (OURS, STOCK):
        model = perceptron.make(kind)
        dropout = torch.nn.Dropout(0.5)
        model.output.register_forward_pre_hook(lambda _, args, d=dropout: d(args[0]))

        def loss(x: Tensor, model=model, dropout=dropout) -> Tensor:
            return model(dropout(x), target)

        torch.manual_seed(0)
        results.append(vmap(grad(loss), randomness=randomness)(xs))
        with pytest.raises(RuntimeError, match="vmap: called random operation"):
            vmap(loss)(xs)
    assert_close(*results)
    same = torch.equal(results[0][0], results[0][1])
    assert same == (randomness == "same")


@capability("activation checkpointing, both kinds", **of_the_model)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers(use_reentrant):
    model = perceptron.make(OURS)
    layers = torch.nn.Sequential(model.hidden, model.output, model.log_softmax)
    x = perceptron.batch(7)[0].requires_grad_()
    output = checkpoint_sequential(layers, 2, x, use_reentrant=use_reentrant)
    wanted = [x, *layers.parameters()]
    output.square().sum().backward()
    eager = torch.autograd.grad(layers(x).square().sum(), wanted)
    assert all(torch.equal(tensor.grad, g) for tensor, g in zip(wanted, eager, strict=True))
