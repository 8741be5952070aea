"""Primitives of the pointwise losses: ``<name>_forward`` and ``<name>_backward``, the methods of a ``Loss``.

On a CPU they walk through the tensors in chunks that stay in cache. The formula is a dozen passes, but only over a chunk: memory is read
once and written once, which no chain of operators over whole tensors does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..formulas.loss import LOSSES, MEAN, NONE, SUM, Loss, weighted
from ..formulas.precision import HALF, widen
from .kernels import kernels
from .library import primitive

aten = torch.ops.aten

#: elements of a chunk: 1 MiB of float32, beside which the cost of the calls is small
CHUNK = 2**18


def _l1_loss(x: Tensor, t: Tensor, v: None, k: Tensor, y: Tensor | None, g: Tensor | None) -> None:
    d = torch.sub(x, t, out=y if g is None else g)
    if y is not None:
        torch.abs(d, out=y)
    if g is not None:
        torch.sign(d, out=g).mul_(k)


def _binary_cross_entropy(x: Tensor, t: Tensor, v: None, k: Tensor, y: Tensor | None, g: Tensor | None) -> None:
    if y is not None:
        aten.binary_cross_entropy.out(x, t, None, NONE, out=y)
    if g is not None:
        aten.binary_cross_entropy_backward.grad_input(k, x, t, None, NONE, grad_input=g)


def _fused(value: Callable[..., Any], gradient: Callable[..., Any]) -> Callable[..., None]:
    def fill(x: Tensor, t: Tensor, v: None, k: Tensor, y: Tensor | None, g: Tensor | None, *parameters: float) -> None:
        if y is not None:
            value(x, t, NONE, *parameters, out=y)
        if g is not None:
            gradient(k, x, t, NONE, *parameters, grad_input=g)

    return fill


#: name -> writes l into y and k l_x into g (None: not wanted), where PyTorch has operators that beat the formula on a chunk
FILL: dict[str, Callable[..., None]] = {
    "mse_loss": _fused(aten.mse_loss.out, aten.mse_loss_backward.grad_input),
    "l1_loss": _l1_loss,
    "smooth_l1_loss": _fused(aten.smooth_l1_loss.out, aten.smooth_l1_loss_backward.grad_input),
    "huber_loss": _fused(aten.huber_loss.out, aten.huber_loss_backward.out),
    "binary_cross_entropy": _binary_cross_entropy,
}


def _filler(loss: Loss, x: Tensor, w: Tensor | None) -> Callable[..., None]:
    """Writes w l into y and k w l_x into g: by PyTorch's operators where they fit, else by the formula."""
    if w is None and x.dtype not in HALF and loss.name in FILL:
        fused = FILL[loss.name]
        return lambda x, t, v, w, *rest: fused(x, t, v, *rest)

    def fill(
        x: Tensor, t: Tensor, v: Tensor | None, w: Tensor | None, k: Tensor, y: Tensor | None, g: Tensor | None, *parameters: Any
    ) -> None:
        x, t, v, w = map(widen, (x, t, v, w))
        if y is not None:
            y.copy_(weighted(loss.value(x, t, v, *parameters), w))
        if g is not None:
            torch.mul(weighted(loss.dx(x, t, v, *parameters), w), k, out=g)

    return fill


def _chunks(x: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The tensors, all of the shape of x, cut alike; beside them numbers (0-D) and None stay whole."""
    tensors = (x, *others)
    if x.numel() <= CHUNK:
        yield tensors
        return
    cut = [t if t is not None and t.dim() else None for t in tensors]
    if all(t is None or t.is_contiguous() for t in cut):
        cut = [None if t is None else t.view(-1) for t in cut]
    rows = cut[0].shape[0]  # type: ignore[union-attr]
    step = max(1, CHUNK * rows // x.numel())
    for start in range(0, rows, step):
        yield tuple(t if c is None else c[start : start + step] for t, c in zip(tensors, cut, strict=True))


def _forward_aten(loss: Loss) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(
        x: Tensor, t: Tensor, v: Tensor | None, w: Tensor | None, reduction: int, hold: bool, *parameters: Any
    ) -> tuple[Tensor, Tensor]:
        if x.device.type != "cpu":
            return loss.forward(x, t, v, w, reduction, hold, *parameters)
        n = x.numel()
        wide = torch.float32 if x.dtype in HALF else x.dtype
        k = torch.full((), 1 / max(n, 1) if reduction == MEAN else 1, dtype=wide)
        y = torch.empty_like(x) if reduction == NONE else None
        dx = torch.empty_like(x) if hold else None
        fill, total, scratch = _filler(loss, x, w), 0.0, None
        for xs, ts, vs, ws, ys, gs in _chunks(x, t, v, w, y, dx):
            if y is None and (scratch is None or scratch.shape != xs.shape):
                scratch = torch.empty_like(xs, dtype=wide)
            fill(xs, ts, vs, ws, k, scratch if y is None else ys, gs, *parameters)
            if scratch is not None:
                total += scratch.sum().item()
        if y is None:
            y = x.new_full((), total if reduction == SUM else total / n if n else math.nan)
        return y, x.new_empty(0) if dx is None else dx

    return forward


def _backward_aten(loss: Loss) -> Callable[..., tuple[Tensor, ...]]:
    difference = loss.dt is None

    def backward(
        dy: Tensor, x: Tensor, t: Tensor, v: Tensor | None, w: Tensor | None, reduction: int, needs: list[bool], *parameters: Any
    ) -> tuple[Tensor, ...]:
        if x.device.type != "cpu":
            return loss.backward(dy, x, t, v, w, reduction, needs, *parameters)
        need_x, need_t, need_v, need_w = needs
        k = widen(dy) / x.numel() if reduction == MEAN else widen(dy)
        dx, dt, *_ = grads = _gradients(x, needs)
        filled = dx if need_x else dt if need_t and difference else None
        rest = (False, need_t and not difference, need_v, need_w)
        fill = _filler(loss, x, w)
        for xs, ts, vs, ws, ks, gs, *outs in _chunks(x, t, v, w, k, filled, *(g if r else None for g, r in zip(grads, rest, strict=True))):
            if gs is not None:
                fill(xs, ts, vs, ws, ks, None, gs, *parameters)
            if any(rest):
                for out, grad in zip(outs, loss.backward(ks, xs, ts, vs, ws, SUM, rest, *parameters), strict=True):
                    if out is not None:
                        out.copy_(grad)
        if need_t and filled is not None and difference:
            torch.neg(filled, out=dt)
        return grads

    return backward


def _gradients(x: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    """Room for dx, dt, dv and dw; an empty tensor for each that is not needed."""
    return tuple(torch.empty_like(x) if need else x.new_empty(0) for need in needs)


def _probabilities(run: Callable[..., Any]) -> Callable[..., Any]:
    """Raises RuntimeError on a CPU, as stock does, where an input or target is outside [0, 1]. On a GPU that would wait for it."""

    def checked(x: Tensor, t: Tensor, *rest: Any) -> Any:
        for name, tensor in (("input", x), ("target", t)):
            known = tensor.device.type == "cpu" and not torch._C._functorch.is_batchedtensor(tensor)
            if known and not bool(((tensor >= 0) & (tensor <= 1)).all()):
                raise RuntimeError(f"all elements of {name} should be between 0 and 1")
        return run(x, t, *rest)

    return checked


def _define(loss: Loss) -> tuple[Callable[..., Any], Callable[..., Any]]:
    guard: Callable[..., Any] = _probabilities if loss.name == "binary_cross_entropy" else lambda run: run
    tensors = "Tensor x, Tensor t, Tensor? v, Tensor? w, int reduction"
    parameters = "".join(f", {p}" for p in loss.parameters)

    def fake_forward(x: Tensor, t: Tensor, v: Any, w: Any, reduction: int, hold: bool, *parameters: Any) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x) if reduction == NONE else x.new_empty(())
        return y, torch.empty_like(x) if hold else x.new_empty(0)

    forward = primitive(
        f"{loss.name}_forward({tensors}, bool hold{parameters}) -> (Tensor loss, Tensor dx)",
        formula=guard(loss.forward),
        aten=guard(_forward_aten(loss)),
        triton=guard(lambda *args: kernels("loss").forward(loss.name, *args)),
        fake=fake_forward,
    )
    backward = primitive(
        f"{loss.name}_backward(Tensor dy, {tensors}, bool[] needs{parameters}) -> (Tensor dx, Tensor dt, Tensor dv, Tensor dw)",
        formula=loss.backward,
        aten=_backward_aten(loss),
        triton=lambda *args: kernels("loss").backward(loss.name, *args),
        fake=lambda dy, x, t, v, w, reduction, needs, *parameters: _gradients(x, needs),
    )
    return forward, backward


#: name -> (forward, backward)
primitives = {loss.name: _define(loss) for loss in LOSSES.values()}
