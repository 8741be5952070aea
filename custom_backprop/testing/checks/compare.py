"""What the checks share: comparisons that raise :class:`Wrong`, and layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..case import Case, outputs
from ..outcome import NotApplicable, Wrong

#: results of a case in float32 may be off from the truth by this many times the reference's own
#: largest error, plus so many units of rounding of the largest value
TIMES, UNITS = 4, 32


def require(condition: bool, message: str) -> None:
    """Raises :class:`Wrong` unless the condition holds."""
    if not condition:
        raise Wrong(message)


def with_reference(case: Case) -> Case:
    """The case, if it has a reference; else the check does not apply."""
    if case.reference is None:
        raise NotApplicable("no reference was given")
    return case


def not_isolated(case: Case) -> None:
    """The check does not apply to a function that needs copies: they hide whose memory it uses."""
    if case.isolated:
        raise NotApplicable("it overwrites what it gets: every call was given copies")


def outputs_of(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """The call as a function that returns its differentiable outputs alone, in one tuple."""
    return lambda *leaves: outputs(case.call(*leaves))


def same(ours: Any, theirs: Any, what: str) -> None:
    """Requires equal tensors, to rounding of their dtype. None equals zeros."""
    require(len(ours) == len(theirs), f"{what}: {len(ours)} of them for {len(theirs)}")
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            present = b if a is None else a
            require(
                present is None or not present.count_nonzero(),
                f"{what}: one is None, the other is not zero",
            )
            continue
        rtol, atol = 1e-9, 1e-11
        if b.dtype == torch.float32:
            rtol, atol = 0.0, UNITS * torch.finfo(b.dtype).eps * largest(b)
        try:
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as error:
            raise Wrong(f"{what} differ: {error}") from None


def as_reference(
    case: Case, compute: Callable[[Callable[..., Any], Sequence[Tensor]], Any], what: str
) -> None:
    """Requires that ``compute(function, leaves)`` gives the same tensors for ours and for the
    reference.

    A case in float32 has a truth in float64. Its errors may be those of the reference in float32,
    but for :data:`TIMES` and :data:`UNITS`.
    """
    theirs = compute(case.call_reference, case.leaves)
    ours = compute(case.call, case.leaves)
    if case.exact:
        try:
            same(ours, theirs, what)
        except Wrong as error:
            raise Wrong(f"{error}{_hint(ours, theirs)}") from None
        return
    exact = case.to(torch.float64)
    truth = compute(exact.call_reference, exact.leaves)
    require(len(ours) == len(theirs), f"{what}: {len(ours)} of them for {len(theirs)}")
    for our, their, true in zip(ours, theirs, truth, strict=True):
        if our is None or their is None:
            same((our,), (their,), what)
            continue
        require(
            (our.shape, our.dtype) == (their.shape, their.dtype),
            f"{what}: {tuple(our.shape)} of {our.dtype}, expected {tuple(their.shape)} of "
            f"{their.dtype}",
        )
        unit = torch.finfo(our.dtype).eps if our.is_floating_point() else 0.0
        bound = TIMES * _off(their, true) + UNITS * unit * largest(true)
        require(
            _off(our, true) <= bound,
            f"{what} are off the truth by {_off(our, true):.2e}, the reference's by "
            f"{_off(their, true):.2e}",
        )


def _hint(ours: Any, theirs: Any) -> str:
    """Where the largest error is one of float32's rounding, how that is checked."""
    pairs = without_none(ours, theirs) if len(ours) == len(theirs) else []
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        return ""
    worst = max(relative_error(a, b) for a, b in pairs)
    if not 0 < worst < 1e-5:
        return ""
    return (
        "\nThat is as much as float32 rounds: if part of it computes in float32, say dtype=float32"
    )


def _off(value: Tensor, truth: Tensor) -> float:
    """The largest absolute error; infinite where the truth is a number and the value is not."""
    if not truth.numel():
        return 0.0
    value, truth = value.detach().double(), truth.detach().double()
    agree = (value == truth) | (value.isnan() & truth.isnan())
    return torch.where(agree, 0.0, (value - truth).abs().nan_to_num(nan=torch.inf)).max().item()


def largest(t: Tensor) -> float:
    """The largest finite magnitude, 0 if there is none."""
    finite = t.detach().abs()[t.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def equal(ours: Any, theirs: Any, what: str) -> None:
    """Requires equal values of Python."""
    require(ours == theirs, f"{what}: {ours}, expected {theirs}")


def stack(rows: Any) -> tuple[Tensor | None, ...]:
    """Rows of results as one result with a batch dimension."""
    return tuple(
        None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)
    )


def without_none(*results: Any) -> list[tuple[Tensor, ...]]:
    """The results side by side, but for those of which one is None."""
    return [row for row in zip(*results, strict=True) if not any(t is None for t in row)]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The largest error where the truth is finite, over the largest true value."""
    if not truth.numel():
        return 0.0
    finite = truth.isfinite()
    scale = truth[finite].abs().max().item() if finite.any() else 0.0
    difference = torch.where(finite, (value.detach().double() - truth).abs(), 0).max().item()
    return difference / scale if scale else difference


def transposed(t: Tensor) -> Tensor:
    """The same values, stored in the opposite order of dimensions."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def sliced(t: Tensor) -> Tensor:
    """The same values in every second element of a buffer, with NaN between them."""
    if t.dim() == 0:
        return t.clone()
    buffer = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"))
    view = buffer[..., 1::2]
    view.copy_(t)
    return view
