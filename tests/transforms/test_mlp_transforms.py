"""mlp under autograd's checks and torch.func, compiled, exported, cast, checkpointed, sharded."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastnn
from support import chains
from support.chains import Chain, layer_by_layer, make
from support.marks import needs_extension
from support.modes import FunctionRecorder
from support.operators import every_dtype
from support.small_cases import assert_close

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop",
    "ignore:`torch.jit",
    "ignore:.isinstance.treespec, LeafSpec",
    "ignore:You are using the legacy TorchScript",
    "ignore:The feature will be removed",
)

mlp = fastnn.functional.mlp


def capability(section: str, row: str) -> pytest.MarkDecorator:
    return pytest.mark.capability(section, row, operators=["mlp"])


ACTIVATIONS = [["relu", "relu", None], ["relu", None, "relu"], [None, None, None]]
by_activations = pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)


def away_from_kinks(**options) -> Chain:
    """A chain whose sums are too far from zero for finite differences to straddle it."""
    for seed in range(10000):
        chain = make((3, 4, 3, 2), (2,), seed=seed, **options)
        x, smallest = chain.input, torch.inf
        for weight, bias, activation in zip(
            chain.weights, chain.biases, chain.activations, strict=True
        ):
            x = nn.functional.linear(x, weight, bias)
            smallest = min(smallest, x.abs().min().item())
            x = x.relu() if activation else x
        if smallest > 1e-2:
            return chain
    raise AssertionError("no such chain")


def of_tensors(chain: Chain, function: Callable[..., Tensor] = mlp) -> Callable[..., Tensor]:
    """The chain as a function of its tensors."""
    return lambda *tensors: chain.of(tensors).run(function)


def loss_of(chain: Chain, function: Callable[..., Tensor] = mlp) -> Callable[..., Tensor]:
    return lambda *tensors: of_tensors(chain, function)(*tensors).square().sum()


# --- derivatives ----------------------------------------------------------------------------------


@capability("autograd", "`gradcheck`, `gradgradcheck`")
@by_activations
@pytest.mark.parametrize("biases", [True, False, [True, False, True]], ids=str)
def test_gradcheck_and_gradgradcheck(activations, biases):
    chain = away_from_kinks(activations=activations, biases=biases).as_leaves()
    gradcheck(
        of_tensors(chain),
        chain.tensors,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )
    gradgradcheck(
        of_tensors(chain), chain.tensors, check_fwd_over_rev=True, check_batched_grad=True
    )


@capability("autograd", "`create_graph=True`")
def test_third_derivatives():
    results = []
    for function in (mlp, chains.stock):
        chain = make((3, 4, 3, 2), (2,)).as_leaves()
        grads = (chain.run(function).pow(3).sum(),)
        for _ in range(3):
            total = sum(g.pow(3).sum() for g in grads)
            grads = torch.autograd.grad(total, chain.tensors, create_graph=True)
        results.append(grads)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)  # values in the thousands


@capability("autograd", "`is_grads_batched=True`")
@by_activations
@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients(activations, create_graph):
    results = []
    for function in (mlp, chains.stock):
        chain = make((3, 4, 3, 2), (2,), activations=activations).as_leaves()
        output = chain.run(function)
        eye = torch.eye(output.numel(), dtype=output.dtype).reshape(-1, *output.shape)
        results.append(
            torch.autograd.grad(
                output, chain.tensors, eye, is_grads_batched=True, create_graph=create_graph
            )
        )
    assert_close(*results)


@capability("autograd", "`torch.func.jvp`, forward-mode AD")
def test_forward_mode():
    chain = make((3, 4, 3, 2), (2,))
    tangents = [torch.ones_like(tensor) for tensor in chain.tensors]
    results = []
    for function in (mlp, chains.stock):
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, chain.tensors, tangents)
            results.append(forward_ad.unpack_dual(chain.of(list(duals)).run(function)))
    assert_close(*results)
    assert_close(jvp(of_tensors(chain), tuple(chain.tensors), tuple(tangents)), tuple(results[1]))


@capability("autograd", "`torch.func.jacrev`, `jacfwd`, `hessian`")
@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, hessian], ids=lambda t: t.__name__)
@pytest.mark.parametrize("argument", range(7))
def test_transforms(transform, argument):
    chain = make((3, 4, 3, 2), (2,))
    results = [
        transform(loss_of(chain, function), argnums=argument)(*chain.tensors)
        for function in (mlp, chains.stock)
    ]
    assert_close(*results)


@capability("autograd", "per-sample gradients")
def test_per_sample_gradients():
    model = fastnn.nn.MLP(5, (4, 3), 2, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    x = torch.randn(6, 5, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample.unsqueeze(0),)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(6):
        alone = torch.autograd.grad(model(x[i : i + 1]).square().sum(), parameters.values())
        assert_close([gradient[i] for gradient in per_sample.values()], list(alone))


@capability("autograd", "`torch.func.vmap` over inputs")
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 2)], ids=str)
def test_vmap(in_dims):
    """Over inputs, over models, and over both."""
    of_input, of_parameters = in_dims
    chain = make((3, 4, 3, 2), (2,))
    tensors = [
        tensor
        if dim is None
        else torch.stack([tensor, 2 * tensor, -tensor], min(dim, tensor.dim()))
        for dim, tensor in zip([of_input] + [of_parameters] * 6, chain.tensors, strict=True)
    ]
    dims = tuple(
        None if dim is None else min(dim, tensor.dim())
        for dim, tensor in zip([of_input] + [of_parameters] * 6, chain.tensors, strict=True)
    )
    results = [
        vmap(of_tensors(chain, function), in_dims=dims)(*tensors)
        for function in (mlp, chains.stock)
    ]
    assert_close(*results)


# --- torch.compile, torch.export, traces ----------------------------------------------------------


def value_and_gradients(function: Callable[..., Tensor], chain: Chain) -> list[Tensor]:
    output = function(*chain.tensors)
    return [output, *torch.autograd.grad(output.square().sum(), chain.tensors)]


@capability("compile", "`fullgraph=True`, forward and backward: the same bits")
@needs_extension
@pytest.mark.parametrize("name", ["three layers", "3-d", "some biases", "relu last", "1-d"])
def test_compiling_changes_no_bit(fresh_dynamo, name):
    chain = chains.SAMPLES[name](torch.float32).as_leaves()
    compiled = torch.compile(of_tensors(chain), fullgraph=True, backend="aot_eager")
    eager = value_and_gradients(of_tensors(chain), chain)
    assert all(map(torch.equal, value_and_gradients(compiled, chain), eager))


@needs_extension
def test_one_operator_each_way_in_a_compiled_graph(fresh_dynamo):
    graphs: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append([str(node.target) for node in calls])
        return make_boxed_func(graph.forward)

    chain = make((5, 4, 3, 2), (7,)).as_leaves()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.compile(of_tensors(chain), fullgraph=True, backend=backend)(
        *chain.tensors
    ).sum().backward()
    forward, backward = graphs
    assert [call for call in forward if "getitem" not in call] == ["fastnn.mlp_forward.default"]
    ours = [call for call in backward if "fastnn" in call]
    assert ours == ["fastnn.mlp_backward.default"]
    assert not any("mm" in call or "relu" in call or "threshold" in call for call in backward)


@capability("compile", "`dynamic=True`: one compilation for all batch sizes")
@needs_extension
def test_one_compilation_for_all_batch_sizes(fresh_dynamo):
    counter = CompileCounterWithBackend("aot_eager")
    model = fastnn.nn.MLP(5, (4, 3), 2)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for rows in (4, 7, 33):
        x = torch.randn(rows, 5, requires_grad=True)
        results = []
        for run in (compiled, model):
            output = run(x)
            wanted = [x, *model.parameters()]
            results.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
        assert all(map(torch.equal, *results))
    assert counter.frame_count == 1


@capability("compile", "inductor: a model forward and backward, a step")
@needs_extension
@pytest.mark.cpu_only("inductor compiles for the device: the CPU's code around any kernels")
def test_inductor(fresh_dynamo):
    model = fastnn.nn.MLP(5, (4, 3), 2, dtype=torch.float64)
    compiled = torch.compile(lambda x: model(2 * x).log_softmax(1), fullgraph=True)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (compiled, lambda x: model(2 * x).log_softmax(1)):
        output = run(x)
        grads = torch.autograd.grad(output.square().sum(), [x, *model.parameters()])
        results.append([output, *grads])
    assert_close(*results)


@capability("compile", "compiled autograd")
@needs_extension
def test_compiled_autograd(fresh_dynamo):
    calls: set[str] = set()

    def record(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        calls.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph.forward)

    compiler = torch.compile(backend=aot_autograd(fw_compiler=record), fullgraph=True)
    chain = make((5, 4, 3, 2), (7,)).as_leaves()
    _, *eager = value_and_gradients(of_tensors(chain), chain)
    loss = chain.run().square().sum()
    with torch._dynamo.compiled_autograd._enable(compiler):
        loss.backward()
    assert_close([tensor.grad for tensor in chain.tensors], eager)
    assert {call for call in calls if "fastnn" in call} == {"fastnn.mlp_backward.default"}


@capability("export", "`torch.export`, strict and not")
@needs_extension
@pytest.mark.parametrize("strict", [False, True])
def test_export(fresh_dynamo, strict):
    model, x = fastnn.nn.MLP(5, (4, 3), 2), torch.randn(6, 5)
    rows = ({0: torch.export.Dim("rows")},)
    exported = torch.export.export(model, (x,), dynamic_shapes=rows, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    targets = [str(node.target) for node in loaded.graph.nodes if node.op == "call_function"]
    assert targets == ["fastnn.mlp.default"]
    other = torch.randn(9, 5)
    assert torch.equal(loaded.module()(other), model(other))
    assert torch.equal(exported.run_decompositions().module()(other), model(other))


def built(how: str) -> nn.Module:
    model = fastnn.nn.MLP(5, (4, 3), 2, dtype=torch.float64)
    return model if how == "MLP" else fastnn.fuse(fastnn.unfuse(model))


def saved_and_loaded(script: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    return torch.jit.load(file)


@capability("export", "`torch.jit.trace`, saved and loaded")
@pytest.mark.parametrize("how", ["MLP", "fused Sequential"])
def test_traced(how):
    model, x = built(how), torch.randn(2, 6, 5, dtype=torch.float64)
    traced = saved_and_loaded(torch.jit.trace(model, (x[0],)))
    assert_close(traced(x[1]), model(x[1]))


@capability("export", "`torch.jit.script`")
@pytest.mark.parametrize("how", ["MLP", "fused Sequential"])
def test_scripted(how):
    model, x = built(how), torch.randn(6, 5, dtype=torch.float64)
    assert_close(saved_and_loaded(torch.jit.script(model))(x), model(x))


@needs_extension
def test_a_trace_holds_the_layers():
    """torch.jit.trace can't record operators over lists of optional tensors."""
    traced = torch.jit.trace(fastnn.nn.MLP(5, (4, 3), 2), (torch.randn(6, 5),))
    kinds = [n.kind() for n in traced.inlined_graph.nodes() if n.kind().startswith("fastnn::")]
    assert kinds == ["fastnn::linear_relu", "fastnn::linear_relu", "fastnn::linear"]


@capability("export", "`torch.onnx.export`, run in onnxruntime")
@pytest.mark.cpu_only("an exported model has none of our kernels")
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="torch.onnx takes onnx and onnxscript; running its models, onnxruntime",
)
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(tmp_path, dynamo):
    """The model only contains ONNX's own operators."""
    import onnx
    import onnxruntime

    model, path = fastnn.nn.MLP(5, (4, 3), 2).eval(), tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.randn(4, 5),), path, dynamo=dynamo, verbose=False)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators == ["Gemm", "Relu", "Gemm", "Relu", "Gemm"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(4, 5)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # Sums of fewer than ten terms of order one.
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), rtol=1e-5, atol=1e-5)


@capability("export", "`torch.fx.symbolic_trace`: one call each, which it prints and runs")
def test_fx_sees_one_call():
    def run(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
        return mlp(x, [weight, other], activations=["relu", None])

    traced = torch.fx.symbolic_trace(run)
    (call,) = (node for node in traced.graph.nodes if node.op == "call_function")
    assert call.target is mlp
    tensors = [torch.randn(3, 5), torch.randn(4, 5), torch.randn(2, 4)]
    assert torch.equal(traced(*tensors), run(*tensors))


@capability("compile", "`torch.library.opcheck`")
@needs_extension
@pytest.mark.parametrize("name", ["three layers", "3-d", "some biases", "no rows", "transposed"])
def test_opcheck(name):
    chain = chains.SAMPLES[name](torch.float32).as_leaves()
    arguments = (chain.input, chain.weights, chain.biases, chain.relu)
    opcheck(torch.ops.fastnn.mlp.default, arguments)
    arguments = (
        *(chain.input.detach(), [w.detach() for w in chain.weights]),
        *([b if b is None else b.detach() for b in chain.biases], chain.relu),
    )
    opcheck(torch.ops.fastnn.mlp_forward.default, arguments)
    outputs = torch.ops.fastnn.mlp_forward(*arguments)
    grad_output, layers = torch.ones_like(outputs[-1]), len(chain.weights)
    inputs = [arguments[0], *outputs[:-1]]
    has_bias = [bias is not None for bias in chain.biases]
    for mask in (
        [True] * (1 + layers) + has_bias,
        [True] + [False] * 2 * layers,
        [False] * layers + [True] + [False] * layers,
        [False] * (1 + layers) + has_bias,
    ):
        backward = (grad_output, inputs, arguments[1], outputs[-1], chain.relu, mask)
        opcheck(torch.ops.fastnn.mlp_backward.default, backward)


@needs_extension
@every_dtype
def test_meta_and_fake_tensors(dtype):
    real = make((5, 4, 3), (2, 7), dtype=dtype)
    fake = real.of([tensor.to("meta") for tensor in real.tensors])
    output = fake.as_leaves().run()
    assert (output.device.type, output.dtype, output.shape) == ("meta", dtype, (2, 7, 3))
    with FakeTensorMode() as mode:
        faked = real.of([mode.from_tensor(tensor) for tensor in real.tensors])
        output = faked.run()
    assert output.shape == (2, 7, 3)
    assert output.dtype == dtype


# --- what else a training does --------------------------------------------------------------------


@capability(
    "precision", "`torch.autocast` on the CPU, bfloat16 and float16: torch's dtypes and numbers"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Like the layers one by one, in values, dtypes and gradients."""
    results = []
    for function in (mlp, layer_by_layer):
        chain = make((17, 9, 12, 5), (7,), dtype=torch.float32, biases=[True, False, True])
        chain = chain.as_leaves()
        with torch.autocast(chain.input.device.type, dtype):
            output = chain.run(function)
        grads = torch.autograd.grad(output.float().square().sum(), chain.tensors)
        results.append([output, *grads])
    assert results[0][0].dtype == dtype
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_autocast_leaves_float64():
    chain = make((17, 9, 5), (7,))
    with torch.autocast(chain.input.device.type, torch.bfloat16):
        ours, theirs = chain.run(), chain.run(layer_by_layer)
    assert ours.dtype == theirs.dtype == torch.float64


@capability("autograd", "activation checkpointing, both kinds")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    chain = make((17, 9, 12, 5), (7,)).as_leaves()
    output = checkpoint(of_tensors(chain), *chain.tensors, use_reentrant=use_reentrant)
    output.square().sum().backward()
    _, *eager = value_and_gradients(of_tensors(chain), chain)
    assert all(torch.equal(t.grad, g) for t, g in zip(chain.tensors, eager, strict=True))


@capability("tools", "FLOPs: `FlopCounterMode`")
@needs_extension
def test_flops():
    def count(function: Callable[..., Tensor], wanted: list[bool] | None) -> int:
        chain = make((17, 9, 12, 5), (2, 7)).as_leaves(wanted)
        with FlopCounterMode(display=False) as counter:
            output = chain.run(function)
            if output.requires_grad:
                output.sum().backward()
        return counter.get_total_flops()

    for wanted in (
        None,
        [False] * 7,
        [False] + [True] * 6,
        [False, False, True, True, False, True, False],
        [False] * 4 + [True] * 3,
    ):
        assert count(mlp, wanted) == count(chains.stock, wanted)


# --- tensors of other kinds -----------------------------------------------------------------------


@capability("compile", "tensor subclasses that know PyTorch's functions or operators")
def test_functions_are_handed_to_modes_and_classes():
    class Doubling(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is mlp:
                plain = [a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
                return 2 * mlp(*plain, **(kwargs or {}))
            return super().__torch_function__(func, types, args, kwargs)

    chain = make((5, 4, 3), (7,))
    doubled = chain.of([chain.input.as_subclass(Doubling), *chain.tensors[1:]])
    assert torch.equal(doubled.run(), 2 * chain.run())
    with FunctionRecorder() as recorder:
        chain.run()
    assert mlp in recorder.called


def test_a_class_that_knows_torchs_functions_alone():
    class Refusing(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is mlp:
                return NotImplemented
            return super().__torch_function__(func, types, args, kwargs)

    chain = make((5, 4, 3), (7,))
    for i in range(5):
        tensors = list(chain.tensors)
        tensors[i] = tensors[i].as_subclass(Refusing)
        assert_close(chain.of(tensors).run().as_subclass(Tensor), chain.run(chains.stock))


@pytest.mark.cpu_only("of layouts that torch has on the CPU")
@pytest.mark.filterwarnings("ignore:Sparse", "ignore:.*nested tensor.*")
@pytest.mark.parametrize("kind", ["nested", "jagged", "sparse weight", "mkldnn"])
def test_other_layouts_are_torchs(kind):
    chain = make((5, 4, 3), (7,), dtype=torch.float32)
    tensors = list(chain.tensors)
    if kind in ("nested", "jagged"):
        layout = torch.jagged if kind == "jagged" else torch.strided
        tensors[0] = torch.nested.nested_tensor([tensors[0], tensors[0][:2]], layout=layout)
    elif kind == "sparse weight":
        tensors[1] = tensors[1].to_sparse()
    else:
        tensors = [tensor.to_mkldnn() for tensor in tensors]
    ours, theirs = (outcome(chain.of(tensors), function) for function in (mlp, chains.stock))
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        assert ours.layout == theirs.layout
        plain = [
            t.to_dense() if t.is_mkldnn else t.to_padded_tensor(0.0) if t.is_nested else t
            for t in (ours, theirs)
        ]
        torch.testing.assert_close(*plain, rtol=1e-5, atol=1e-6)


def outcome(chain: Chain, function: Callable[..., Tensor]) -> Tensor | Exception:
    try:
        return chain.run(function)
    except (RuntimeError, NotImplementedError) as error:
        return error


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.cpu_only("a process group of gloo")
def test_dtensors_and_data_parallel(tmp_path):
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        chain = make((5, 4, 3), (7,))
        mesh = init_device_mesh("cpu", (1,))
        placed = [distribute_tensor(tensor, mesh, [Replicate()]) for tensor in chain.tensors]
        output = chain.of(placed).run()
        assert isinstance(output, DTensor)
        assert_close(output.to_local(), chain.run(chains.stock))

        model = fastnn.nn.MLP(5, (4, 3), 2, dtype=torch.float64)
        parallel = nn.parallel.DistributedDataParallel(model)
        x = torch.randn(6, 5, dtype=torch.float64)
        parallel(x).square().sum().backward()
        alone = torch.autograd.grad(model(x).square().sum(), model.parameters())
        assert_close([p.grad for p in model.parameters()], list(alone))
        torch.testing.assert_close(nn.DataParallel(model)(x), model(x), rtol=0, atol=0)
    finally:
        torch.distributed.destroy_process_group()
