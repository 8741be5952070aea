"""The functions of libdevice, by NumPy and torch.special."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def _by_torch(function: Callable[..., torch.Tensor]) -> Callable[..., np.ndarray]:
    def computed(*args: np.ndarray) -> np.ndarray:
        return function(*(torch.from_numpy(np.array(a)) for a in args)).numpy()

    return computed


def _round(x: np.ndarray) -> np.ndarray:
    """Halves away from zero, as C does."""
    return np.copysign(np.floor(np.abs(x) + 0.5), x)


_special = torch.special

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(np, name)
        for name in (
            "abs", "cbrt", "ceil", "copysign", "cos", "cosh", "exp", "exp2", "expm1", "fabs",
            "floor", "fmod", "hypot", "ldexp", "log", "log10", "log1p", "log2", "nextafter", "rint",
            "sin", "sinh", "sqrt", "tan", "tanh", "trunc",
        )
    },
    "acos": np.arccos,
    "acosh": np.arccosh,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "atanh": np.arctanh,
    "cospi": lambda x: np.cos(np.pi * np.fmod(x, 2)),
    "cyl_bessel_i0": _by_torch(_special.i0),
    "cyl_bessel_i1": _by_torch(_special.i1),
    "div": np.divide,
    "erf": _by_torch(_special.erf),
    "erfc": _by_torch(_special.erfc),
    "erfcx": _by_torch(_special.erfcx),
    "erfinv": _by_torch(_special.erfinv),
    "exp10": lambda x: np.power(x.dtype.type(10), x),
    "fdim": lambda x, y: np.maximum(x - y, 0),
    "fdivide": np.divide,
    "finite": np.isfinite,
    "fma": lambda x, y, z: (x.astype(np.float64) * y + z).astype(x.dtype),
    "ilogb": lambda x: np.frexp(x)[1] - 1,
    "isfinite": np.isfinite,
    "isinf": np.isinf,
    "isnan": np.isnan,
    "j0": _by_torch(_special.bessel_j0),
    "j1": _by_torch(_special.bessel_j1),
    "lgamma": _by_torch(_special.gammaln),
    "llabs": np.abs,
    "llrint": np.rint,
    "llround": _round,
    "logb": lambda x: np.frexp(x)[1] - 1,
    "mul": np.multiply,
    "add": np.add,
    "sub": np.subtract,
    "nearbyint": np.rint,
    "normcdf": _by_torch(_special.ndtr),
    "normcdfinv": _by_torch(_special.ndtri),
    "popc": np.bitwise_count,
    "popcll": np.bitwise_count,
    "pow": np.power,
    "powi": lambda x, n: np.power(x, n.astype(x.dtype)),
    "rcbrt": lambda x: 1 / np.cbrt(x),
    "rcp": np.reciprocal,
    "remainder": lambda x, y: x - y * np.rint(x / y),
    "rhypot": lambda x, y: 1 / np.hypot(x, y),
    "round": _round,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "saturate": lambda x: np.clip(x, 0, 1),
    "signbit": np.signbit,
    "sinpi": lambda x: np.sin(np.pi * np.fmod(x, 2)),
    "tgamma": lambda x: np.exp(_by_torch(_special.gammaln)(x)) * _sign_of_gamma(x),
    "y0": _by_torch(_special.bessel_y0),
    "y1": _by_torch(_special.bessel_y1),
}  # fmt: skip


def _sign_of_gamma(x: np.ndarray) -> np.ndarray:
    return np.where((x < 0) & (np.floor(x) % 2 != 0), -1, 1).astype(x.dtype)


def call_symbol(symbol: str, *args: np.ndarray) -> Any:
    """What libdevice's ``symbol`` gives: ``__nv_tanhf`` is tanh, ``__nv_fast_expf`` exp,
    ``__nv_fsqrt_rn`` sqrt.

    Raises:
        NotImplementedError: nothing here stands for it.
    """
    name = symbol.removeprefix("__nv_").removeprefix("fast_")
    rounds = name[-3:] in ("_rn", "_rz", "_ru", "_rd")
    bare = name[:-3] if rounds else name
    for candidate in (name, name.removesuffix("f"), name.removesuffix("d"), bare, bare[1:]):
        # a name in another rounding is another function
        if candidate in FUNCTIONS and not (rounds and name[-2:] != "rn"):
            return FUNCTIONS[candidate](*args)
    raise NotImplementedError(f"{symbol} of libdevice is not interpreted")
