"""What :func:`validate` finds wrong, found again in plain torch: what is not is not reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


def _outputs(result: Any) -> list[Tensor]:
    results = result if isinstance(result, (tuple, list)) else (result,)
    return [r for r in results if isinstance(r, Tensor) and r.is_floating_point()]


def _fresh(inputs: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Copies, in another dtype, that require grad where the inputs do."""
    return [
        x.detach().clone().to(dtype if x.is_floating_point() else x.dtype)
        .requires_grad_(x.requires_grad)
        for x in inputs
    ]  # fmt: skip


def _weights(results: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]


def _gradients(
    function: Function,
    given: Sequence[Tensor],
    layout: Callable[[Tensor], Tensor] = Tensor.clone,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], list[Tensor | None]]:
    xs = _fresh(given, dtype)
    ys = _outputs(function(*[x.clone() for x in xs]))
    leaves = [x for x in xs if x.requires_grad]
    grads = torch.autograd.grad(ys, leaves, [layout(w) for w in _weights(ys)], allow_unused=True)
    return [y.detach() for y in ys], list(grads)


def _off(found: Sequence[Tensor | None], true: Sequence[Tensor | None]) -> float:
    """The largest error, relative to the largest true value; a missing one is zero."""
    worst = 0.0
    for f, t in zip(found, true, strict=True):
        if t is None:
            continue
        f = torch.zeros_like(t) if f is None else f
        error = (f.double() - t.double()).abs().max().item() if t.numel() else 0.0
        worst = max(worst, error / max(t.abs().max().item(), 1e-30)) if error else worst
    return worst


def forward(function: Function, reference: Function, inputs: Sequence[Tensor]) -> str:
    (ys, _), (true, _) = (
        _gradients(function, inputs),
        _gradients(reference, inputs, dtype=torch.float64),
    )
    off = _off(ys, true)
    return f"outputs are off by {off:.1e} of the largest" if off > 1e-5 else ""


def gradient(function: Function, reference: Function, inputs: Sequence[Tensor]) -> str:
    (_, grads), (_, true) = (
        _gradients(function, inputs),
        _gradients(reference, inputs, dtype=torch.float64),
    )
    off = _off(grads, true)
    return f"gradients are off by {off:.1e} of the largest" if off > 1e-5 else ""


def gradgradcheck(function: Function, reference: Function, inputs: Sequence[Tensor]) -> str:
    """The gradient of a weighted sum of gradients, as a gradient penalty needs it."""

    def second(f: Function, dtype: torch.dtype) -> list[Tensor | None]:
        xs = _fresh(inputs, dtype)
        leaves = [x for x in xs if x.requires_grad]
        ys = _outputs(f(*[x.clone() for x in xs]))
        dys = [w.requires_grad_() for w in _weights(ys)]
        grads = torch.autograd.grad(ys, leaves, dys, create_graph=True, allow_unused=True)
        total: Any = sum(
            (g * w).sum() for g, w in zip(grads, _weights(leaves, 2), strict=True) if g is not None
        )
        if not total.requires_grad:
            return [None] * (len(leaves) + len(dys))
        return list(torch.autograd.grad(total, [*leaves, *dys], allow_unused=True))

    off = _off(second(function, torch.float32), second(reference, torch.float64))
    return f"second derivatives are off by {off:.1e} of the largest" if off > 1e-3 else ""


def _transposed(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def _sliced(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def _stride_0(t: Tensor) -> Tensor:
    return t.new_tensor(0.7).expand_as(t)


def _in_order(layout: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    return layout(t).contiguous()


def layouts(function: Function, reference: Function, inputs: Sequence[Tensor]) -> str:
    found = []
    for name, layout in (
        ("transposed", _transposed), ("sliced", _sliced), ("stride-0", _stride_0),
    ):  # fmt: skip
        _, grads = _gradients(function, inputs, layout)
        _, same = _gradients(function, inputs, partial(_in_order, layout))
        if (off := _off(grads, same)) > 1e-5:
            found.append(f"{name} ({off:.1e} of the largest)")
    return f"gradients differ where grad_output is {', '.join(found)}" if found else ""


def input_layouts(function: Function, reference: Function, inputs: Sequence[Tensor]) -> str:
    found = []
    for name, layout in (("transposed", _transposed), ("sliced", _sliced)):

        def laid(*xs: Tensor, layout: Any = layout) -> Any:
            return function(*[layout(x) if x.is_floating_point() else x for x in xs])

        ys, grads = _gradients(laid, inputs)
        same, same_grads = _gradients(function, inputs)
        if (off := max(_off(ys, same), _off(grads, same_grads))) > 1e-5:
            found.append(f"{name} ({off:.1e} of the largest)")
    return f"results differ where inputs are {', '.join(found)}" if found else ""


def inputs_unchanged(function: Function, reference: Function, inputs: Sequence[Tensor]) -> str:
    xs = _fresh(inputs)
    ys = _outputs(function(*xs))
    dys = _weights(ys)
    torch.autograd.grad(ys, [x for x in xs if x.requires_grad], dys, allow_unused=True)
    given = [(f"input {i}", x, x0) for i, (x, x0) in enumerate(zip(xs, inputs, strict=True))]
    given += [
        (f"grad_output {i}", dy, dy0)
        for i, (dy, dy0) in enumerate(zip(dys, _weights(ys), strict=True))
    ]
    found = [(n, t._version) for n, t, t0 in given if not torch.equal(t.detach(), t0.detach())]
    if not found:
        return ""
    moved = "" if any(v for _, v in found) else "; autograd's version counter does not move"
    return f"{', '.join(n for n, _ in found)} overwritten{moved}"


def two_backwards(function: Function, reference: Function, inputs: Sequence[Tensor]) -> str:
    xs = _fresh(inputs)
    ys = _outputs(function(*[x.clone() for x in xs]))
    leaves = [x for x in xs if x.requires_grad]

    def grads() -> list[Tensor | None]:
        found = torch.autograd.grad(ys, leaves, _weights(ys), retain_graph=True, allow_unused=True)
        return [None if g is None else g.clone() for g in found]

    try:
        first = grads()
        off = _off(grads(), first)
    except RuntimeError:
        return ""
    return f"a second backward is off by {off:.1e} of the largest" if off > 1e-6 else ""


def subsets(function: Function, reference: Function, inputs: Sequence[Tensor]) -> str:
    """Each input alone requires grad."""
    found = []
    for i, x in enumerate(inputs):
        if not x.requires_grad:
            continue
        alone = [t.detach().requires_grad_(t is x) for t in inputs]
        (_, grads), (_, true) = (
            _gradients(function, alone),
            _gradients(reference, alone, dtype=torch.float64),
        )
        if _off(grads, true) > 1e-5:
            found.append(f"input {i} ({'missing' if grads[0] is None else 'wrong'})")
    return f"the gradient differs where it is the only one, of {', '.join(found)}" if found else ""


#: check -> the same by hand
BY_HAND: dict[str, Callable[[Function, Function, Sequence[Tensor]], str]] = {
    f.__name__: f
    for f in (
        forward, gradient, gradgradcheck, layouts, input_layouts, inputs_unchanged, two_backwards,
        subsets,
    )
}  # fmt: skip
