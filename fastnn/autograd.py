"""The operators under :class:`torch.autograd.Function`-style names: ``LinearReLU.apply(...)``.

The ``torch::autograd::Function`` of each operator lives in C++ (``csrc/autograd/``), where a call
costs least; these names reach it. ``apply`` takes the arguments of the function of the same name
in :mod:`fastnn.functional`.

>>> import torch, fastnn
>>> x = torch.randn(2, 3, requires_grad=True)
>>> fastnn.autograd.LogSoftmax.apply(x, 1).sum().backward()
>>> x.grad.shape
torch.Size([2, 3])
"""

from __future__ import annotations

from fastnn import functional

__all__ = ["CrossEntropy", "LinearReLU", "LogSoftmax", "NLLLoss"]


class LinearReLU:
    """``apply(input, weight, bias=None)``; see :func:`fastnn.functional.linear_relu`.

    >>> import torch, fastnn
    >>> fastnn.autograd.LinearReLU.apply(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
    tensor([[3., 0.]])
    """

    apply = staticmethod(functional.linear_relu)


class LogSoftmax:
    """``apply(input, dim)``; see :func:`fastnn.functional.log_softmax`.

    >>> import torch, fastnn
    >>> fastnn.autograd.LogSoftmax.apply(torch.zeros(2), 0)
    tensor([-0.6931, -0.6931])
    """

    apply = staticmethod(functional.log_softmax)


class NLLLoss:
    """``apply(input, target, weight=None, ...)``; see :func:`fastnn.functional.nll_loss`.

    >>> import torch, fastnn
    >>> fastnn.autograd.NLLLoss.apply(torch.tensor([[-1.0, -2.0]]), torch.tensor([1]))
    tensor(2.)
    """

    apply = staticmethod(functional.nll_loss)


class CrossEntropy:
    """``apply(input, target, weight=None, ...)``; see :func:`fastnn.functional.cross_entropy`.

    >>> import torch, fastnn
    >>> fastnn.autograd.CrossEntropy.apply(torch.zeros(1, 2), torch.tensor([1]))
    tensor(0.6931)
    """

    apply = staticmethod(functional.cross_entropy)
