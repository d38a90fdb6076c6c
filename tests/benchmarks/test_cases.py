"""benchmarks.cases: inputs, contenders, and what each peer needs."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import verify, worker
from benchmarks.case import Function, Inputs, Unavailable
from benchmarks.cases import (
    all_cases,
    cross_entropy,
    linear_cross_entropy,
    overhead,
    sgd,
    train_step,
)
from benchmarks.device import CPU, CUDA, Device

pytestmark = pytest.mark.cpu_only("the benchmarks")

MNIST = train_step.PROGRAMS["CrossEntropyLoss"]


@pytest.mark.parametrize("make", [partial(train_step._batch, MNIST), overhead._row_and_target])
def test_inputs_are_drawn_where_the_generator_is(make, monkeypatch):
    generator = SimpleNamespace(device=torch.device("meta"))
    drawn: list[torch.device] = []

    def draw(*shape, generator, device) -> torch.Tensor:
        drawn.append(device)
        return torch.ones(2)

    monkeypatch.setattr(torch, "randn", draw)
    monkeypatch.setattr(torch, "randint", draw)
    make(generator)
    assert len(drawn) >= 2 and set(drawn) == {generator.device}
    assert CPU.generator(3).device.type == "cpu" and CPU.generator(3).initial_seed() == 3


def _meta_inputs(make) -> Inputs:
    def on_meta(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)

    return make(torch.Generator().manual_seed(0)).map(on_meta)


def test_what_contenders_make_themselves_lies_where_the_inputs_are():
    steps = train_step._contenders(MNIST, train_step.as_written)
    step = next(one for one in steps if one.name == "torch")
    step.bind(_meta_inputs(partial(train_step._batch, MNIST)))
    optimizer = next(one for one in sgd.step_contenders() if one.name == "SGD")
    shapes = [(2, 3), (4,)]
    optimizer.bind(_meta_inputs(partial(sgd.parameters_and_gradients, shapes=shapes)))
    layer = overhead.Backward("torch", *overhead._layers()["torch"])
    layer.bind(_meta_inputs(overhead._row))
    parameters = [*step.params, *optimizer.params, *layer.modules[0].parameters()]
    assert len(parameters) == 6 + 2 + 2
    assert {parameter.device.type for parameter in parameters} == {"meta"}
    assert overhead._reference_layer(torch.ones(1, 8, device="meta")).device.type == "meta"


def names_on(device: Device) -> set[str]:
    contenders = [one for case in all_cases(device) for one in case.contenders()]
    return {one.name for one in contenders if device.name in one.devices}


def test_peers_compete_on_their_own_devices():
    cpu, cuda = names_on(CPU), names_on(CUDA)
    assert {"mkldnn", "mkldnn packed", "jax.jit"} <= cpu - cuda
    ours = {"fastnn tiled", "fastnn library"}
    assert cuda - cpu == {"Liger", "Apex", "Apex FusedSGD", "QuACK", "cut-cross-entropy"} | ours
    assert {"fastnn", "torch.compile", "SGD", "SGD foreach", "SGD fused"} <= cpu & cuda


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("liger_kernel", lambda: cross_entropy._liger(torch.ones(1, 2), torch.zeros(1).long())),
        ("apex", lambda: cross_entropy._apex(torch.ones(1, 2), torch.zeros(1).long())),
        ("apex", lambda: sgd._apex_sgd([torch.ones(2)])),
    ],
)
def test_a_peer_that_is_not_installed_is_unavailable(module: str, call, monkeypatch):
    for loaded in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    with pytest.raises(Unavailable, match=f"{module}.* is not installed"):
        call()


def test_a_destructive_peer_leaves_the_others_their_inputs():
    def overwriting(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = (logits * target).sum()
        logits.data.zero_()
        return loss

    inputs = Inputs((torch.ones(3, requires_grad=True), torch.full((3,), 2.0)))
    call = cross_entropy.Destructive("peer", overwriting).bind(inputs)
    loss, gradient = call()
    assert loss == 6 and torch.equal(gradient, inputs.args[1])
    assert torch.equal(inputs.args[0], torch.ones(3))


def test_cases_come_by_their_importance_and_those_of_the_cpu_by_operator():
    priorities = [case.priority for case in all_cases(CUDA)]
    assert priorities == sorted(priorities) and len(set(priorities)) == 3
    memory_cases = [case.op for case in all_cases(CUDA) if case.mode == "memory"]
    assert memory_cases == ["cross_entropy", *["linear + cross_entropy"] * 3]
    assert {case.priority for case in all_cases()} == {1}
    assert all_cases()[-1].mode == "memory"


@pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])
def test_every_case_has_a_name_of_its_own_and_ours_among_its_contenders(device: Device):
    cases = all_cases(device)
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        names = [contender.name for contender in case.contenders()]
        assert names.count("fastnn") == 1
        assert len(set(names)) == len(names) > 1


def test_resnet50_has_its_parameters():
    shapes = sgd.resnet50()
    assert len(shapes) == 161
    assert sum(torch.Size(shape).numel() for shape in shapes) == 25_557_032


def test_resnet18_has_its_parameters():
    shapes = sgd.resnet18()
    assert len(shapes) == 62
    assert sum(torch.Size(shape).numel() for shape in shapes) == 11_689_512


# ---- compiled peers ------------------------------------------------------------------------------


def compiler_has(*names: str) -> bool:
    """Whether the installed torch's compiler (dynamo or inductor) has these settings."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    return all(hasattr(dynamo, name) or hasattr(inductor, name) for name in names)


needs_traced_backward = pytest.mark.skipif(
    not compiler_has("trace_autograd_ops"), reason="the compiler can't trace a backward"
)
needs_auto_chunker = pytest.mark.skipif(
    not compiler_has("auto_chunker"), reason="the compiler has no auto-chunker"
)
needs_linear_cross_entropy = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"),
    reason="torch has no linear_cross_entropy",
)


@needs_traced_backward
def test_compiled_steps_train_as_the_reference_and_hold_their_backward(fresh_dynamo):
    """Runs all contenders in one process, as in the benchmark: they share a recompile limit."""
    from torch._dynamo.utils import counters

    case = next(case for case in train_step.cases() if case.label == "LogSoftmax+NLLLoss")
    inputs = verify.check_inputs(case, torch.Generator().manual_seed(0))
    reference = verify.expected(case, inputs)
    graphs, breaks = {}, {}
    for contender in case.contenders():
        if contender.compiled:
            counters.clear()
            assert verify.error(contender, inputs, reference) <= case.allowed_error, contender.name
            name = contender.name.removeprefix("torch.compile, ")
            graphs[name] = counters["stats"]["unique_graphs"]
            breaks[name] = list(counters["graph_break"])
            # The benchmark's later calls reuse what the check compiled.
            contender.sampler(inputs)(2)
            assert counters["stats"]["unique_graphs"] == graphs[name]
    assert len(graphs) == 6
    assert graphs["one graph"] == graphs["one graph, cpp_wrapper"] == 1
    optimizers_own = "Call to `torch._dynamo.graph_break()`"
    assert all(
        reason.startswith(optimizers_own) for reasons in breaks.values() for reason in reasons
    )
    assert not breaks["one graph"]


def test_a_step_that_the_compiler_can_not_trace_is_unavailable(monkeypatch):
    import torch._dynamo

    case = train_step.cases()[0]
    traced = [one for one in case.contenders() if isinstance(one, train_step.TracedStep)]
    monkeypatch.setattr(torch._dynamo, "config", SimpleNamespace())  # as in an older torch
    assert len(traced) == 4
    for contender in traced:
        with pytest.raises(Unavailable, match="can't trace a backward"):
            contender.check(train_step._batch(MNIST, torch.Generator()))


def small_vocabulary(rows: int, features: int) -> Inputs:
    """Logits of 2 MiB, of which inductor's auto-chunker needs 1."""
    return linear_cross_entropy._features_weight_targets(
        torch.Generator().manual_seed(0),
        *(rows, features, 2**19 // rows),
        torch.float32,
        gradients=True,
    )


def auto_chunked() -> linear_cross_entropy.AutoChunked:
    contenders = linear_cross_entropy._contenders(gradients=True)
    return next(one for one in contenders if isinstance(one, linear_cross_entropy.AutoChunked))


@needs_auto_chunker
def test_auto_chunker_chunks_and_gives_the_references_numbers(fresh_dynamo):
    stock = Function(
        "reference", linear_cross_entropy._linear_then(torch.nn.functional.cross_entropy)
    )
    inputs = small_vocabulary(64, 16)
    reference = list(verify._tensors(stock.check(inputs.double())))
    for _ in range(2):  # the compiler's cache knows the graph the second time
        torch._dynamo.reset()
        contender = auto_chunked()
        assert verify.error(contender, inputs, reference) < 1e-5
        contender.bind(inputs)  # keep what has been compiled


@needs_auto_chunker
def test_auto_chunker_that_leaves_a_graph_whole_is_unavailable(fresh_dynamo):
    with pytest.raises(Unavailable, match="leaves this graph whole"):
        auto_chunked().bind(small_vocabulary(64, 64))  # more weights than logits


def test_auto_chunker_is_unavailable_where_inductor_has_none(monkeypatch):
    import torch._inductor.metrics

    monkeypatch.setattr(torch._inductor, "config", SimpleNamespace())
    with pytest.raises(Unavailable, match="has no auto-chunker"):
        auto_chunked().bind(small_vocabulary(64, 16))


@needs_linear_cross_entropy
def test_linear_cross_entropy_is_named_for_what_it_runs():
    inputs = small_vocabulary(256, 16)
    names = ("unfused", "default options", "64 rows", "256 rows")
    contenders = {one.name: one for one in linear_cross_entropy._contenders(gradients=False)}
    operators, products = {}, {}
    for name in names:
        contender = contenders[f"F.linear_cross_entropy, {name}"]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            contender.bind(inputs)()
        calls = [event.name for event in profile.events()]
        operators[name] = "aten::cross_entropy_loss" in calls
        products[name] = sum(call in ("aten::mm", "aten::addmm") for call in calls)
        assert contender.same_algorithm == (name == "unfused")
    assert operators == {name: name == "unfused" for name in names}
    assert products["64 rows"] == 4 * products["256 rows"] < products["default options"]


def test_fused_sgd_competes_over_bfloat16_where_torch_steps_right():
    """torch before 2.14.1 leaves most bfloat16 parameters unchanged."""
    case = sgd._step_case("small", [(1000,), (7,)], torch.bfloat16)
    params, grads = case.inputs(torch.Generator().manual_seed(0)).args
    moved = [torch.nn.Parameter(param.clone()) for param in params]
    for param, grad in zip(moved, grads, strict=True):
        param.grad = grad
    torch.optim.SGD(moved, lr=1.0, fused=True).step()
    is_right = all(
        torch.allclose(new, old - grad, rtol=2**-7)
        for new, old, grad in zip(moved, params, grads, strict=True)
    )
    outcome = worker.Outcome([one for one in case.contenders() if one.name == "SGD fused"])
    worker._check(case, outcome, torch.Generator().manual_seed(0))
    assert [one.name for one in outcome.contenders] == ["SGD fused"] * is_right
    assert [reason.startswith("wrong by") for reason in outcome.skipped.values()] == [True] * (
        not is_right
    )
