"""linear_cross_entropy: what is specific to it, besides the tests of all operators."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastnn
from fastnn._head_statistics import STATISTICS
from fastnn.functional import linear_cross_entropy, linear_logprobs
from support.bad_calls import as_kernels_raise
from support.marks import needs_extension
from support.oracles import logit_gradient_roundoff
from support.sample_inputs import DTYPES, Draws, on_device

ROWS, FEATURES, CLASSES = 9, 5, 7
IGNORED = 3
EXTRAS = {
    "plain": {},
    "scaled": {"logit_scale": 0.7},
    "capped": {"softcap": 2.0},
    "z_loss": {"z_loss": 0.3},
    "all": {"logit_scale": 0.7, "softcap": 2.0, "z_loss": 0.3},
}
every_extra = pytest.mark.parametrize("extra", EXTRAS)
every_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


def head(rows: int = ROWS, classes: int = CLASSES, dtype=torch.float64) -> tuple[Tensor, ...]:
    """Input, weight and bias, all wanting gradients."""
    draw = Draws(0)
    shapes = (rows, FEATURES), (classes, FEATURES), (classes,)
    return tuple(
        draw.normal(*shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )


def targets(rows: int = ROWS, classes: int = CLASSES) -> Tensor:
    return on_device(torch.arange(rows) % classes)


def class_weights() -> Tensor:
    return on_device(torch.linspace(0.5, 1.5, CLASSES, dtype=torch.float64))


def composite(input, weight, target, bias, *, class_weight=None, reduction="mean", smoothing=0.0,
              ignore_index=-100, softcap=None, logit_scale=1.0, z_loss=0.0) -> Tensor:  # fmt: skip
    """The definition, in float64."""
    logits = F.linear(input, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = logits.log_softmax(-1)
    w = torch.ones_like(log_probs[0]) if class_weight is None else class_weight
    counts = target != ignore_index
    index = target.where(counts, 0)
    losses = -(1 - smoothing) * w[index] * log_probs.gather(1, index.unsqueeze(1)).squeeze(1)
    losses = losses - smoothing / log_probs.shape[1] * (w * log_probs).sum(1)
    losses = (losses + z_loss * logits.logsumexp(1).square()).where(counts, 0)
    if reduction == "none":
        return losses
    return losses.sum() / (w[index].where(counts, 0).sum() if reduction == "mean" else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@every_reduction
@every_extra
def test_values_and_all_three_gradients(extra, reduction, smoothing, dtype):
    tensors = head(dtype=dtype)
    class_weight, target = class_weights().to(dtype), targets()
    options = {"reduction": reduction, "ignore_index": IGNORED, **EXTRAS[extra]}
    x, w, b = tensors
    loss = linear_cross_entropy(
        x, w, target, linear_bias=b, weight=class_weight, label_smoothing=smoothing, **options
    )
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact = composite(
        *(wide[0], wide[1], target, wide[2]),
        class_weight=class_weight.double(), smoothing=smoothing, **options,
    )  # fmt: skip
    factor = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape).to(loss)
    grads = torch.autograd.grad(loss, tensors, factor)
    exact_grads = torch.autograd.grad(exact, wide, factor.double())
    # Sums of fewer than 64 terms of magnitude below 16, in at least float32, and one rounding of
    # each result to its dtype; those of the gradients have 9 terms, which may be rounded before.
    carried = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    of_gradients = carried + 9 * logit_gradient_roundoff(dtype)
    for actual, expected in zip((loss, *grads), (exact, *exact_grads), strict=True):
        assert actual.dtype == dtype
        error = carried if actual is loss else of_gradients
        atol = error * max(1.0, expected.abs().max().item())
        rtol = torch.finfo(dtype).eps
        torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=rtol)


@every_reduction
@pytest.mark.parametrize("ignore_index", [-100, IGNORED])
def test_several_blocks(ignore_index, reduction):
    """On the CPU a block has half of the rows, and 64 at least."""
    rows = 300
    tensors = x, w, b = head(rows)
    options = {"reduction": reduction, "ignore_index": ignore_index}
    loss = linear_cross_entropy(x, w, targets(rows), linear_bias=b, **options)
    exact = composite(x, w, targets(rows), b, **options)
    factor = on_device(torch.linspace(0.5, 2, loss.numel()).double()).reshape(loss.shape)
    grads, exact_grads = (torch.autograd.grad(each, tensors, factor) for each in (loss, exact))
    for actual, expected in zip((loss, *grads), (exact, *exact_grads), strict=True):
        torch.testing.assert_close(actual, expected)


@every_reduction
@every_extra
def test_derivatives_of_both_orders(extra, reduction):
    target, options = targets(), {"reduction": reduction, "ignore_index": IGNORED, **EXTRAS[extra]}

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(
            x, w, target, linear_bias=b, label_smoothing=0.1, weight=class_weights(), **options
        )

    assert gradcheck(loss, head(), fast_mode=True)
    assert gradgradcheck(loss, head(), fast_mode=True)


def test_derivatives_by_class_probabilities_and_weights():
    x, w, b = head()
    probabilities = Draws(1).normal(ROWS, CLASSES, dtype=torch.float64).softmax(1)
    tensors = x, w, probabilities.requires_grad_(), b, class_weights().requires_grad_()

    def loss(x, w, p, b, class_weight):
        return linear_cross_entropy(x, w, p, linear_bias=b, weight=class_weight)

    assert gradcheck(loss, tensors, fast_mode=True)


@every_reduction
def test_transforms(reduction):
    x, w, b = (tensor.detach() for tensor in head())
    target = targets()

    def mine(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction).sum()

    def exact(x: Tensor, w: Tensor) -> Tensor:
        return composite(x, w, target, b, reduction=reduction).sum()

    torch.testing.assert_close(grad(mine, (0, 1))(x, w), grad(exact, (0, 1))(x, w))
    torch.testing.assert_close(hessian(mine, 1)(x, w), hessian(exact, 1)(x, w))
    tangents = (torch.ones_like(x), torch.ones_like(w))
    torch.testing.assert_close(jvp(mine, (x, w), tangents), jvp(exact, (x, w), tangents))
    batch = torch.stack([x, 2 * x])
    torch.testing.assert_close(
        vmap(mine, (0, None))(batch, w), torch.stack([mine(x, w), mine(2 * x, w)])
    )


def test_backward_twice_and_incoming_gradients():
    """The first backward keeps what the second needs, even for an incoming gradient of 1."""
    tensors = head(dtype=torch.float32)
    loss = linear_cross_entropy(tensors[0], tensors[1], targets(), linear_bias=tensors[2])
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    copies = [each.clone() for each in first]
    for each in first:
        each.zero_()
    second = torch.autograd.grad(loss, tensors, torch.tensor(2.0), retain_graph=True)
    third = torch.autograd.grad(loss, tensors)
    for one, two, three in zip(copies, second, third, strict=True):
        assert torch.equal(2 * one, two)
        assert torch.equal(one, three)


def test_a_scaled_loss_brings_small_gradients_of_float16_back():
    """The mean over many rows is rounded after scaling."""
    tensors = head(64, dtype=torch.float16)
    count, scale = 2.0**20, 2.0**12
    loss = linear_cross_entropy(tensors[0], tensors[1], targets(64), normalizer=count)
    actual = torch.autograd.grad(loss.float() * scale, tensors[:2])
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    total = composite(wide[0], wide[1], targets(64), None, reduction="sum")
    exact = torch.autograd.grad(total, wide[:2])
    for mine, theirs in zip(actual, exact, strict=True):
        # Each term has 11 bits; as a multiple of 2^-24 it would have 5 at most.
        errors = (mine.double() - theirs * scale / count).abs().max()
        assert errors <= 2**-9 * theirs.abs().max() * scale / count


def test_small_incoming_gradients_of_float16():
    """One for each row, the largest a few of float16's smallest steps: nothing else is lost."""
    tensors = head(dtype=torch.float16)
    step = 2.0**-24
    losses = linear_cross_entropy(tensors[0], tensors[1], targets(), reduction="none")
    incoming = torch.arange(ROWS).to(losses) * 8 * step
    (actual,) = torch.autograd.grad(losses, tensors[0], incoming)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    losses = composite(wide[0], wide[1], targets(), None, reduction="none")
    (expected,) = torch.autograd.grad(losses, wide[0], incoming.double())
    assert (actual.double() - expected).abs().max() <= 0.55 * step


@every_reduction
def test_ignored_rows_are_not_looked_at(reduction):
    x, w, b = head(dtype=torch.float32)
    target = targets()
    target[::2] = -100
    with torch.no_grad():
        x[::2] = math.nan
    loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
    if not fastnn.is_available():  # PyTorch's operators multiply ignored rows
        return
    grads = torch.autograd.grad(loss.sum(), (x, w, b))
    assert all(each.isfinite().all() for each in (loss, *grads))
    assert (grads[0][::2] == 0).all()


@every_reduction
def test_all_rows_ignored(reduction):
    x, w, _ = head()
    target = torch.full_like(targets(), -100)
    loss = linear_cross_entropy(x, w, target, reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    for each in torch.autograd.grad(loss.sum(), (x, w)):
        assert (each == 0).all()


@needs_extension
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, True, True)]
)
@every_reduction
def test_gradients_that_are_not_wanted_are_not_computed(wanted, reduction):
    tensors = [
        tensor.detach().requires_grad_(wants) for tensor, wants in zip(head(), wanted, strict=True)
    ]
    x, w, b = tensors
    loss = linear_cross_entropy(x, w, targets(), linear_bias=b, reduction=reduction)
    loss.sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == list(wanted)


def test_input_of_any_leading_shape():
    x, w, b = head(12)
    target = targets(12)
    flat = linear_cross_entropy(x, w, target, linear_bias=b, reduction="none")
    shaped = linear_cross_entropy(
        x.reshape(2, 3, 2, FEATURES), w, target.reshape(2, 3, 2), linear_bias=b, reduction="none"
    )
    assert torch.equal(shaped, flat.reshape(2, 3, 2))
    probabilities = Draws(1).normal(2, 6, CLASSES, dtype=torch.float64).softmax(-1)
    mean = linear_cross_entropy(x.reshape(2, 6, FEATURES), w, probabilities, linear_bias=b)
    flat = linear_cross_entropy(x, w, probabilities.flatten(0, 1), linear_bias=b)
    assert torch.equal(mean, flat)


@pytest.mark.parametrize("normalizer", [4, 2.5, torch.tensor(3)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_normalizer_takes_the_counts_place(normalizer, reduction):
    x, w, b = head()
    options = {"linear_bias": b, "z_loss": 0.1}
    normalizer = on_device(normalizer) if isinstance(normalizer, Tensor) else normalizer
    loss = linear_cross_entropy(
        x, w, targets(), reduction=reduction, normalizer=normalizer, **options
    )
    total = linear_cross_entropy(x, w, targets(), reduction="sum", **options)
    torch.testing.assert_close(loss, total / normalizer)
    for mine, exact in zip(
        torch.autograd.grad(loss, (x, w, b)),
        torch.autograd.grad(total / normalizer, (x, w, b)),
        strict=True,
    ):
        torch.testing.assert_close(mine, exact)


@every_extra
def test_returns(extra):
    x, w, b = head()
    target = targets()
    options = {name: value for name, value in EXTRAS[extra].items() if name != "z_loss"}
    output = linear_cross_entropy(
        x, w, target, linear_bias=b, ignore_index=IGNORED, returns=STATISTICS, **EXTRAS[extra]
    )
    logits = F.linear(x, w, b) * options.get("logit_scale", 1)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    log_probs = logits.log_softmax(1)
    counts = target != IGNORED
    expected = {
        "lse": logits.logsumexp(1).where(counts, 0),
        "logprobs": log_probs.gather(1, target.unsqueeze(1)).squeeze(1).where(counts, 0),
        "entropy": -(log_probs.exp() * log_probs).sum(1).where(counts, 0),
        "predictions": logits.argmax(1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(output, name), value)
        if name != "predictions":
            ours, theirs = (
                torch.autograd.grad(each.square().sum(), (x, w, b), retain_graph=True)
                for each in (getattr(output, name), value)
            )
            torch.testing.assert_close(ours, theirs)
    right = (expected["predictions"] == target)[counts]
    assert output.accuracy == right.double().mean()
    only = linear_cross_entropy(x, w, target, returns=("lse",))
    assert only.entropy is None and torch.equal(only.loss, linear_cross_entropy(x, w, target))


def test_derivatives_of_returns():
    def statistics(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        options = {"ignore_index": IGNORED, **EXTRAS["all"]}
        output = linear_cross_entropy(
            x, w, targets(), linear_bias=b, returns=("lse", "logprobs", "entropy"), **options
        )
        return output[1:4]

    assert gradcheck(statistics, head(), fast_mode=True)
    assert gradgradcheck(statistics, head(), fast_mode=True)
    masked = torch.tensor([0.0, -math.inf] + [0.0] * (CLASSES - 2), dtype=torch.float64)
    x, w, _ = head()
    entropy = statistics(x, w, on_device(masked))[2]
    assert all(each.isfinite().all() for each in torch.autograd.grad(entropy.sum(), (x, w)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entropy", [False, True])
def test_logprobs_are_wide(dtype, entropy):
    x, w, b = head(dtype=dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, w, b)]
    result = linear_logprobs(x, w, targets(), linear_bias=b, entropy=entropy)
    logprobs = result.logprobs if entropy else result
    assert logprobs.dtype == torch.promote_types(dtype, torch.float32)
    exact = F.linear(*wide).log_softmax(1).gather(1, targets().unsqueeze(1)).squeeze(1)
    eps = torch.finfo(logprobs.dtype).eps
    torch.testing.assert_close(logprobs.double(), exact, atol=64 * eps, rtol=8 * eps)
    grads = torch.autograd.grad(logprobs.square().sum(), (x, w, b))
    exact_grads = torch.autograd.grad(exact.square().sum(), wide)
    for mine, theirs in zip(grads, exact_grads, strict=True):
        rtol = torch.finfo(dtype).eps
        atol = 64 * rtol * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine.double(), theirs, atol=atol, rtol=rtol)


@needs_extension
@pytest.mark.cpu_only("of the threads")
@every_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_on_any_number_of_threads(dtype, reduction):
    draw = Draws(0)
    x, w, b = (draw.normal(*shape).to(dtype) for shape in ((300, 40), (1200, 40), (1200,)))
    tensors = [each.requires_grad_() for each in (x, w, b)]
    target = on_device(torch.arange(300) * 7 % 1200).masked_fill(
        on_device(torch.arange(300) % 5 == 0), -100
    )
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
            results.append([loss, *torch.autograd.grad(loss.sum(), tensors)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def peak_memory(call) -> int:
    """The most bytes that were allocated at a time, as the profiler counts them."""
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    pieces = sorted(
        (each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"
    )
    return max(accumulate(size for _, size in pieces))


@needs_extension
@pytest.mark.cpu_only("of the processor's memory")
@every_reduction
def test_memory_is_a_part_of_the_logits(reduction):
    rows, features, classes = 1024, 16, 20000
    draw = Draws(0)
    x = draw.normal(rows, features).requires_grad_()
    w = draw.normal(classes, features).requires_grad_()
    target = on_device(torch.arange(rows))

    def loss(**options) -> None:
        loss = linear_cross_entropy(x, w, target, reduction=reduction, **options)
        torch.autograd.grad(loss.sum(), (x, w))

    def statistics() -> None:
        statistics = linear_cross_entropy(x, w, target, returns=STATISTICS)
        torch.autograd.grad(statistics.lse.sum() + statistics.entropy.sum(), (x, w))

    # Half of them, beside the gradients of the two.
    gradients = 2 * (x.nbytes + w.nbytes)
    assert peak_memory(loss) <= rows * classes * 4 / 2 + gradients
    # The statistics' blocks are smaller, of which there are more at a time.
    assert peak_memory(statistics) <= peak_memory(loss)


def test_autocast_multiplies_narrow_and_gives_a_wide_loss():
    x, w, b = head(dtype=torch.float32)
    device = x.device.type
    with torch.autocast(device, torch.bfloat16):
        loss = linear_cross_entropy(x, w, targets(), linear_bias=b)
        stock = F.cross_entropy(F.linear(x, w, b), targets())
    assert loss.dtype == stock.dtype == torch.float32
    narrow = [tensor.detach().bfloat16().double() for tensor in (x, w, b)]
    exact = composite(narrow[0], narrow[1], targets(), narrow[2])
    # The products are not rounded to bfloat16.
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(loss, (x, w, b))
    assert all(each.dtype == torch.float32 for each in grads)


def test_checkpointing():
    x, w, b = head()

    def loss(x, w, b):
        return linear_cross_entropy(x, w, targets(), linear_bias=b)

    plain = torch.autograd.grad(loss(x, w, b), (x, w, b))
    again = torch.autograd.grad(checkpoint(loss, x, w, b, use_reentrant=False), (x, w, b))
    assert all(map(torch.equal, plain, again))


class Refusing(Tensor):
    """A tensor that doesn't know our functions."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__module__.startswith("fastnn"):
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, math.nan])
def test_bad_smoothing_of_tensors_that_torch_serves(smoothing):
    """Torch's function treats a negative number or NaN as 0."""
    x, w, _ = (tensor.detach() for tensor in head(dtype=torch.float32))
    for call in (
        lambda x: linear_cross_entropy(x, w, targets(), label_smoothing=smoothing),
        lambda x: fastnn.functional.cross_entropy(x, targets() % 5, label_smoothing=smoothing),
    ):
        with pytest.raises(RuntimeError, match="label_smoothing must be between"):
            call(x.as_subclass(Refusing))


BAD_CALLS = {
    "input": (TypeError, "input", {"input": [1.0]}),
    "linear_weight": (TypeError, "linear_weight", {"linear_weight": None}),
    "0-d": (RuntimeError, "dimensionality", {"input": torch.tensor(1.0)}),
    "1-d weight": (RuntimeError, "at least 2", {"linear_weight": torch.ones(5)}),
    "in_features": (RuntimeError, "in_features", {"linear_weight": torch.ones(7, 4)}),
    "bias": (RuntimeError, "linear_bias shape", {"linear_bias": torch.ones(6)}),
    "dtype": (RuntimeError, "linear_weight", {"linear_weight": torch.ones(7, 5).double()}),
    "batch": (ValueError, "batch_size", {"target": torch.zeros(4).long()}),
    "target dtype": (RuntimeError, "Long", {"target": torch.zeros(9).int()}),
    "class": (IndexError, "Target 7 is out of bounds", {"target": torch.full((9,), 7)}),
    "weight": (RuntimeError, "weight", {"weight": torch.ones(6)}),
    "reduction": (ValueError, "reduction", {"reduction": "max"}),
    "smoothing": (RuntimeError, "label_smoothing", {"label_smoothing": 1.5}),
    "softcap": (ValueError, "softcap", {"softcap": -1.0}),
    "scale": (ValueError, "logit_scale", {"logit_scale": math.inf}),
    "scale's type": (TypeError, "logit_scale", {"logit_scale": "1"}),
    "normalizer": (ValueError, "normalizer", {"normalizer": 2, "reduction": "none"}),
    "normalizer's shape": (RuntimeError, "normalizer", {"normalizer": torch.ones(2)}),
    "returns": (ValueError, "returns", {"returns": ("logits",)}),
    "ignore_index": (
        RuntimeError,
        "ignore_index",
        {"target": torch.ones(9, 7), "ignore_index": -100},
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    error, says, bad = BAD_CALLS[name]
    error, (says, *_) = as_kernels_raise(error, (says,))
    if name == "class" and torch.get_default_device().type == "cuda":
        return  # the device asserts
    x, w, b = (tensor.detach() for tensor in head(dtype=torch.float32))
    arguments = {"input": x, "linear_weight": w, "target": targets(), "linear_bias": b}
    bad = {
        key: on_device(value) if isinstance(value, Tensor) else value for key, value in bad.items()
    }
    with pytest.raises(error, match=says):
        linear_cross_entropy(**{**arguments, **bad})


def test_the_module_is_the_function():
    module = fastnn.nn.LinearCrossEntropyLoss(
        *(FEATURES, CLASSES), bias=True, dtype=torch.float64, ignore_index=IGNORED, z_loss=0.1
    )
    module.softcap, module.logit_scale = 2.0, 0.5
    assert module.extra_repr().endswith(", softcap=2.0, logit_scale=0.5, z_loss=0.1")
    assert list(module.state_dict()) == ["linear.weight", "linear.bias"]
    x, _, _ = head()
    w, b = module.linear.weight, module.linear.bias
    options = {"ignore_index": IGNORED, "z_loss": 0.1, "softcap": 2.0, "logit_scale": 0.5}
    expected = linear_cross_entropy(x, w, targets(), linear_bias=b, **options)
    assert torch.equal(module(x, targets()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_under_autocast_are_wide(dtype):
    input, weight, target = torch.randn(4, 6), torch.randn(5, 6), torch.arange(4)
    logits = F.linear(input.to(dtype).float(), weight.to(dtype).float())
    with torch.autocast("cpu", dtype):
        result = linear_cross_entropy(input, weight, target, returns=STATISTICS)
    torch.testing.assert_close(result.lse, logits.logsumexp(1))
    assert result.entropy.dtype == torch.float32
    assert torch.equal(result.predictions, logits.argmax(1))
