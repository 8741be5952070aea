"""Drop-in modules: subclasses of the ``torch.nn`` class that override ``forward`` only. One file an op family."""

from .activation import *
from .linear import *
