"""Type checks of the operators' arguments, and torch's older ways to specify them.

Functions call these only if an argument is not of the usual type: at small sizes a call costs as
much as the checks do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastnn._torch import legacy_reduction, softmax_dim


def check_tensor(function: str, name: str, value: object) -> None:
    """Raises what torch's own argument parser raises for an argument that is not a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}"
        )


def _check_number(function: str, name: str, value: object, kind: type) -> None:
    """Raises what torch's own argument parser raises for an argument that is not a number."""
    if not hasattr(type(value), {int: "__index__", float: "__float__"}[kind]):
        raise TypeError(
            f"{function}(): argument '{name}' must be {kind.__name__}, not {type(value).__name__}"
        )


def check_linear_arguments(
    function: str, input: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    """Raises TypeError for an argument of ``linear`` or ``linear_relu`` that is not a tensor."""
    check_tensor(function, "input", input)
    check_tensor(function, "weight", weight)
    if bias is not None:
        check_tensor(function, "bias", bias)


def default_activations(layers: int) -> list[str | None]:
    """A ReLU after each layer of ``mlp`` but the last."""
    return [*["relu"] * (layers - 1), *[None] * bool(layers)]


def mlp_layers(
    weights: list[Tensor],
    biases: list[Tensor | None] | None,
    activations: Sequence[str | None] | None,
) -> tuple[list[Tensor], list[Tensor | None], list[bool]]:
    """The weight, the bias and whether a ReLU follows, for each layer of ``mlp``.

    Raises TypeError for entries that are not tensors, ValueError for lists that don't match.
    """
    biases = [None] * len(weights) if biases is None else biases
    if activations is None:
        activations = default_activations(len(weights))
    if isinstance(activations, str):
        raise TypeError("mlp(): argument 'activations' must be a list of 'relu' and None, not str")
    activations = list(activations)
    for i, weight in enumerate(weights):
        check_tensor("mlp", f"weights[{i}]", weight)
    for i, bias in enumerate(biases):
        if bias is not None:
            check_tensor("mlp", f"biases[{i}]", bias)
    for i, activation in enumerate(activations):
        if activation not in ("relu", None):
            raise ValueError(f"mlp(): activations[{i}] must be 'relu' or None, not {activation!r}")
    if not weights:
        raise ValueError("mlp(): expected weights for at least one layer, but got none")
    for name, values in (("biases", biases), ("activations", activations)):
        if len(values) != len(weights):
            raise ValueError(
                f"mlp(): expected {name} for {len(weights)} layers, one per weight, but got "
                f"{len(values)}"
            )
    return weights, biases, [activation is not None for activation in activations]


def log_softmax_dim(input: Tensor, dim: int | None, stacklevel: int) -> int:
    """The dimension to use; raises TypeError for anything but a number."""
    if dim is None:
        return softmax_dim("log_softmax", input.dim(), stacklevel)
    _check_number("log_softmax", "dim", dim, int)
    return dim


def check_loss_arguments(
    function: str, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> None:
    """Raises TypeError for an argument of a loss that has another type."""
    check_tensor(function, "input", input)
    check_tensor(function, "target", target)
    if weight is not None:
        check_tensor(function, "weight", weight)
    _check_number(function, "ignore_index", ignore_index, int)


def loss_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction to use; raises ValueError for one that is not a string."""
    if size_average is not None or reduce is not None:
        return legacy_reduction(size_average, reduce)
    if type(reduction) is not str:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return reduction


def check_label_smoothing(function: str, label_smoothing: float) -> None:
    """Raises TypeError unless it is a number, RuntimeError outside [0, 1]: torch's own function,
    which serves some tensor classes, treats negative numbers and NaN as 0."""
    _check_number(function, "label_smoothing", label_smoothing, float)
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(
            f"{function}: label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}"
        )


class LinearLossOptions(NamedTuple):
    """The loss's options of ``linear_cross_entropy``, in its operator's order."""

    weight: Tensor | None = None
    reduction: str = "mean"
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    z_loss: float = 0.0
    normalizer: Tensor | float | None = None

    @property
    def ignored(self) -> int:
        """The target value of rows to ignore."""
        return -100 if self.ignore_index is None else self.ignore_index


def check_linear_cross_entropy_arguments(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    options: LinearLossOptions,
) -> None:
    """Raises TypeError for an argument of ``linear_cross_entropy`` that has another type."""
    function = "linear_cross_entropy"
    for name, tensor in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        check_tensor(function, name, tensor)
    for name, optional in (("linear_bias", linear_bias), ("weight", options.weight)):
        if optional is not None:
            check_tensor(function, name, optional)
    if options.ignore_index is not None:
        _check_number(function, "ignore_index", options.ignore_index, int)
    for name in ("softcap", "logit_scale", "z_loss", "normalizer"):
        if (number := getattr(options, name)) is not None:
            _check_number(function, name, number, float)


def check_linear_cross_entropy_shapes(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[int, ...]:
    """Raises RuntimeError, in PyTorch's words, for a linear layer that doesn't match its input.

    Returns:
        The number of classes, followed by the sizes of the positions.
    """
    if input.dim() < 1:
        raise RuntimeError(f"expected input with dimensionality 1 or more, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    outputs = tuple(linear_weight.shape[:-1])
    if linear_bias is not None and linear_bias.shape != outputs:
        raise RuntimeError(f"expected linear_bias shape {outputs}, got {tuple(linear_bias.shape)}")
    if len(outputs) > 1 and input.dim() != 2:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} "
            f"requires batched input, (N, {input.shape[-1]}), got input with shape "
            f"{tuple(input.shape)}"
        )
    return outputs


def check_rows_of_target(target: Tensor, rows: tuple[int, ...], is_index: bool) -> None:
    """Raises unless class indices have the shape of the rows."""
    if not is_index or target.shape == rows:
        return
    if target.dim() == 0 or target.shape[:1] != rows[:1]:
        batch = target.shape[0] if target.dim() else 0
        raise ValueError(
            f"Expected input batch_size ({rows[0]}) to match target batch_size ({batch})."
        )
    raise RuntimeError(f"Expected target size {list(rows)}, got {list(target.shape)}")
