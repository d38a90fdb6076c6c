"""Drop-in layers and losses: subclasses of PyTorch's whose ``forward`` runs the fused operators.

Parameters, initialisation, ``state_dict`` keys, attributes and ``isinstance`` checks are those of
the parent classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastnn import _containers, functional
from fastnn._dtensor import is_dtensor

__all__ = [
    "MLP",
    "CrossEntropyLoss",
    "Linear",
    "LinearCrossEntropyLoss",
    "LinearReLU",
    "LogSoftmax",
    "NLLLoss",
]

# __call__ is declared for type checkers: in torch a module's call takes and returns anything.


class Linear(torch.nn.Linear):
    r"""``x @ weight.T + bias``; :class:`torch.nn.Linear` with our operator.

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: learn an additive bias (default ``True``).
        device, dtype: of the parameters, as for :class:`torch.nn.Linear`.

    Shape:
        Input ``(*, in_features)``, output ``(*, out_features)``.

    For dtypes and errors see :func:`fastnn.functional.linear`.

    >>> import torch, fastnn
    >>> fastnn.nn.Linear(20, 30)(torch.randn(128, 20)).shape
    torch.Size([128, 30])
    """

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class LinearReLU(torch.nn.Linear):
    r"""``relu(x @ weight.T + bias)`` as one operator: ``Linear`` followed by ``ReLU``.

    A :class:`torch.nn.Linear` in every respect (arguments, parameters, initialisation,
    ``state_dict``), except that its output is clamped at zero.

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: learn an additive bias (default ``True``).
        device, dtype: of the parameters, as for :class:`torch.nn.Linear`.

    Shape:
        Input ``(*, in_features)``, output ``(*, out_features)``.

    For dtypes and errors see :func:`fastnn.functional.linear_relu`.

    >>> import torch, fastnn
    >>> layer = fastnn.nn.LinearReLU(20, 30)
    >>> layer(torch.randn(128, 20)).shape
    torch.Size([128, 30])
    >>> layer
    LinearReLU(in_features=20, out_features=30, bias=True)
    """

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear_relu(input, self.weight, self.bias)


class MLP(torch.nn.Sequential):
    r"""A multilayer perceptron: ``Linear`` layers with ``ReLU`` between them, as one operator.

    A :class:`torch.nn.Sequential` of :class:`torch.nn.Linear` and :class:`torch.nn.ReLU` with its
    keys: state dicts are interchangeable. If a hook observes a value between the layers, or a layer
    has been replaced, parametrized or quantized, they run one by one, as in a model from
    :func:`fastnn.fuse`.

    Args:
        in_features: size of each input row.
        hidden_features: size of the hidden layer, or of each hidden layer.
        out_features: size of each output row.
        bias: whether the layers learn an additive bias (default ``True``).
        device, dtype: of the parameters, as for :class:`torch.nn.Linear`.

    Shape:
        Input ``(*, in_features)``, output ``(*, out_features)``.

    For dtypes and errors see :func:`fastnn.functional.mlp`.

    >>> import torch, fastnn
    >>> model = fastnn.nn.MLP(784, (128, 64), 10)
    >>> model(torch.randn(32, 784)).shape
    torch.Size([32, 10])
    >>> list(fastnn.nn.MLP(784, 128, 10, bias=False).state_dict())
    ['0.weight', '2.weight']
    """

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def __init__(
        self,
        in_features: int,
        hidden_features: int | Sequence[int],
        out_features: int,
        bias: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        hidden: list[int]
        if isinstance(hidden_features, Iterable) and not isinstance(hidden_features, str):
            hidden = [*hidden_features]
        else:
            hidden = [hidden_features]
        _check_sizes("in_features", [in_features])
        _check_sizes("hidden_features", hidden)
        _check_sizes("out_features", [out_features])
        sizes = [in_features, *hidden, out_features]
        layers: list[torch.nn.Module] = []
        for size, next_size in pairwise(sizes):
            layers += [torch.nn.Linear(size, next_size, bias, device, dtype), torch.nn.ReLU()]
        super().__init__(*layers[:-1])

    forward = _containers.run_row

    def __getitem__(self, index: slice | int) -> torch.nn.Module:
        # A slice is a plain Sequential; Sequential's own __getitem__ would call our constructor.
        if isinstance(index, slice):
            return torch.nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What torch.jit.script compiles instead: it only knows PyTorch's own class."""
        return _containers.as_stock(self, torch.nn.Sequential)


def _check_sizes(name: str, sizes: list[Any]) -> None:
    """Raises TypeError for a size that is not an integer."""
    for size in sizes:
        if not hasattr(type(size), "__index__"):
            raise TypeError(f"MLP(): argument '{name}' must be int, but got {size!r}")


class LogSoftmax(torch.nn.LogSoftmax):
    r"""``log(softmax(x))`` along ``dim``; :class:`torch.nn.LogSoftmax` with our operator.

    Args:
        dim: the dimension whose slices are normalised; ``None`` chooses as torch does (deprecated).

    Shape:
        Any shape; the output has the input's shape and dtype.

    For dtypes and errors see :func:`fastnn.functional.log_softmax`.

    >>> import torch, fastnn
    >>> output = fastnn.nn.LogSoftmax(dim=1)(torch.randn(2, 3))
    >>> torch.allclose(output.exp().sum(dim=1), torch.ones(2))
    True
    """

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        # The caller's line is six frames up, past those of torch.nn.Module.
        return functional.log_softmax(input, self.dim, _stacklevel=6)


class _ClassificationLoss:
    """What fastai expects of a classification loss besides ``reduction`` and ``activation``."""

    # Targets are class indices, so MixUp and CutMix mix the losses instead of the targets.
    y_int = True

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, target: Tensor) -> Tensor: ...

    def decodes(self, output: Tensor) -> Tensor:
        """The class of each row: that of the largest output."""
        return output.argmax(_class_dim(output))


def _class_dim(output: Tensor) -> int:
    return 1 if output.dim() > 1 else 0


class NLLLoss(_ClassificationLoss, torch.nn.NLLLoss):
    r"""Negative log likelihood loss; :class:`torch.nn.NLLLoss` with our operator.

    ``activation`` and ``decodes`` turn a model's output into probabilities and classes, for fastai.

    Args:
        weight: ``(C,)`` weight of each class, of the input's dtype (default: 1).
        size_average, reduce: deprecated, as in torch.
        ignore_index: target value of rows to ignore (default -100).
        reduction: ``'none'``, ``'mean'`` (default: over the summed weights of the other rows) or
            ``'sum'``.

    Shape:
        Input ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``, log-probabilities; target ``()``, ``(N)``
        or ``(N, d1, ...)``, class indices; output a scalar, or the target's shape with
        ``reduction='none'``.

    For dtypes and errors see :func:`fastnn.functional.nll_loss`.

    >>> import torch, fastnn
    >>> log_probs = torch.log_softmax(torch.randn(3, 5), dim=1)
    >>> loss = fastnn.nn.NLLLoss()(log_probs, torch.tensor([1, 0, 4]))
    >>> fastnn.nn.NLLLoss().decodes(torch.tensor([[-0.1, -2.4]]))
    tensor([0])
    """

    def activation(self, output: Tensor) -> Tensor:
        """The probabilities of the classes."""
        return output.exp()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


class CrossEntropyLoss(_ClassificationLoss, torch.nn.CrossEntropyLoss):
    r"""Cross entropy of logits and targets as one operator per direction;
    :class:`torch.nn.CrossEntropyLoss` with our operator.

    ``activation`` and ``decodes`` turn a model's output into probabilities and classes, for fastai.

    Args:
        weight: ``(C,)`` weight of each class, of the input's dtype (default: 1).
        size_average, reduce: deprecated, as in torch.
        ignore_index: target value of rows to ignore (default -100); for class indices only.
        reduction: ``'none'``, ``'mean'`` (default) or ``'sum'``.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1] (default 0).

    Shape:
        Input ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``, logits; target ``()``, ``(N)`` or
        ``(N, d1, ...)``, class indices, or the input's shape, class probabilities; output a scalar,
        or one value per row with ``reduction='none'``.

    For dtypes and errors see :func:`fastnn.functional.cross_entropy`.

    >>> import torch, fastnn
    >>> logits = torch.randn(3, 5, requires_grad=True)
    >>> fastnn.nn.CrossEntropyLoss()(logits, torch.tensor([1, 0, 4])).backward()
    >>> logits.grad.shape
    torch.Size([3, 5])
    >>> fastnn.nn.CrossEntropyLoss().activation(torch.zeros(1, 2))
    tensor([[0.5000, 0.5000]])
    """

    def activation(self, output: Tensor) -> Tensor:
        """The probabilities of the classes."""
        return output.softmax(_class_dim(output))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class _StockLinearCrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:class:`torch.nn.LinearCrossEntropyLoss`, for a torch that lacks it."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}"
            )
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(
                f"expected label_smoothing to be in range [0, 1], got {label_smoothing}"
            )
        super().__init__(weight, reduction=reduction, label_smoothing=label_smoothing)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index  # type: ignore[assignment]
        outputs = prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias, device, dtype)
        self.options = options


if TYPE_CHECKING:
    _LinearCrossEntropyLoss = _StockLinearCrossEntropyLoss
else:
    _LinearCrossEntropyLoss = getattr(
        torch.nn, "LinearCrossEntropyLoss", _StockLinearCrossEntropyLoss
    )


class LinearCrossEntropyLoss(_LinearCrossEntropyLoss):
    r"""A classifier's last layer and its loss in one, without ever storing all the logits:
    :class:`torch.nn.LinearCrossEntropyLoss` with our operator.

    The layer is the attribute ``linear``, with the ``state_dict`` keys ``linear.weight`` and
    ``linear.bias``; ``loss.linear(input)`` gives the logits.

    Args:
        in_features: size of each input row.
        num_classes: number of classes, C.
        out_features: sizes ``(d1, ..., dK)`` of a K-dimensional loss (default: none).
        bias: learn an additive bias (default ``False``).
        device, dtype: of the parameters, as for :class:`torch.nn.Linear`.
        reduction: ``'none'``, ``'mean'`` (default) or ``'sum'``.
        weight: ``(C,)`` weight of each class, of the parameters' dtype (default: 1).
        ignore_index: target value of rows to ignore (default -100); for class indices only.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1] (default 0).
        options: torch's choice of chunks; ignored, as none is needed.
        softcap, logit_scale, z_loss: options that torch's class lacks; see
            :func:`fastnn.functional.linear_cross_entropy` (default: unset). They are attributes
            too, to be set on a module that :func:`fastnn.fuse` has converted.

    Shape:
        Input ``(D)`` or ``(*, D)``; target class indices of the rows' shape, or class
        probabilities ``(*, C)``; output a scalar, or one value per row with ``reduction='none'``.

    For dtypes and errors see :func:`fastnn.functional.linear_cross_entropy`.

    >>> import torch, fastnn
    >>> loss = fastnn.nn.LinearCrossEntropyLoss(8, 1000)
    >>> loss(torch.randn(3, 8), torch.tensor([1, 0, 999])).backward()
    >>> loss.linear.weight.grad.shape
    torch.Size([1000, 8])
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    z_loss: float = 0.0

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            out_features=out_features,
            bias=bias,
            device=device,
            dtype=dtype,
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        added = {"softcap": softcap, "logit_scale": logit_scale, "z_loss": z_loss}
        for name, value in added.items():
            if value != getattr(self, name):  # a module without them has torch's attributes alone
                setattr(self, name, value)

    def added_options(self) -> dict[str, float]:
        """The options that are set, of those that torch's class lacks."""
        options = {name: getattr(self, name) for name in ("softcap", "logit_scale", "z_loss")}
        return {
            name: value
            for name, value in options.items()
            if value != getattr(LinearCrossEntropyLoss, name)
        }

    def extra_repr(self) -> str:
        added = (f"{name}={value}" for name, value in self.added_options().items())
        return ", ".join(filter(None, (super().extra_repr(), *added)))

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, target: Tensor) -> Tensor: ...

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        linear_weight: Tensor = self.linear.weight
        linear_bias: Tensor | None = self.linear.bias
        if is_dtensor(linear_weight) and hasattr(self.linear, "unshard"):
            raise RuntimeError(
                "LinearCrossEntropyLoss: its linear is sharded by itself, which gathers the weight "
                "in a forward that the loss doesn't call; fully_shard the LinearCrossEntropyLoss"
            )
        if self.out_features:
            outputs = (self.num_classes, *self.out_features)
            linear_weight = linear_weight.reshape(*outputs, self.linear.in_features)
            linear_bias = None if linear_bias is None else linear_bias.reshape(outputs)
        return functional.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
        )
