"""The modules of fastnn.nn equal torch.nn's in everything but what ``forward`` runs."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import fastnn
from support.modules import CLASSES, LOSSES, MODULES, assert_close, inputs_of, make

all_modules = pytest.mark.parametrize("name", MODULES)
both_linears = pytest.mark.parametrize("name", ["Linear", "LinearReLU"])
both_losses = pytest.mark.parametrize("name", LOSSES)


def expected(name: str, stock: torch.nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    output = stock(*inputs)
    return output.relu() if name == "LinearReLU" else output


def assert_same_output(name: str, ours: torch.nn.Module, stock: torch.nn.Module) -> None:
    """Compares the outputs of both modules, and all gradients."""
    results = []
    for module in (ours, stock):
        inputs = inputs_of(name)
        output = module(*inputs) if module is ours else expected(name, module, inputs)
        weighting = torch.arange(1, output.numel() + 1, dtype=output.dtype).view(output.shape)
        wanted = [inputs[0], *module.parameters()]
        grads = torch.autograd.grad((output * weighting / output.numel()).sum(), wanted)
        results.append([output, *grads])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert_close(mine, theirs)


# --- class and construction -----------------------------------------------------------------------


@all_modules
def test_is_an_instance_of_torchs(name):
    ours, stock = make(name)
    assert isinstance(ours, type(stock))


# Options that torch's class lacks.
ADDED = {"LinearCrossEntropyLoss": {"softcap", "logit_scale", "z_loss"}}


@all_modules
def test_signatures_are_torchs(name):
    ours, stock, _ = MODULES[name]
    (*parameters,) = inspect.signature(ours).parameters.values()
    torchs = [*inspect.signature(stock).parameters.values()]
    added = {p.name: p for p in parameters if p.name in ADDED.get(name, ())}
    assert [(p.name, p.default, p.kind) for p in parameters if p.name not in added] == [
        (p.name, p.default, p.kind) for p in torchs
    ]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in added.values())
    forwards = [inspect.signature(kind.forward).parameters.values() for kind in (ours, stock)]
    assert [(p.name, p.default) for p in forwards[0]] == [(p.name, p.default) for p in forwards[1]]


@all_modules
def test_every_public_attribute_of_torchs_is_there(name):
    ours, stock = make(name)
    assert vars(ours).keys() == vars(stock).keys()
    assert {a for a in dir(stock) if not a.startswith("_")} <= set(dir(ours))


@all_modules
def test_repr_is_torchs_under_our_class_name(name):
    ours, stock = make(name)
    assert repr(ours) == repr(stock).replace(type(stock).__name__, type(ours).__name__)
    assert ours.extra_repr() == stock.extra_repr()


@both_linears
def test_linear_repr_without_bias(name):
    layer, _ = make(name, bias=False)
    assert repr(layer) == f"{name}(in_features=5, out_features=3, bias=False)"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
@both_linears
def test_initialisation_is_torchs_from_the_same_seed(name, bias, dtype):
    ours, stock = make(name, bias=bias, dtype=dtype)
    mine, theirs = dict(ours.named_parameters()), dict(stock.named_parameters())
    assert mine.keys() == theirs.keys()
    for key, parameter in theirs.items():
        assert mine[key].dtype == parameter.dtype == (dtype or torch.get_default_dtype())
        assert torch.equal(mine[key], parameter)
    torch.manual_seed(1)
    ours.reset_parameters()
    torch.manual_seed(1)
    stock.reset_parameters()
    assert torch.equal(ours.weight, stock.weight)


@all_modules
def test_outputs_and_gradients_are_torchs(name):
    ours, stock = (module.double() for module in make(name))
    assert_same_output(name, ours, stock)


@both_linears
def test_linear_without_bias(name):
    ours, stock = make(name, bias=False, dtype=torch.float64)
    assert ours.bias is None
    assert_same_output(name, ours, stock)


def test_linear_relu_clamps():
    """The comparison with torch would also pass for a plain Linear if no output were negative."""
    ours, stock = make("LinearReLU", dtype=torch.float64)
    (x,) = inputs_of("LinearReLU")
    assert bool((stock(x) < 0).any())
    assert bool((ours(x) >= 0).all())
    assert bool((ours(x) > 0).any())


@pytest.mark.parametrize("leading", [(), (1,), (2,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
@both_linears
def test_linear_takes_any_leading_dims(name, leading):
    ours, stock = make(name, dtype=torch.float64)
    x = torch.randn(*leading, 5, dtype=torch.float64)
    output = ours(x)
    assert output.shape == (*leading, 3)
    assert_close(output, expected(name, stock, (x,)))


@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 5), (2, 3, 4)], ids=str)
def test_log_softmax_takes_any_shape(shape):
    x = torch.randn(shape, dtype=torch.float64)
    for dim in range(-max(len(shape), 1), max(len(shape), 1)):
        assert_close(fastnn.nn.LogSoftmax(dim)(x), torch.nn.LogSoftmax(dim)(x))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)], ids=str)
@both_linears
def test_linear_of_no_features_warns_as_in_torch(name, sizes):
    with pytest.warns(UserWarning, match="zero-element") as stock:
        torch.nn.Linear(*sizes)
    with pytest.warns(UserWarning, match="zero-element") as ours:
        layer = getattr(fastnn.nn, name)(*sizes)
    assert len(ours) == len(stock)
    assert layer(torch.ones(2, sizes[0])).shape == (2, sizes[1])


# --- losses ---------------------------------------------------------------------------------------

weighted_or_not = pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])


def class_weights(wanted: bool = True) -> Tensor | None:
    return torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64) if wanted else None


@both_losses
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, 4])
@weighted_or_not
def test_loss_options_given_at_construction(name, weighted, ignore_index, reduction):
    weight = class_weights(weighted)
    ours, stock = make(name, weight=weight, ignore_index=ignore_index, reduction=reduction)
    assert_same_output(name, ours, stock)


@both_losses
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@weighted_or_not
def test_loss_options_set_afterwards(name, weighted, reduction):
    ours, stock = make(name)
    weight = class_weights(weighted)
    for loss in (ours, stock):
        loss.reduction = reduction
        loss.ignore_index = 4
        loss.weight = weight
    assert_same_output(name, ours, stock)
    for loss in (ours, stock):
        loss.ignore_index = 2
    assert_same_output(name, ours, stock)


@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@weighted_or_not
def test_label_smoothing(label_smoothing, reduction, weighted):
    weight = class_weights(weighted)
    options = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    ours, stock = make("CrossEntropyLoss", **options)
    assert_same_output("CrossEntropyLoss", ours, stock)
    for loss in (ours, stock):
        loss.label_smoothing = 0.3
    assert_same_output("CrossEntropyLoss", ours, stock)


@both_losses
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 5, 2), (1, 5, 2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_losses_take_any_shape(name, shape, reduction):
    ours, stock = make(name, reduction=reduction)
    logits = torch.randn(shape, dtype=torch.float64)
    target_shape = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.randint(CLASSES, target_shape)
    mine, theirs = ours(logits, target), stock(logits, target)
    assert mine.shape == theirs.shape
    assert_close(mine, theirs)


def test_cross_entropy_takes_probabilities():
    ours, stock = make("CrossEntropyLoss", label_smoothing=0.2)
    logits, probabilities = torch.randn(2, 4, 5, dtype=torch.float64)
    assert_close(ours(logits, probabilities.softmax(1)), stock(logits, probabilities.softmax(1)))


@both_losses
@pytest.mark.parametrize("flags", list(itertools.product([None, True, False], repeat=2)), ids=str)
def test_deprecated_flags_choose_the_reduction_and_warn_as_in_torch(name, flags):
    options = dict(zip(("size_average", "reduce"), flags, strict=True))
    recorded = []
    for kind in MODULES[name][:2]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            recorded.append((kind(**options), [(w.category, str(w.message)) for w in caught]))
    (ours, our_warnings), (stock, stock_warnings) = recorded
    assert our_warnings == stock_warnings
    assert bool(our_warnings) == (flags != (None, None))
    assert ours.reduction == stock.reduction
    assert_same_output(name, ours, stock)


@both_losses
def test_bad_reduction_raises(name):
    loss = make(name)[0]
    loss.reduction = "average"
    with pytest.raises(ValueError, match="average"):
        loss(*inputs_of(name))


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3, 3)], ids=str)
def test_losses_read_predictions_for_fastai(shape):
    logits = torch.randn(shape, dtype=torch.float64)
    classes = logits.movedim(1, -1) if len(shape) > 1 else logits
    for loss, output in (
        (fastnn.nn.CrossEntropyLoss(), logits),
        (fastnn.nn.NLLLoss(), classes.log_softmax(-1).movedim(-1, min(1, len(shape) - 1))),
    ):
        assert_close(
            loss.activation(output).movedim(min(1, len(shape) - 1), -1), classes.softmax(-1)
        )
        assert torch.equal(loss.decodes(output), classes.argmax(-1))
        assert loss.y_int


# --- LogSoftmax without a dimension ---------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (4,), (4, 5), (2, 4, 5), (2, 2, 2, 2)], ids=str)
def test_log_softmax_chooses_its_dimension_as_torch_does(shape):
    x = torch.randn(shape, dtype=torch.float64)
    with pytest.warns(UserWarning, match="Implicit dimension choice for log_softmax"):
        theirs = torch.nn.LogSoftmax()(x)
    with pytest.warns(UserWarning, match="Implicit dimension choice for log_softmax"):
        mine = fastnn.nn.LogSoftmax()(x)
    assert_close(mine, theirs)


@pytest.mark.not_on_a_gpu("the lines that warnings name; a default device adds frames of torch's")
def test_log_softmax_warning_points_at_the_users_line():
    layer = fastnn.nn.LogSoftmax()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1
        layer(torch.ones(2, 3))
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]


def test_log_softmax_dimension_set_afterwards():
    layer = fastnn.nn.LogSoftmax(dim=1)
    (x,) = inputs_of("LogSoftmax")
    assert_close(layer(x), torch.log_softmax(x, 1))
    layer.dim = 0
    assert_close(layer(x), torch.log_softmax(x, 0))


# --- state, devices, dtypes -----------------------------------------------------------------------


def options_with_state(name: str) -> dict[str, Tensor]:
    return {"weight": class_weights()} if name in LOSSES else {}


@all_modules
@pytest.mark.capability("saving", "`state_dict` to and from torch's, `strict=True`")
def test_state_dict_passes_both_ways(name):
    ours, stock = (module.double() for module in make(name, **options_with_state(name)))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    changed = {key: value + 1 for key, value in ours.state_dict().items()}
    stock.load_state_dict(changed, strict=True)
    assert_states_equal(stock.state_dict(), changed)
    changed_again = {key: value * 2 for key, value in stock.state_dict().items()}
    ours.load_state_dict(changed_again, strict=True)
    assert_states_equal(ours.state_dict(), changed_again)
    stock.load_state_dict(ours.state_dict(), strict=True)
    assert_same_output(name, ours, stock)


def assert_states_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key])


@all_modules
@pytest.mark.capability("saving", "`state_dict` through `torch.load(weights_only=True)`")
def test_state_dict_is_saved_and_loaded_weights_only(name):
    ours, stock = make(name, **options_with_state(name))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_states_equal(loaded, stock.state_dict())


def through_pickle(module: torch.nn.Module) -> torch.nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@all_modules
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, through_pickle, through_torch_save]
)
@pytest.mark.capability("saving", "`pickle`, `torch.save`, `copy.deepcopy`")
def test_copies_compute_the_same(name, duplicate):
    ours, stock = (module.double() for module in make(name, **options_with_state(name)))
    copied = duplicate(ours)
    assert type(copied) is type(ours)
    assert copied is not ours
    assert_same_output(name, copied, stock)


@pytest.mark.parametrize("name", ["Linear", "LinearReLU", *LOSSES])
@pytest.mark.capability("saving", "`.to(dtype)`, `half`, `bfloat16`")
def test_state_moves_with_the_module(name):
    ours = make(name, **options_with_state(name))[0].double()
    tensors = list(ours.state_dict().values())
    assert {t.dtype for t in tensors} == {torch.float64}
    assert {t.dtype for t in ours.bfloat16().state_dict().values()} == {torch.bfloat16}
    assert {t.device.type for t in ours.to("meta").state_dict().values()} == {"meta"}


@both_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weighted_loss_follows_its_inputs_dtype(name, dtype):
    ours, stock = (loss.to(dtype) for loss in make(name, weight=class_weights()))
    inputs = inputs_of(name, dtype)
    mine = ours(*inputs)
    assert mine.dtype == dtype
    assert_close(mine, stock(*inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@both_linears
def test_linear_dtype_and_device_arguments(name, dtype):
    device = torch.get_default_device()
    ours, stock = make(name, dtype=dtype, device=device)
    assert {parameter.device for parameter in ours.parameters()} == {device}
    (x,) = inputs_of(name, dtype)
    output = ours(x)
    assert output.dtype == dtype
    assert_close(output, expected(name, stock, (x,)))


@both_linears
def test_linear_on_the_meta_device(name):
    layer, _ = make(name, device="meta")
    assert layer.weight.is_meta
    assert layer.bias.is_meta
    output = layer(torch.empty(7, 2, 5, device="meta"))
    assert output.is_meta
    assert output.shape == (7, 2, 3)


@all_modules
def test_forward_and_backward_on_the_meta_device(name):
    ours = make(name)[0].to("meta")
    inputs = [tensor.detach().float().to("meta") for tensor in inputs_of(name)[:1]]
    inputs += [tensor.to("meta") for tensor in inputs_of(name)[1:]]
    inputs[0].requires_grad_()
    output = ours(*inputs)
    output.sum().backward()
    assert output.is_meta
    assert inputs[0].grad.shape == inputs[0].shape


@pytest.mark.capability("saving", "`nn.utils.skip_init`")
@both_linears
def test_skip_init(name):
    options = {"dtype": torch.float64, "device": torch.get_default_device()}
    kind = getattr(fastnn.nn, name)
    layer = torch.nn.utils.skip_init(kind, 5, 3, **options)
    assert type(layer) is kind
    stock = make(name, dtype=torch.float64)[1]
    layer.load_state_dict(stock.state_dict())
    assert_same_output(name, layer, stock)


@pytest.mark.capability(
    "saving", "built on the meta device, `to_empty`, `load_state_dict(assign=True)`"
)
@both_linears
def test_to_empty_after_meta(name):
    with torch.device("meta"):
        layer = getattr(fastnn.nn, name)(5, 3, dtype=torch.float64)
    layer.to_empty(device=torch.get_default_device())
    stock = make(name, dtype=torch.float64)[1]
    layer.load_state_dict(stock.state_dict())
    assert_same_output(name, layer, stock)


# --- module machinery -----------------------------------------------------------------------------


@all_modules
def test_train_and_eval_compute_the_same(name):
    ours = make(name)[0].double()
    assert ours.training
    trained = ours(*inputs_of(name))
    assert not ours.eval().training
    assert torch.equal(ours(*inputs_of(name)), trained)


@all_modules
def test_no_grad_and_inference_mode(name):
    ours = make(name)[0].double()
    with_graph = ours(*inputs_of(name))
    assert with_graph.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            without = ours(*inputs_of(name))
        assert not without.requires_grad
        assert torch.equal(without, with_graph)


@all_modules
def test_forward_and_backward_hooks(name):
    ours = make(name)[0].double()
    events = []
    ours.register_forward_pre_hook(lambda module, args: events.append("before"))
    ours.register_forward_hook(lambda module, args, output: output * 2)
    ours.register_full_backward_hook(lambda *args: events.append("backward"))
    hooked = ours(*inputs_of(name))
    hooked.sum().backward()
    assert events == ["before", "backward"]
    assert torch.equal(hooked, 2 * make(name)[0].double()(*inputs_of(name)))


def test_frozen_parameters_get_no_gradient():
    layer = fastnn.nn.LinearReLU(5, 3, dtype=torch.float64)
    layer.weight.requires_grad_(False)
    x = inputs_of("LinearReLU")[0].detach()
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


class Double(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.capability(
    "saving", "`weight_norm`, `spectral_norm`, `orthogonal`, pruning; and removed again"
)
@both_linears
def test_parametrized_weight(name):
    ours, stock = make(name, dtype=torch.float64)
    kind = type(ours)
    for layer in (ours, stock):
        parametrize.register_parametrization(layer, "weight", Double())
    assert isinstance(ours, kind)
    assert_same_output(name, ours, stock)
    for layer in (ours, stock):
        parametrize.remove_parametrizations(layer, "weight")
    assert type(ours) is kind
    assert_same_output(name, ours, stock)


@both_linears
def test_weight_norm_and_pruning(name):
    ours, stock = make(name, dtype=torch.float64)
    for layer in (ours, stock):
        parametrizations.weight_norm(layer)
    assert_same_output(name, ours, stock)
    for layer in (ours, stock):
        parametrize.remove_parametrizations(layer, "weight")
        prune.l1_unstructured(layer, "weight", amount=0.5)
    assert int((ours.weight == 0).sum()) == 8  # round(0.5 * 15)
    assert_same_output(name, ours, stock)


@pytest.mark.capability("autograd", "`functional_call`: per-sample gradients of a model")
@both_linears
def test_functional_call(name):
    layer, stock = make(name, dtype=torch.float64)
    layer.reset_parameters()  # different from those of the call
    (x,) = inputs_of(name)
    output = torch.func.functional_call(layer, dict(stock.named_parameters()), x)
    assert_close(output, expected(name, stock, (x,)))


def test_in_a_sequential_with_apply():
    """Keys, indices and initialisers that check isinstance treat it as a Linear."""

    def fill(module: torch.nn.Module) -> None:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.constant_(module.weight, 0.5)
            torch.nn.init.zeros_(module.bias)

    model = torch.nn.Sequential(fastnn.nn.LinearReLU(2, 3), torch.nn.Linear(3, 1)).apply(fill)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    # Halves and ones are exact: relu(0.5 + 0.5) = 1 in each of 3 units, 0.5 each on top.
    assert model(torch.ones(1, 2)).item() == 1.5
    assert model(-torch.ones(1, 2)).item() == 0


def test_subclasses_may_extend_forward():
    class Scaled(fastnn.nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target) * 3

    inputs = inputs_of("CrossEntropyLoss")
    assert_close(Scaled()(*inputs), F.cross_entropy(*inputs) * 3)


@all_modules
def test_argument_that_is_no_tensor_raises(name):
    with pytest.raises(TypeError, match="'input' must be Tensor, not list"):
        make(name)[0]([[1.0, 2.0]], *inputs_of(name)[1:])
