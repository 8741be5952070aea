"""What autocast makes of each op on a GPU, option by option: the dtypes of stock. The tensors are
fake, which needs no GPU: torch's dispatcher casts them by its lists all the same."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from custom_backprop import functional
from custom_backprop.formulas.activation import ACTIVATIONS
from custom_backprop.ops.activation import stock_of
from custom_backprop.testing.specs.contrastive import info_nce

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="torch was built for no GPU, and would abort the process"
)

REDUCTIONS = [{"reduction": r} for r in ("none", "mean", "sum")]
PARAMETERS = {
    name: {p: 0.5 if default is None else default for p, default in a.parameters.items()}
    for name, a in ACTIVATIONS.items()
}

#: (op, the tensors that it takes first, its options): tensors by their letters, see ``tensors``
CALLS = [
    *((name, "x", options) for name, options in PARAMETERS.items() if name != "gelu_tanh"),
    ("gelu", "x", {"approximate": "tanh"}),
    *(
        ("linear_activation", given, {"activation": name, **o})
        for name, o in PARAMETERS.items()
        for given in ("xw", "xwb")
    ),
    ("linear", "xwb", {}),
    ("prelu", "xr", {}),
    *(
        (name, "xd", {"dtype": dtype})
        for name in ("softmax", "log_softmax", "softmin")
        for dtype in (None, torch.half, torch.double)
    ),
    *(("mse_loss", "xt", {**r, **o}) for r in REDUCTIONS for o in ({}, {"weight": "w"})),
    *(("l1_loss", "xt", {**r, **o}) for r in REDUCTIONS for o in ({}, {"weight": "w"})),
    *(("smooth_l1_loss", "xt", {**r, "beta": beta}) for r in REDUCTIONS for beta in (0.0, 0.3)),
    *(("huber_loss", "xt", {**r, **o}) for r in REDUCTIONS for o in ({}, {"weight": "w"})),
    *(
        ("binary_cross_entropy", "xt", {**r, **o})
        for r in REDUCTIONS
        for o in ({}, {"weight": "k"})
    ),
    *(
        ("binary_cross_entropy_with_logits", "xt", {**r, **o})
        for r in REDUCTIONS
        for o in ({}, {"weight": "k"}, {"pos_weight": "r"})
    ),
    *(
        ("kl_div", "xt", {**r, "log_target": log})
        for r in [*REDUCTIONS, {"reduction": "batchmean"}]
        for log in (False, True)
    ),
    *(
        ("gaussian_nll_loss", "xtv", {**r, "full": full})
        for r in REDUCTIONS
        for full in (False, True)
    ),
    *(
        ("poisson_nll_loss", "xt", {**r, "log_input": a, "full": b})
        for r in REDUCTIONS
        for a, b in product((False, True), repeat=2)
    ),
    *(("nll_loss", "xc", {**r, "weight": weight}) for r in REDUCTIONS for weight in (None, "r")),
    *(
        ("cross_entropy", given, {**r, "weight": weight, "label_smoothing": smoothing})
        for r, given, weight, smoothing in product(
            REDUCTIONS, ("xc", "xt"), (None, "r"), (0.0, 0.1)
        )
    ),
    *(
        ("triplet_margin_loss", "xtw", {**r, "p": p})
        for r in REDUCTIONS
        for p in (1.0, 2.0, 3.0, float("inf"))
    ),
    *(
        ("info_nce", given, {**r, **o})
        for r in REDUCTIONS
        for given, o in (("xt", {}), ("xt", {"symmetric": True}), ("xtw", {}))
    ),
]


def tensors(dtype, other, grad):
    """An input, a target of ``other``, and what stands beside them: numbers between 0 and 1."""
    x, t, w = (0.1 + 0.8 * torch.rand(4, 5, device="cuda", dtype=torch.float64) for _ in range(3))
    w = w.to(dtype).requires_grad_(grad)
    made = {
        "x": x.to(dtype).requires_grad_(grad),
        "t": t.to(other),
        "w": w,
        "b": w[0, :4],
        "k": w.detach(),
        "r": w[0].detach(),
    }
    return {**made, "c": torch.tensor([0, 1, 2, 4], device="cuda"), "d": 1, "v": 0.5}


def stock_linear_activation(x, weight, bias=None, activation="relu", **parameters):
    return stock_of(activation)(F.linear(x, weight, bias), **parameters)


STOCK = {"linear_activation": stock_linear_activation, "info_nce": info_nce}


def outcome(function, given, options, made):
    """The dtype of the result, or that there is none."""
    options = {k: made[v] if k in ("weight", "pos_weight") and v else v for k, v in options.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kl_div's mean
            return function(*[made[letter] for letter in given], **options).dtype
    except RuntimeError:
        return "an error"


@contextmanager
def autocast(lower):
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode():
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would not, without a GPU
        torch.set_autocast_dtype("cuda", lower)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "given", "options"), CALLS, ids=[f"{n} {g} {list(o.values())}" for n, g, o in CALLS]
)
def test_dtypes_are_stocks(name, given, options, lower):
    """Of every dtype, of a target of another, with a gradient and without."""
    halves = (torch.bfloat16, torch.float16)
    for dtype, other in [
        (torch.float64,) * 2,
        (torch.float32,) * 2,
        *((h, h) for h in halves),
        *((h, torch.float32) for h in halves),
    ]:
        for grad in (False, True):
            with autocast(lower):
                made = tensors(dtype, other, grad)
                ours, theirs = (
                    outcome(f, given, options, made)
                    for f in (getattr(functional, name), STOCK.get(name) or stock_of(name))
                )
            assert ours == theirs, (dtype, other, grad)
            assert (ours == "an error") == (name == "binary_cross_entropy")
