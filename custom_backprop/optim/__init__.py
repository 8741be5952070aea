"""Optimizers: drop-in subclasses of ``torch.optim``'s, whose step updates many parameters at once."""

from .sgd import SGD

__all__ = ["SGD"]
