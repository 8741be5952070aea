"""Optimizers: drop-in subclasses of ``torch.optim``'s, whose step updates many parameters at
once."""

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .lion import Lion
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Lion", "RMSprop"]
