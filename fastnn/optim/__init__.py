"""SGD with momentum over all parameters at once, in place of :class:`torch.optim.SGD`."""

from fastnn.optim.sgd import SGD

__all__ = ["SGD"]
