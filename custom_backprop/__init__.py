from . import functional
from .backends import use_backend, get_backend
