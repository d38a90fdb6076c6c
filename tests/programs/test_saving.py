"""Models of our layers saved, moved, shared, reparametrized and wrapped, like PyTorch's own.

Single layers are tested in test_nn.py, the optimizer in tests/optim.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import (
    parameters_to_vector,
    parametrizations,
    parametrize,
    prune,
    vector_to_parameters,
)
from torch.testing._internal.two_tensor import TwoTensor

from support import perceptron
from support.marks import needs_extension
from support.perceptron import OURS, STOCK, Perceptron
from support.small_cases import assert_close


def capability(row: str, operators=perceptron.USES):
    return pytest.mark.capability("saving", row, operators=operators)


def loss_of(model: Perceptron) -> Tensor:
    return model(*perceptron.batch(7))


def written_and_read(state: object, **options) -> object:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, **options)


# --- saved and loaded -----------------------------------------------------------------------------


@capability("`state_dict` to and from torch's, `strict=True`")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("source", "goal"), [(OURS, STOCK), (STOCK, OURS)], ids=["out", "in"])
def test_state_passes_between_our_model_and_torchs(source, goal, assign):
    trained, fresh = perceptron.make(source), perceptron.make(goal)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(2)
    state = written_and_read(trained.state_dict(), weights_only=True)
    fresh.load_state_dict(state, strict=True, assign=assign)
    assert_close(loss_of(fresh), loss_of(trained))


@capability("a whole model: `torch.load(weights_only=True)` with `safe_globals`")
def test_a_whole_model_is_loaded_from_classes_that_were_allowed():
    model = perceptron.make(OURS)
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):
        written_and_read(model, weights_only=True)
    classes = {type(module) for module in model.modules()}
    with torch.serialization.safe_globals([*classes, set]):
        loaded = written_and_read(model, weights_only=True)
    assert torch.equal(loss_of(loaded), loss_of(model))


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@capability("`pickle`, `torch.save`, `copy.deepcopy`")
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, through_pickle])
def test_copies_of_a_model(duplicate):
    model = perceptron.make(OURS)
    copied = duplicate(model)
    assert torch.equal(loss_of(copied), loss_of(model))
    shares = copied.hidden.weight is model.hidden.weight
    assert shares == (duplicate is copy.copy)


# --- moved ----------------------------------------------------------------------------------------


@capability("built on the meta device, `to_empty`, `load_state_dict(assign=True)`")
@pytest.mark.parametrize("assign", [False, True])
def test_a_model_made_on_the_meta_device(assign):
    with torch.device("meta"):
        model = Perceptron(OURS).double()
    model.nll_loss.weight = model.nll_loss.weight.to("meta")
    x, target = (tensor.to("meta") for tensor in perceptron.batch(7))
    assert model(x, target).is_meta
    filled = perceptron.make(OURS)
    if not assign:
        model.to_empty(device=filled.hidden.weight.device)
    model.load_state_dict(filled.state_dict(), assign=assign)
    assert torch.equal(loss_of(model), loss_of(filled))


@capability("`share_memory`")
def test_shared_memory():
    model = perceptron.make(OURS)
    before = loss_of(model)
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    assert torch.equal(loss_of(model), before)


@capability("`.to(dtype)`, `half`, `bfloat16`")
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_of_other_dtypes(dtype, swap):
    """Parameters may be swapped instead of overwritten, which tensor subclasses need."""
    model = perceptron.make(OURS)
    x, target = perceptron.batch(7, dtype)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model = model.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    loss = model(x, target)
    loss.backward()
    assert {loss.dtype} == {p.grad.dtype for p in model.parameters()} == {dtype}
    # Both losses are about 1.5, from logits of order one: about ten roundings.
    expected = loss_of(perceptron.make(OURS)).to(dtype)
    torch.testing.assert_close(loss, expected, rtol=0, atol=10 * torch.finfo(dtype).eps)


@capability("`parameters_to_vector`, `vector_to_parameters`")
def test_parameters_as_a_vector():
    model, stock = perceptron.make(OURS), perceptron.make(STOCK)
    vector = parameters_to_vector(stock.parameters()) * 2
    for each in (model, stock):
        vector_to_parameters(vector, each.parameters())
    assert_close(loss_of(model), loss_of(stock))


# --- reparametrized -------------------------------------------------------------------------------

REPARAMETRIZATIONS: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "l1_unstructured": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "ln_structured": lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
}


@capability(
    "`weight_norm`, `spectral_norm`, `orthogonal`, pruning; and removed again", ["linear_relu"]
)
@pytest.mark.parametrize("name", REPARAMETRIZATIONS)
def test_reparametrized_layers_train_as_torchs(name):
    results = []
    for kind in (OURS, STOCK):
        model = perceptron.make(kind)
        torch.manual_seed(0)  # spectral_norm starts with a random vector
        REPARAMETRIZATIONS[name](model.hidden)
        loss = loss_of(model)
        loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        assert list(gradients) != [key for key, _ in perceptron.make(kind).named_parameters()]
        model.eval()
        with_it = loss_of(model)
        if parametrize.is_parametrized(model.hidden):
            parametrize.remove_parametrizations(model.hidden, "weight")
        else:
            prune.remove(model.hidden, "weight")
        assert_close(loss_of(model), with_it)
        results.append([loss, gradients, with_it])
    assert_close(*results)


# --- tensor subclasses ----------------------------------------------------------------------------


@needs_extension
@capability("tensor subclasses: `__torch_dispatch__`")
def test_wrapper_subclasses_pass_through():
    """Parameters and inputs become pairs of tensors; PyTorch's operators compute both halves."""
    halves = [perceptron.make(OURS), perceptron.make(OURS)]
    with torch.no_grad():
        for parameter in halves[1].parameters():
            parameter.mul_(2)
    pair = perceptron.make(OURS)
    for (name, first), second in zip(
        halves[0].named_parameters(), halves[1].parameters(), strict=True
    ):
        owner, _, key = name.rpartition(".")
        both = TwoTensor(first.detach().clone(), second.detach().clone())
        setattr(pair.get_submodule(owner), key, nn.Parameter(both))
    loss = loss_of(pair)
    loss.backward()
    assert isinstance(loss, TwoTensor)
    for half, part in zip(halves, ("a", "b"), strict=True):
        expected = loss_of(half)
        expected.backward()
        assert_close(getattr(loss, part), expected)
        for pair_parameter, parameter in zip(pair.parameters(), half.parameters(), strict=True):
            assert_close(getattr(pair_parameter.grad, part), parameter.grad)
