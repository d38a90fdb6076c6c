"""torch.compile: one graph, no more recompilations than torch's own model, the same numbers."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import fastnn
from fastnn._operators import OPERATORS
from support import perceptron
from support.marks import needs_extension
from support.modules import MODULES, inputs_of, make
from support.operator_cases import CASES, COMPILE_SAMPLES, RowCall
from support.operators import LINEARS, ours, value_and_gradients
from support.perceptron import OURS, STOCK, loss_and_gradients
from support.sample_inputs import OPS, sample_input

capability = pytest.mark.capability
NO_GRAPH_BREAK = "modules, step: no graph break in `torch._dynamo.explain`"
INDUCTOR = "inductor: a model forward and backward, a step"
NO_MORE_RECOMPILATIONS = "no more recompilations than torch's, as batch size or `lr` change"

# --- the operators --------------------------------------------------------------------------------


@needs_extension
@capability("compile", "`fullgraph=True`, forward and backward: the same bits")
@pytest.mark.parametrize(("op", "name"), COMPILE_SAMPLES)
def test_compile_changes_nothing(fresh_dynamo, op, name):
    """One graph and the same bits, because the same operators run."""
    compiled = torch.compile(ours(op), fullgraph=True, backend="aot_eager")
    sample = sample_input(op, torch.float32, name)
    eager = value_and_gradients(ours(op), op, sample)
    for result, expected in zip(value_and_gradients(compiled, op, sample), eager, strict=True):
        assert torch.equal(result, expected)


def with_leaves(call: RowCall) -> tuple[list[Any], list[Tensor]]:
    """The call's arguments, and the floating-point ones, which want gradients."""
    arguments = list(call.arguments())
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    return arguments, [leaf.requires_grad_() for leaf in leaves]


@needs_extension
@capability("compile", "`dynamic=True`: one compilation for all batch sizes")
@pytest.mark.parametrize("op", OPS)
def test_compile_once_for_all_batch_sizes(fresh_dynamo, op):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours(op), fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for rows in (4, 7, 33):
        arguments, leaves = with_leaves(CASES[op].rows(rows, 5))
        result, eager = compiled(*arguments), ours(op)(*arguments)
        assert torch.equal(result, eager)
        grads = torch.autograd.grad(result.square().sum(), leaves)
        eager_grads = torch.autograd.grad(eager.square().sum(), leaves)
        assert all(map(torch.equal, grads, eager_grads))
        compilations.append(counter.frame_count)
    # The first size may take two: Dynamo restarts when an option turns out not to be a varying
    # number. No other batch size adds any.
    assert compilations == [compilations[0]] * 3


@needs_extension
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_compiled_graphs_hold_the_fused_operators(fresh_dynamo, operator):
    """One operator per direction, and none of those it replaces."""
    op = operator.name
    forward, backward, *_ = operator.fakes
    graphs: list[set[str]] = []

    def record(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append({str(node.target) for node in calls})
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    arguments, _ = with_leaves(CASES[op].rows(4, 5))
    torch.compile(ours(op), fullgraph=True, backend=backend)(*arguments).sum().backward()
    in_forward, in_backward = graphs
    assert {call for call in in_forward if "fastnn" in call} == {f"fastnn.{forward}.default"}
    # linear_cross_entropy's backward only multiplies what the forward left.
    has_backward = op != "linear_cross_entropy"
    backwards = {f"fastnn.{backward}.default"} if has_backward else set()
    assert {call for call in in_backward if "fastnn" in call} == backwards
    replaced = re.compile("mm|linear|relu|threshold|softmax|nll|gather|scatter|exp[.]|log[.]")
    aten = {call for call in in_forward | in_backward if "fastnn" not in call}
    assert not {call for call in aten if replaced.search(call)}


@needs_extension
@pytest.mark.parametrize(
    ("wanted", "kept"), [("input", "weight"), ("weight", "input"), ("bias", None)]
)
@pytest.mark.parametrize("op", LINEARS)
def test_a_compiled_linear_keeps_only_what_its_gradient_needs(fresh_dynamo, op, wanted, kept):
    """With a ReLU it keeps the output, too, whose sign gives the backward its mask."""
    shapes = {"input": (4, 5), "weight": (3, 5), "bias": (3,)}
    results: list[list[torch.fx.Node]] = []

    def record(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        results.extend(next(iter(reversed(graph.graph.nodes))).args)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    arguments = [torch.randn(shape, requires_grad=name == wanted) for name, shape in shapes.items()]
    torch.compile(ours(op), fullgraph=True, backend=backend)(*arguments)
    _output, *saved = results[0]
    expected = {shapes[kept]} if kept else set()
    if op == "linear_relu":
        expected.add((4, 3))
    assert {tuple(tensor.meta["val"].shape) for tensor in saved} == expected


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_may_change_after_a_compiled_loss(fresh_dynamo, dtype):
    compiled = torch.compile(ours("cross_entropy"), fullgraph=True, backend="aot_eager")
    leaf, target = torch.randn(4, 5).to(dtype).requires_grad_(), torch.arange(4)
    (expected,) = torch.autograd.grad(ours("cross_entropy")(leaf, target) * 3, leaf)
    logits = leaf + 0
    loss = compiled(logits, target) * 3
    logits.data.zero_()
    (grad,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(grad, expected)


@pytest.mark.cpu_only("the reference, which has no kernels")
@pytest.mark.parametrize("op", OPS)
def test_the_reference_compiles_in_one_graph_too(fresh_dynamo, monkeypatch, op):
    monkeypatch.setattr(fastnn.functional, "operators", lambda: fastnn.reference)
    compiled = torch.compile(ours(op), fullgraph=True, backend="aot_eager")
    for sample_op, name in COMPILE_SAMPLES:
        if sample_op == op:
            sample = sample_input(op, torch.float64, name)
            results = value_and_gradients(compiled, op, sample)
            # Float64 values of order one: 1e-12 is thousands of roundings.
            expected = value_and_gradients(ours(op), op, sample)
            torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)


# --- modules and models ---------------------------------------------------------------------------


@capability("compile", NO_GRAPH_BREAK)
@pytest.mark.parametrize("name", MODULES)
def test_modules_have_no_graph_break(fresh_dynamo, name):
    explanation = torch._dynamo.explain(make(name)[0].double())(*inputs_of(name))
    assert explanation.graph_break_count == 0, explanation.break_reasons
    assert explanation.graph_count == 1


# The compiler's own fusions change the last bits of sums; for float64 values of order one, 1e-12 is
# thousands of roundings.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.cpu_only("inductor compiles for the device: the CPU's code around any kernels")
@needs_extension
@capability("compile", INDUCTOR, operators=perceptron.USES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_gives_eagers_numbers(fresh_dynamo, dynamic):
    model = perceptron.make(OURS)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for rows in (4, 7) if dynamic else (4,):
        inputs = perceptron.batch(rows)
        eager = loss_and_gradients(model, model, *inputs)
        torch.testing.assert_close(loss_and_gradients(model, compiled, *inputs), eager, **CLOSE)


@capability("compile", NO_MORE_RECOMPILATIONS, operators=perceptron.USES)
def test_a_change_of_batch_size_recompiles_as_often_as_torchs_model(fresh_dynamo):
    """By default shapes are static first, dynamic at the second size, and 1 is always separate."""
    compilations = []
    for kind in (OURS, STOCK):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = perceptron.make(kind)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        counts = []
        for rows in (4, 7, 33, 1, 12, 1):
            inputs = perceptron.batch(rows)
            eager = loss_and_gradients(model, model, *inputs)
            torch.testing.assert_close(loss_and_gradients(model, compiled, *inputs), eager, **CLOSE)
            counts.append(counter.frame_count)
        compilations.append(counts)
    assert compilations[0] == compilations[1]


@needs_extension
@capability("compile", "under `torch.autocast`", operators=perceptron.USES)
def test_compiled_under_autocast(fresh_dynamo):
    model = perceptron.make(OURS, torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = perceptron.batch(4, torch.float32)
    results = []
    for run in (compiled, model):
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            results.append(loss_and_gradients(model, run, *inputs))
    # The same operators in the same dtypes; torch's own bfloat16 operators, decomposed, keep
    # float32 in between: a few roundings to bfloat16.
    for compiled_result, eager in zip(*results, strict=True):
        assert compiled_result.dtype == eager.dtype
        torch.testing.assert_close(compiled_result, eager, rtol=0, atol=4 * 2**-8)


@needs_extension
@capability("compile", "compiled autograd", operators=perceptron.USES)
def test_compiled_autograd(fresh_dynamo):
    """The compiled backward of a model that ran eagerly: our nodes say what they call."""
    model = perceptron.make(OURS)
    inputs = perceptron.batch(4)
    calls: set[str] = set()

    def record(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        calls.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph.forward)

    compiler = torch.compile(backend=aot_autograd(fw_compiler=record), fullgraph=True)
    eager = loss_and_gradients(model, model, *inputs)[1:]
    loss = model(*inputs)
    with torch._dynamo.compiled_autograd._enable(compiler):
        loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], eager, **CLOSE)
    assert {call for call in calls if "fastnn" in call} == {
        f"fastnn.{op}_backward.default" for op in perceptron.USES
    }


# --- the optimizer --------------------------------------------------------------------------------


def step_of(
    optimizer_class: type[torch.optim.SGD],
) -> tuple[list[Tensor], torch.optim.SGD]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3,)]
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params, optimizer_class(params, lr=0.1, momentum=0.9, weight_decay=0.1)


OPTIONS_WHEREABOUTS = [
    *("optimizer", "group", "added group", "group, after a step", "torch's group"),
    *("state", "before a state", "pickle"),
]


def with_float32_momentum(whose: str, params: list[Tensor], **options) -> fastnn.optim.SGD:
    """An optimizer of one group whose option comes from the place named."""
    if whose == "optimizer":
        return fastnn.optim.SGD(params, **options, float32_momentum=True)
    group = {"params": params, "float32_momentum": True}
    if whose == "added group":
        optimizer = fastnn.optim.SGD([torch.ones(1)], **options)
        optimizer.add_param_group(group)
        optimizer.param_groups.reverse()
        return optimizer
    if whose == "torch's group":
        return fastnn.optim.SGD.from_torch(torch.optim.SGD([group], **options))
    if whose == "group, after a step":
        optimizer = fastnn.optim.SGD(params, **options)
        optimizer.param_groups[0]["float32_momentum"] = True
        optimizer.step()
        return optimizer
    if whose == "before a state":  # without the option, like torch's
        optimizer = fastnn.optim.SGD(params, **options, float32_momentum=True)
        optimizer.load_state_dict(torch.optim.SGD(params, **options).state_dict())
        return optimizer
    optimizer = fastnn.optim.SGD([group], **options)
    if whose == "state":
        state = optimizer.state_dict()
        optimizer = fastnn.optim.SGD(params, **options)
        optimizer.load_state_dict(state)
    return pickle.loads(pickle.dumps(optimizer)) if whose == "pickle" else optimizer


@pytest.mark.cpu_only("a compiled step runs torch's loop, without our kernels")
class TestOptimizer:
    @capability("compile", NO_GRAPH_BREAK, operators=["SGD"])
    def test_step_has_no_graph_break(self, fresh_dynamo):
        _, optimizer = step_of(fastnn.optim.SGD)
        explanation = torch._dynamo.explain(optimizer.step)()
        assert explanation.graph_break_count == 0, explanation.break_reasons

    @pytest.mark.parametrize("after_torchs", [False, True])
    def test_hooks_run_once_around_a_compiled_step(self, after_torchs, fresh_dynamo):
        """torch's SGD has hooks in its step, too, once an instance exists."""
        if after_torchs:
            step_of(torch.optim.SGD)
        _, optimizer = step_of(fastnn.optim.SGD)
        called = []
        optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
        optimizer.register_step_post_hook(lambda *_: called.append("post"))
        step = torch.compile(optimizer.step, backend="eager")
        for _ in range(2):
            step()
        assert called == ["pre", "post"] * 2

    @capability("compile", NO_MORE_RECOMPILATIONS, operators=["SGD"])
    def test_compiled_step_is_torchs_in_numbers_and_recompilations(self, fresh_dynamo):
        """A changed learning rate recompiles exactly when it does with torch's optimizer."""
        results, compilations = [], []
        for optimizer_class in (fastnn.optim.SGD, torch.optim.SGD):
            torch._dynamo.reset()
            params, optimizer = step_of(optimizer_class)
            counter = CompileCounterWithBackend("aot_eager")
            step = torch.compile(optimizer.step, fullgraph=False, backend=counter)
            for lr in (0.1, 0.1, 0.05, 0.01):
                optimizer.param_groups[0]["lr"] = lr
                step()
            results.append([param.detach() for param in params])
            compilations.append(counter.frame_count)
        # Both run torch's own loop.
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        assert compilations[0] == compilations[1]

    @capability("compile", INDUCTOR, operators=["SGD"])
    def test_inductor_steps_as_torch(self, fresh_dynamo):
        params, optimizer = step_of(fastnn.optim.SGD)
        expected, torch_optimizer = step_of(torch.optim.SGD)
        compiled = torch.compile(optimizer.step)
        for _ in range(3):
            compiled()
            torch_optimizer.step()
        # 3 times 8 operations on numbers of order one, whose roundings inductor may fuse.
        torch.testing.assert_close(params, expected, rtol=0, atol=3 * 8 * 2**-23)

    @needs_extension
    @pytest.mark.parametrize("fused", [None, True])
    @pytest.mark.parametrize("whose", OPTIONS_WHEREABOUTS)
    def test_compiled_step_has_float32_momentum_where_asked(self, whose, fused, fresh_dynamo):
        """Equal to our kernels' to the last bit: torch's loop would round the first buffers."""
        results = []
        for is_compiled in (True, False):
            params, _ = step_of(fastnn.optim.SGD)
            halves = [param.detach().bfloat16() for param in params]
            for half in halves:
                half.grad = half.clone()
            options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "fused": fused}
            optimizer = with_float32_momentum(whose, halves, **options)
            halves = optimizer.param_groups[0]["params"]  # copies, from a pickle
            step = optimizer.step
            if is_compiled:
                step = torch.compile(step, backend="aot_eager")
            for _ in range(3):
                for half in halves:
                    half.grad = half.detach().clone()
                step()
            buffers = [optimizer.state[half]["momentum_buffer"] for half in halves]
            assert {buffer.dtype for buffer in buffers} == {torch.float32}
            results.append([*halves, *buffers])
        assert all(map(torch.equal, *results))

    @capability(
        "compile",
        "no more graph breaks than torch in a function of the whole training step",
        operators=[*perceptron.USES, "SGD"],
    )
    def test_whole_training_step(self, fresh_dynamo):
        """zero_grad, model, losses, backward, step: torch itself may break it at the backward."""
        results, breaks = [], []
        for kind, sgd in ((OURS, fastnn.optim.SGD), (STOCK, torch.optim.SGD)):
            torch._dynamo.reset()
            model = perceptron.make(kind)
            optimizer = sgd(model.parameters(), lr=0.1, momentum=0.9)
            inputs = perceptron.batch(4)

            def training_step(model=model, optimizer=optimizer, inputs=inputs) -> Tensor:
                optimizer.zero_grad()
                loss = model(*inputs)
                loss.backward()
                optimizer.step()
                return loss

            breaks.append(torch._dynamo.explain(training_step)().graph_break_count)
            compiled = torch.compile(training_step, backend="aot_eager")
            losses = [compiled().detach() for _ in range(3)]
            results.append([*losses, *(param.detach() for param in model.parameters())])
        assert breaks[0] == breaks[1]
        torch.testing.assert_close(results[0], results[1], **CLOSE)
