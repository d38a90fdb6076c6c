"""Chains of linear layers: arguments of ``mlp``, and the expected results.

The oracle computes in float64 from the exact numbers that the operator gets, and takes each ReLU's
mask from the outputs of the same layers run one by one: a sum that rounds to either side of zero is
right. Its errors propagate from layer to layer like the values, each bounded as in oracles.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

import fastnn
from support.oracles import accumulation_dtype, growth, unit_roundoff
from support.sample_inputs import SEED, Draws


@dataclass(frozen=True)
class Chain:
    """The arguments of ``mlp``."""

    input: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    activations: list[str | None]

    @property
    def tensors(self) -> list[Tensor]:
        """The input, the weights and the existing biases: everything with a gradient."""
        return [self.input, *self.weights, *(b for b in self.biases if b is not None)]

    @property
    def relu(self) -> list[bool]:
        """The activations as the operators take them."""
        return [activation is not None for activation in self.activations]

    def of(self, tensors: Sequence[Tensor]) -> Chain:
        """The same chain with other ``tensors``."""
        rest = iter(tensors)
        input, weights = next(rest), [next(rest) for _ in self.weights]
        biases = [None if bias is None else next(rest) for bias in self.biases]
        return Chain(input, weights, biases, self.activations)

    def as_leaves(self, wanted: Sequence[bool] | None = None) -> Chain:
        """The same memory as leaves; ``wanted`` says which want a gradient (default: all)."""
        flags = wanted or [True] * len(self.tensors)
        leaves = [t.detach().requires_grad_(w) for t, w in zip(self.tensors, flags, strict=True)]
        return self.of(leaves)

    def run(self, function: Callable[..., Tensor] | None = None) -> Tensor:
        """The output of ``mlp``, or of another function with the same arguments."""
        function = function or fastnn.functional.mlp
        return function(self.input, self.weights, self.biases, self.activations)


def layer_by_layer(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str | None],
) -> Tensor:
    """The chain in terms of our operators for single layers."""
    for weight, bias, activation in zip(weights, biases, activations, strict=True):
        layer = fastnn.functional.linear_relu if activation else fastnn.functional.linear
        input = layer(input, weight, bias)
    return input


def stock(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str | None],
) -> Tensor:
    """The chain in terms of PyTorch's functions."""
    for weight, bias, activation in zip(weights, biases, activations, strict=True):
        input = F.linear(input, weight, bias)
        input = F.relu(input) if activation else input
    return input


# ---- samples -------------------------------------------------------------------------------------


def make(
    sizes: Sequence[int],
    batch: Sequence[int],
    *,
    dtype: torch.dtype = torch.float64,
    biases: Sequence[bool] | bool = True,
    activations: Sequence[str | None] | None = None,
    seed: int = SEED,
) -> Chain:
    """Layers of these sizes, scaled so that outputs don't grow from layer to layer."""
    draws, layers = Draws(seed), len(sizes) - 1
    has_bias = [biases] * layers if isinstance(biases, bool) else biases

    def weight(ins: int, outs: int) -> Tensor:
        return (draws.normal(outs, ins) * max(ins, 1) ** -0.5).to(dtype)

    return Chain(
        draws.normal(*batch, sizes[0]).to(dtype),
        [weight(ins, outs) for ins, outs in pairwise(sizes)],
        [
            draws.normal(n).to(dtype) if has else None
            for n, has in zip(sizes[1:], has_bias, strict=True)
        ],
        list(activations or ["relu"] * (layers - 1) + [None]),
    )


def _by_layout(change: Callable[[Tensor], Tensor]) -> Callable[[torch.dtype], Chain]:
    def build(dtype: torch.dtype) -> Chain:
        chain = make((17, 9, 12, 5), (7,), dtype=dtype)
        return chain.of([change(tensor) for tensor in chain.tensors])

    return build


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor


def _sliced(tensor: Tensor) -> Tensor:
    """Every second element of a larger tensor, starting at the second."""
    larger = tensor.new_full([2 * size + 1 for size in tensor.shape], torch.nan)
    view = larger[(slice(1, None, 2),) * tensor.dim()]
    return view.copy_(tensor)


def _expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


SIZES = (17, 9, 12, 5)
SAMPLES: dict[str, Callable[[torch.dtype], Chain]] = {
    "three layers": lambda dtype: make(SIZES, (7,), dtype=dtype),
    # Three blocks of the product's depth; enough rows for several threads.
    "MNIST": lambda dtype: make((784, 128, 64, 10), (64,), dtype=dtype),
    "wide": lambda dtype: make((300, 520, 300), (270,), dtype=dtype, activations=["relu", "relu"]),
    "six layers": lambda dtype: make((4, 8, 4, 8, 4, 8, 4), (3,), dtype=dtype),
    "one layer": lambda dtype: make((17, 9), (7,), dtype=dtype),
    "one layer, relu": lambda dtype: make((17, 9), (7,), dtype=dtype, activations=["relu"]),
    "no bias": lambda dtype: make(SIZES, (7,), dtype=dtype, biases=False),
    "some biases": lambda dtype: make(SIZES, (7,), dtype=dtype, biases=[True, False, True]),
    "relu last": lambda dtype: make(SIZES, (7,), dtype=dtype, activations=["relu"] * 3),
    "no relu": lambda dtype: make(SIZES, (7,), dtype=dtype, activations=[None] * 3),
    "relu first": lambda dtype: make(SIZES, (7,), dtype=dtype, activations=["relu", None, None]),
    "relu second": lambda dtype: make(SIZES, (7,), dtype=dtype, activations=[None, "relu", None]),
    "1-d": lambda dtype: make(SIZES, (), dtype=dtype),
    "3-d": lambda dtype: make(SIZES, (2, 3), dtype=dtype),
    "5-d": lambda dtype: make((5, 4, 3), (2, 1, 3, 2), dtype=dtype),
    "no rows": lambda dtype: make(SIZES, (0,), dtype=dtype),
    "no rows, 3-d": lambda dtype: make(SIZES, (2, 0), dtype=dtype),
    "no input features": lambda dtype: make((0, 9, 5), (7,), dtype=dtype),
    "no hidden features": lambda dtype: make((17, 0, 5), (7,), dtype=dtype),
    "no output features": lambda dtype: make((17, 9, 0), (7,), dtype=dtype),
    "one feature": lambda dtype: make((1, 1, 1), (7,), dtype=dtype),
    "one hidden feature": lambda dtype: make((33, 1, 33), (7,), dtype=dtype),
    "one row": lambda dtype: make((33, 40, 10), (1,), dtype=dtype),
    "transposed": _by_layout(_transposed),
    "sliced": _by_layout(_sliced),
    "expanded": _by_layout(_expanded),
}


# ---- the oracle ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """The exact value and the gradients of ``chain.tensors``, each with its allowed error."""

    value: Tensor
    value_error: Tensor
    grads: list[Tensor]
    grad_errors: list[Tensor]


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def expected(chain: Chain, grad_output: Tensor) -> Expected:
    """Value and gradients, and the error allowed before the last rounding to the dtype."""
    dtype = chain.input.dtype
    u, stored = unit_roundoff(accumulation_dtype(dtype)), unit_roundoff(dtype)
    # Forward: each layer's exact output, and the error of its stored value.
    exact = [_rows(chain.input.detach().double())]
    errors = [torch.zeros_like(exact[0])]
    masks, given = [], chain.input.detach()
    for weight, bias, activation in zip(
        chain.weights, chain.biases, chain.activations, strict=True
    ):
        w = weight.detach().double()
        added = 0.0 if bias is None else bias.detach().double()
        layer = fastnn.functional.linear_relu if activation else fastnn.functional.linear
        given = layer(given, weight.detach(), None if bias is None else bias.detach())
        mask = (_rows(given) > 0) if activation else torch.ones_like(_rows(given), dtype=torch.bool)
        value = exact[-1] @ w.T + added
        magnitude = exact[-1].abs() @ w.abs().T + (0.0 if bias is None else added.abs())
        error = growth(w.shape[1]) * u * magnitude + errors[-1] @ w.abs().T
        # A masked value may be as far from zero as its error.
        exact.append(torch.where(mask, value, 0.0))
        masks.append(mask)
        errors.append(error + stored * (value.abs() + error))
    # Backward.
    grad = _rows(grad_output.double())
    error = torch.zeros_like(grad)
    grads: list[list[Tensor]] = [[], [], []]
    grad_errors: list[list[Tensor]] = [[], [], []]
    for i in reversed(range(len(chain.weights))):
        w = chain.weights[i].detach().double()
        grad, error = grad * masks[i], error * masks[i]
        rows = growth(len(grad)) * u
        grads[1].insert(0, grad.T @ exact[i])
        grad_errors[1].insert(
            0,
            rows * (grad.abs().T @ exact[i].abs())
            + error.T @ exact[i].abs()
            + (grad.abs() + error).T @ errors[i],
        )
        if chain.biases[i] is not None:
            grads[2].insert(0, grad.sum(0))
            grad_errors[2].insert(0, rows * grad.abs().sum(0) + error.sum(0))
        error = growth(len(w)) * u * (grad.abs() @ w.abs()) + error @ w.abs()
        grad = grad @ w
        error = error + stored * (grad.abs() + error)
    shape = chain.input.shape
    grads[0], grad_errors[0] = [grad.reshape(shape)], [error.reshape(shape)]
    output_shape = (*shape[:-1], exact[-1].shape[1])
    return Expected(
        exact[-1].reshape(output_shape),
        errors[-1].reshape(output_shape),
        [grad for group in grads for grad in group],
        [error for group in grad_errors for error in group],
    )
