"""Sizes, strides and shared memory, found by search: hypothesis draws them, and shrinks what fails
to the least that still fails."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..case import Case, outputs, same_bits, weights_for
from ..drawn import Call, Source, ViewOf, gradients_for
from ..outcome import NotApplicable, NotOffered, NotRun, Wrong, feature, searched
from .compare import as_reference, same, with_reference

if TYPE_CHECKING:
    from hypothesis.strategies import DataObject

    Result = TypeVar("Result")

#: how many calls each search tries
STRIDES, SHAPES = 30, 40


@searched
def strides(case: Case) -> None:
    """Inputs and grad_output that lie anyhow in memory give the same as contiguous copies of them:
    dimensions in any order, gaps, offsets, expanded dimensions, sliding windows, inputs that share
    memory or are one tensor, sizes of 0 and 1.

    Finds a kernel that takes one stride for another or an offset for 0, and a backward that is
    wrong where two inputs are one. An error is "not offered" if the strides of an input cause it,
    and "wrong" if those of grad_output do, since nobody chooses these. The result has the smallest
    script that repeats it.
    """
    source = _source(case)
    refused: list[NotOffered] = []
    for call, view_of in source.simple():
        try:
            _as_copies(call, view_of)
        except NotOffered as refusal:
            refused.append(refusal)
        except _hypothesis().errors.UnsatisfiedAssumption:
            continue

    def test(data: DataObject) -> None:
        resized = data.draw(_hypothesis().strategies.booleans())
        _as_copies(*source.draw(data, resized=resized, layouts=True))

    def collect(data: DataObject) -> None:
        try:
            test(data)
        except NotOffered as refusal:
            refused.append(refusal)

    refusals = len(refused)
    _search(collect, STRIDES)
    if refused and not refusals:
        _search(test, STRIDES)  # again, to shrink it
    if refused:
        raise refused[0]


@feature
@searched
def shapes(case: Case) -> None:
    """In other sizes than the given ones, values and gradients are the reference's. Dimensions that
    have one size in the inputs have one size in what is drawn. What the reference refuses does not
    count.

    Finds a kernel that is right for some sizes alone, loses its last block, divides by a wrong
    count, or fails where there is nothing. The result has the smallest script that repeats it.
    """
    source = _source(with_reference(case))
    if source.own:
        raise NotApplicable("the reference refuses other values than the given ones")

    def test(data: DataObject) -> None:
        call, view_of = source.draw(data, resized=True, layouts=False)
        drawn, leaves, _ = call.made()
        results = _accepted(lambda: _differentiable(drawn.call_reference(*leaves)))
        call.dys = gradients_for(results, view_of)
        dys = call.made()[2]
        found = _accepted(lambda: _grad(results, leaves, dys))
        if any(_is_nothing_made_nan(t, leaves) for t in (*results, *found)):
            _hypothesis().reject()

        def grads(function: Callable[..., Any], leaves: Sequence[Tensor]) -> Any:
            found = _differentiable(function(*leaves))
            return _grad(found, leaves, [d.to(y) for d, y in zip(dys, found, strict=True)])

        def values(function: Callable[..., Any], leaves: Sequence[Tensor]) -> Any:
            return outputs(function(*leaves))

        try:
            grads(drawn.call, leaves)
        except Exception as error:
            raise NotOffered(_told(error), script=call.script("")) from error
        for compute, what in ((values, "outputs"), (grads, "gradients")):
            try:
                as_reference(drawn, compute, what)
            except Wrong as error:
                script = call.script("reference", backward=compute is grads)
                raise Wrong(str(error), script) from None

    _search(test, SHAPES)


def _as_copies(call: Call, view_of: ViewOf) -> None:
    """One example of :func:`strides`; ``view_of`` gives the views of its gradients."""
    case, leaves, _ = call.copied()
    results = _accepted(lambda: _differentiable(case.call(*leaves)))
    call.dys = gradients_for(results, view_of)
    dys = call.copied()[2]
    expected = call.together(_accepted(lambda: _grad(results, leaves, dys)))
    case, leaves, strided = call.made()
    try:
        found = _differentiable(case.call(*leaves))
        grads = _grad(found, leaves, strided)
    except Exception as error:
        try:
            _grad(_differentiable(case.call(*leaves)), leaves, dys)
        except Exception as refusal:
            raise NotOffered(_told(refusal), script=call.script("")) from refusal
        raise Wrong(f"for this grad_output, {_told(error)}", call.script("")) from error
    try:
        same(found, results, "outputs, and those for contiguous copies,")
    except Wrong as error:
        raise Wrong(str(error), call.script("copies", backward=False)) from None
    try:
        same(grads, expected, "gradients, and those for contiguous copies,")
    except Wrong as error:
        raise Wrong(str(error), call.script("copies")) from None


def _source(case: Case) -> Source:
    """What draws calls like the case."""
    _hypothesis()
    if not case.wanted:
        raise NotApplicable("nothing is differentiated")
    for own in (False, True):
        source = Source(case, own)
        call = source.plain()
        try:
            first, second = (_run(call) for _ in range(2))
        except Exception:
            continue
        if not all(map(same_bits, first, second)):
            raise NotApplicable("its results differ from run to run")
        return source
    raise NotApplicable("it refuses contiguous copies of its inputs")


def _run(call: Call) -> list[Tensor]:
    """Outputs and gradients, by the reference where there is one."""
    case, leaves, _ = call.made()
    if case.reference is not None:
        results = _differentiable(case.call_reference(*leaves))
        _grad(results, leaves, weights_for(results))
    results = _differentiable(case.call(*leaves))
    grads = _grad(results, leaves, weights_for(results))
    return [*results, *(g for g in grads if g is not None)]


def _differentiable(result: Any) -> list[Tensor]:
    return [r for r in outputs(result) if r.requires_grad]


def _is_nothing_made_nan(t: Tensor | None, leaves: Sequence[Tensor]) -> bool:
    """A mean over no elements, say: what of it is right depends on whom one asks."""
    empty = any(not leaf.numel() for leaf in leaves)
    return empty and t is not None and bool(t.isnan().any())


def _grad(results: list[Tensor], leaves: Sequence[Tensor], dys: Sequence[Tensor]) -> Any:
    if not results:
        return (None,) * len(leaves)
    return torch.autograd.grad(results, leaves, dys, allow_unused=True)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _accepted(call: Callable[[], Result]) -> Result:
    """The result of a call. If it raises, what was drawn does not count."""
    try:
        return call()
    except Exception:
        _hypothesis().reject()
        raise


def _hypothesis() -> Any:
    try:
        import hypothesis
    except ImportError:
        raise NotRun(
            "hypothesis is not installed: pip install 'custom_backprop[validate]'"
        ) from None
    return hypothesis


def _search(test: Callable[[DataObject], None], examples: int) -> None:
    """Runs a test of hypothesis."""
    hypothesis = _hypothesis()
    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with _no_files(), _not_nested():
        try:
            settings(hypothesis.given(hypothesis.strategies.data())(test))()
        except hypothesis.errors.Unsatisfiable:
            raise NotApplicable("it refused all that was drawn") from None
        except hypothesis.errors.Flaky as error:
            raise Wrong(f"it fails for some inputs, but not each time: {error}") from error


@contextmanager
def _not_nested() -> Iterator[None]:
    """In a test of the user's own that runs by hypothesis, which refuses a second one inside."""
    from hypothesis.control import _current_build_context

    with _current_build_context.with_value(None):
        yield


@contextmanager
def _no_files() -> Iterator[None]:
    """hypothesis writes what it keeps into a folder that is then removed, unless the user lets it
    write beside their own files already."""
    import hypothesis.configuration as configuration

    if Path(".hypothesis").exists():
        yield
        return
    before = getattr(configuration, "__hypothesis_home_directory", None)
    with tempfile.TemporaryDirectory() as folder:
        configuration.set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(before)
