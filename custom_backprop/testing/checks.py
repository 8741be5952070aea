"""The checks of :func:`validate`. Each is a function of one :class:`Case`, and raises
AssertionError with what it found.

A check that does not apply to a case raises :class:`NotApplicable` with the reason.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck as torch_gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .case import Case, gradients, outputs, weights_for
from .sweep import HALVES, every_value, units_off, value_and_derivative, worst_by_binade


class NotApplicable(Exception):
    """The check does not apply to this case."""


class Skipped(Exception):
    """What the check ran was right, but this machine cannot run all of it."""


def forward(case: Case) -> None:
    """Same values, shapes and dtypes as the reference, in float64."""
    leaves = _with_reference(case).leaves
    ours, theirs = case.call(*leaves), case.call_reference(*leaves)
    _same(outputs(ours), outputs(theirs), "outputs")
    mine, others = (
        [t for t in tree_leaves(r) if isinstance(t, Tensor) and not t.is_floating_point()]
        for r in (ours, theirs)
    )
    _same(mine, others, "outputs that are not floating-point")


def gradient(case: Case) -> None:
    """Same gradients as autograd gives for the reference, in float64, for random gradients of the
    outputs."""
    leaves = _with_reference(case).leaves
    ours, theirs = gradients(case.call, leaves)[1], gradients(case.call_reference, leaves)[1]
    _same(ours, theirs, "gradients")


def gradcheck(case: Case) -> None:
    """torch.autograd.gradcheck, undefined gradients included."""
    torch_gradcheck(_outputs_of(case), case.leaves, check_undefined_grad=True)


def gradgradcheck(case: Case) -> None:
    """gradcheck of the gradients; an op without a second derivative must raise, not be silently
    wrong.

    torch.autograd.gradgradcheck ignores every gradient that does not require grad, but that is what
    a cut graph looks like. Here such a gradient is a constant, and its derivative is compared with
    the numerical one, like any other.
    """
    leaves = case.leaves
    dys = tuple(d.requires_grad_() for d in weights_for(outputs(case.call(*leaves))))

    def second(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves, dys = inputs[: len(case.wanted)], inputs[len(case.wanted) :]
        grads = gradients(case.call, leaves, dys, create_graph=True)[1]
        return tuple(
            g if g.requires_grad else g + 0 * leaf
            for g, leaf in zip(grads, leaves, strict=True)
            if g is not None
        )

    if case.double_backward:
        torch_gradcheck(second, (*leaves, *dys), check_undefined_grad=False)
        return
    results = second(*leaves, *dys)
    try:
        torch.autograd.backward(
            results, weights_for(results)
        )  # runs every node, even if it is cut off from the leaves
    except RuntimeError:
        return
    raise AssertionError("an op without a second derivative gave one")


def forward_mode(case: Case) -> None:
    """gradcheck of the jvp."""
    torch_gradcheck(
        _outputs_of(case),
        case.leaves,
        check_forward_ad=True,
        check_backward_ad=False,
        check_undefined_grad=False,
    )


def batched(case: Case) -> None:
    """is_grads_batched=True, once and twice, equals a loop."""
    leaves = case.leaves
    results = outputs(case.call(*leaves))
    dys = [weights_for(results, seed) for seed in (1, 2, 3)]
    stacked = tuple(torch.stack(d) for d in zip(*dys, strict=True))
    loop = [
        torch.autograd.grad(results, leaves, d, retain_graph=True, allow_unused=True) for d in dys
    ]
    together = torch.autograd.grad(
        results, leaves, stacked, is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    _same(together, _stack(loop), "batched gradients")
    if not case.double_backward:
        return
    grads = torch.autograd.grad(results, leaves, dys[0], create_graph=True, allow_unused=True)
    second = tuple(g for g in grads if g is not None and g.requires_grad)
    if not second:
        return
    weights = [weights_for(second, seed) for seed in (4, 5)]
    loop = [
        torch.autograd.grad(second, leaves, w, retain_graph=True, allow_unused=True)
        for w in weights
    ]
    stacked = tuple(torch.stack(w) for w in zip(*weights, strict=True))
    together = torch.autograd.grad(
        second, leaves, stacked, is_grads_batched=True, allow_unused=True
    )
    _same(together, _stack(loop), "batched second gradients")


def transforms(case: Case) -> None:
    """vmap over each leaf and over all, per-sample gradients, jacrev against jacfwd, and the
    hessian, against loops and the reference."""
    leaves = tuple(leaf.detach() for leaf in case.leaves)
    if not leaves:
        raise NotApplicable("nothing is differentiated")
    if not all(leaf.numel() for leaf in leaves):
        raise NotApplicable("torch.func's jacobians do not take empty tensors")
    which = tuple(range(len(leaves)))

    def loss(function: Callable[..., Any]) -> Callable[..., Tensor]:
        weights = weights_for(outputs(function(*leaves)))

        def weighted(*args: Tensor) -> Tensor:
            return sum(
                (r * w).sum() for r, w in zip(outputs(function(*args)), weights, strict=True)
            )  # type: ignore[return-value]

        return weighted

    ours = loss(case.call)
    batch = tuple(torch.stack([leaf, leaf * 0.9, leaf * 0.8]) for leaf in leaves)
    singles = [(i,) for i in which] if len(which) > 1 else []
    for mapped, dim in [*((m, 0) for m in singles), (which, 0), (which, -1)]:
        in_dims = tuple(dim if i in mapped else None for i in which)
        args = tuple(
            b.movedim(0, dim) if i in mapped else leaf
            for i, (b, leaf) in enumerate(zip(batch, leaves, strict=True))
        )
        rows = [
            tuple(
                b[k] if i in mapped else leaf
                for i, (b, leaf) in enumerate(zip(batch, leaves, strict=True))
            )
            for k in range(3)
        ]
        results = torch.vmap(_outputs_of(case), in_dims)(*args)
        _same(
            results,
            _stack([outputs(case.call(*row)) for row in rows]),
            f"vmap over dimension {dim} of {mapped}",
        )
        per_sample = torch.vmap(torch.func.grad(ours, which), in_dims)(*args)
        _same(
            per_sample,
            _stack([torch.func.grad(ours, which)(*row) for row in rows]),
            f"per-sample gradients over {mapped}",
        )
    reverse = torch.func.jacrev(_outputs_of(case), which)(*leaves)
    forward_ = torch.func.jacfwd(_outputs_of(case), which)(*leaves)
    for r, f in zip(reverse, forward_, strict=True):
        _same(r, f, "jacrev and jacfwd")
    if case.double_backward:
        hessian = torch.func.hessian(ours, which)(*leaves)
        expected = (
            torch.func.hessian(loss(case.call_reference), which)(*leaves)
            if case.reference
            else None
        )
        for i, j in itertools.product(which, which):
            _same(
                (hessian[i][j],),
                (hessian[j][i].permute(_swap(leaves[i], leaves[j])),),
                "hessian and its transpose",
            )
            if expected is not None:
                _same((hessian[i][j],), (expected[i][j],), "hessian")


def opcheck(case: Case) -> None:
    """torch.library.opcheck on every custom operator that forward and backward call."""
    with Recorder() as recorder:
        gradients(case.call, case.leaves)
    if not recorder.calls:
        raise NotApplicable("no custom operator is called")
    for operator, args, kwargs in recorder.calls.values():
        torch.library.opcheck(operator, args, kwargs)


def compile(case: Case) -> None:
    """torch.compile(fullgraph=True) gives eager's outputs and gradients, and also its outputs if no
    gradient is needed."""
    leaves = case.leaves
    expected, expected_grads = gradients(case.call, leaves)
    compilable = case.inductor and cpp_compiler() is not None
    for backend in ("aot_eager", "inductor") if compilable else ("aot_eager",):
        torch._dynamo.reset()
        compiled = torch.compile(case.call, fullgraph=True, backend=backend)
        results, grads = gradients(compiled, leaves)
        _same(results, expected, f"outputs compiled by {backend}")
        _same(grads, expected_grads, f"gradients compiled by {backend}")
        _same(
            outputs(compiled(*(leaf.detach() for leaf in leaves))),
            expected,
            f"outputs compiled by {backend} without gradients",
        )
    if case.inductor and not compilable:
        raise Skipped("Inductor, which needs a C++ compiler (set CXX)")


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would use on a CPU, or None if none works."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def layouts(case: Case) -> None:
    """Every layout of grad_output: contiguous, transposed, sliced, stride 0, None."""
    leaves = case.leaves
    results = outputs(case.call(*leaves))
    dys = weights_for(results)
    expected = torch.autograd.grad(results, leaves, dys, retain_graph=True, allow_unused=True)
    for name, layout in (("transposed", transposed), ("sliced", sliced)):
        grads = torch.autograd.grad(
            results, leaves, [layout(d) for d in dys], retain_graph=True, allow_unused=True
        )
        _same(grads, expected, f"gradients for a {name} grad_output")
    uniform = [d.new_tensor(0.7).expand_as(d) for d in dys]
    grads = torch.autograd.grad(results, leaves, uniform, retain_graph=True, allow_unused=True)
    expected = torch.autograd.grad(
        results, leaves, [u.contiguous() for u in uniform], retain_graph=True, allow_unused=True
    )
    _same(grads, expected, "gradients for a stride-0 grad_output")
    undefined: Any = [torch._C._functions.UndefinedGrad()(r) for r in results]
    for grad in torch.autograd.grad(undefined, leaves, dys, allow_unused=True):
        _require(
            grad is None or not grad.count_nonzero(),
            "a gradient came from an undefined grad_output",
        )


def input_layouts(case: Case) -> None:
    """Transposed, sliced and expanded inputs give the same as contiguous ones."""
    leaves = case.leaves
    results, grads = gradients(case.call, leaves)
    for name, layout in (("transposed", transposed), ("sliced", sliced)):
        strided = tuple(layout(leaf.detach()).requires_grad_() for leaf in leaves)
        got, got_grads = gradients(case.call, strided)
        _same(got, results, f"outputs for {name} inputs")
        _same(got_grads, grads, f"gradients for {name} inputs")
    repeated = [
        leaf.detach()[:1].expand_as(leaf) if leaf.dim() and leaf.numel() else leaf.detach()
        for leaf in leaves
    ]
    (got, got_grads), (results, grads) = (
        gradients(case.call, [f(r).requires_grad_() for r in repeated])
        for f in (Tensor.detach, torch.clone)
    )
    _same(got, results, "outputs for expanded inputs")
    _same(got_grads, grads, "gradients for expanded inputs")


def inputs_unchanged(case: Case) -> None:
    """No input and no grad_output is overwritten: same bits, same version."""
    leaves = case.leaves
    results = outputs(case.call(*leaves))
    dys = weights_for(results)
    tensors = [
        a for a in (*case._fill(leaves), *case.kwargs.values(), *dys) if isinstance(a, Tensor)
    ]
    before = [(t.detach().clone(), t._version) for t in tensors]
    torch.autograd.grad(outputs(case.call(*leaves)), leaves, dys, allow_unused=True)
    torch.autograd.grad(results, leaves, dys, allow_unused=True)
    for t, (copy, version) in zip(tensors, before, strict=True):
        _require(
            _bits(t, copy) and t._version == version,
            f"a tensor of shape {tuple(t.shape)} was written",
        )


def two_backwards(case: Case) -> None:
    """A second backward through a retained graph gives the same bits, even if the first gradients
    were overwritten."""
    leaves = case.leaves
    results = outputs(case.call(*leaves))
    dys = weights_for(results)
    for weights in (dys, tuple(map(torch.ones_like, dys))):
        first = torch.autograd.grad(
            results, leaves, [w.clone() for w in weights], retain_graph=True, allow_unused=True
        )
        expected = [None if g is None else g.clone() for g in first]
        for g in first:
            if g is not None and not any(
                s == 0 for s in g.stride()
            ):  # an expanded tensor cannot be overwritten
                g.mul_(3)
        second = torch.autograd.grad(
            results, leaves, [w.clone() for w in weights], retain_graph=True, allow_unused=True
        )
        for a, b in zip(expected, second, strict=True):
            _require(
                (a is None) == (b is None) and (a is None or _bits(a, b)),
                "the second backward gave different bits",
            )


def freed(case: Case) -> None:
    """Outputs are freed with their last reference. A cycle through the context would let them live
    until the garbage collector runs."""
    leaves = case.leaves
    collecting = gc.isenabled()
    gc.disable()
    try:
        results = outputs(case.call(*leaves))
        watched = [weakref.ref(r) for r in results]
        torch.autograd.grad(results, leaves, weights_for(results), allow_unused=True)
        del results
        _require(
            not any(w() is not None for w in watched),
            "an output outlives its last reference: a reference cycle",
        )
    finally:
        if collecting:
            gc.enable()


def subsets(case: Case) -> None:
    """For every subset of the inputs that require grad, their gradients are right and there are no
    others."""
    leaves = case.leaves
    dys = weights_for(outputs(case.call(*leaves)))
    full = gradients(case.call, leaves, dys)[1]
    for size in range(len(leaves)):
        for chosen in itertools.combinations(range(len(leaves)), size):
            some = tuple(leaf.detach().requires_grad_(i in chosen) for i, leaf in enumerate(leaves))
            results = outputs(case.call(*some))
            attached = [r for r in results if r.requires_grad]
            _require(bool(chosen or not attached), "an output requires grad, and no input does")
            if attached:
                weights = [d for r, d in zip(results, dys, strict=True) if r.requires_grad]
                torch.autograd.backward(attached, weights)
            for i, (leaf, expected) in enumerate(zip(some, full, strict=True)):
                _require(
                    (leaf.grad is not None) == (i in chosen and expected is not None),
                    f"inputs {chosen}: gradient of input {i}",
                )
                if i in chosen and expected is not None:
                    _same(
                        (leaf.grad,),
                        (expected,),
                        f"gradient of input {i} with only {chosen} wanted",
                    )


def autocast(case: Case) -> None:
    """Under autocast results have the reference's dtypes and are as near to float64's, plus one
    unit of rounding. Gradients have the dtypes of their inputs."""
    _with_reference(case)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(case.device.type, torch.bfloat16):
            try:
                outputs(case.to(dtype).call_reference(*case.to(dtype).leaves))
            except (RuntimeError, NotImplementedError) as error:
                _raises(type(error), case.to(dtype))
                continue
        _no_worse(case, dtype, _errors_under_autocast, f"of {dtype} inputs under autocast")


def precision(case: Case) -> dict[str, tuple[float, float]]:
    """In each low-precision dtype, the error against float64 is no larger than the reference's own
    plus one unit of rounding. An elementwise function gets every 16-bit number in [-10, 10].

    Returns:
        dtype name -> (our error, the reference's), the largest over outputs and gradients, relative
        to the largest true value.
    """
    _with_reference(case)
    figures = {}
    for dtype in case.low_precision:
        given = case
        if case.elementwise and dtype in HALVES:
            x = every_value(dtype, case.device)
            given = case.at(x[x.abs() <= 10])
        errors = _no_worse(given, dtype, _errors, f"in {dtype}")
        figures[str(dtype).removeprefix("torch.")] = (
            max(ours for ours, _, _ in errors),
            max(theirs for _, theirs, _ in errors),
        )
    return figures


#: an error may exceed the reference's largest in the same binade by this many units in the last
#: place: both are rounded once, from results that differ by a few units of float32
HAIR = 0.05


def sweep(case: Case) -> None:
    """For an elementwise function of one tensor, at every 16-bit number: value and derivative are
    as near to float64's as the reference's in that dtype, and finite where they are.

    Errors are in units in the last place. Each is compared with the reference's largest error for
    inputs of the same sign and exponent: ours may be inaccurate only where the reference is.
    """
    _with_reference(case)
    if not case.elementwise:
        raise NotApplicable("not declared to be elementwise in one tensor")
    for dtype in case.low_precision:
        if dtype not in HALVES:
            continue
        x = every_value(dtype, case.device)
        truth = value_and_derivative(case.call_reference, x.double())
        theirs = value_and_derivative(case.call_reference, x)
        ours = value_and_derivative(case.call, x)
        for what, our, their, true in zip(
            ("value", "derivative"), ours, theirs, truth, strict=True
        ):
            off, stock = units_off(our, true), units_off(their, true)
            # torch's own derivatives at NaN differ between its vectorised loops and their last
            # elements; where stock's derivative is NaN, ours may be a number
            judged = stock.isfinite() & ~((x.isnan() | true.isnan()) & (what == "derivative"))
            off, stock = (torch.where(judged, e, 0.0) for e in (off, stock))
            limit = worst_by_binade(x, stock)
            excess = off - limit
            worst = excess.argmax()
            _require(
                bool(excess[worst] <= HAIR),
                f"the {what} in {dtype} at {x[worst].item()!r} is {our[worst].item()!r}, off by "
                f"{off[worst]:.3g} units, the reference's around there by at most "
                f"{limit[worst]:.3g}; so at {(excess > HAIR).sum()} of {len(x)} inputs",
            )


#: how many inputs near those of a case are drawn
DRAWS = 16

#: (our error, the reference's, by how much ours may exceed it) for each output and gradient
Errors = list[tuple[float, float, float]]


def _no_worse(
    case: Case, dtype: torch.dtype, errors_of: Callable[[Case], Errors], where: str
) -> Errors:
    """Requires that our error exceeds the reference's by no more than allowed. The rounding of a
    few numbers is random: if one draw fails, the means over :data:`DRAWS` draws decide."""
    errors = errors_of(case.to(dtype))
    if any(our > their + allowed for our, their, allowed in errors):
        draws = [errors_of(case.nudged(seed).to(dtype)) for seed in range(DRAWS)]
        errors = [
            (
                sum(our for our, _, _ in of_one) / DRAWS,
                sum(their for _, their, _ in of_one) / DRAWS,
                of_one[0][2],
            )
            for of_one in zip(*draws, strict=True)
        ]
    for our, their, allowed in errors:
        _require(
            our <= their + allowed, f"error {where}: ours {our:.2e}, the reference's {their:.2e}"
        )
    return errors


def _errors(case: Case) -> Errors:
    exact = case.to(torch.float64)
    dys = weights_for(outputs(case.call_reference(*case.leaves)))
    truth = gradients(exact.call_reference, exact.leaves, [d.double() for d in dys])
    ours = gradients(case.call, case.leaves, dys)
    theirs = gradients(case.call_reference, case.leaves, dys)
    found = [
        row for parts in zip(ours, theirs, truth, strict=True) for row in _without_none(*parts)
    ]
    _equal(
        [o.dtype for o, _, _ in found],
        [t.dtype for _, t, _ in found],
        "dtypes of results in low precision",
    )
    dtype = case.leaves[0].dtype if case.leaves else found[0][0].dtype
    allowed = torch.finfo(dtype).eps
    return [(_error(o, e), _error(t, e), allowed) for o, t, e in found]


def _errors_under_autocast(case: Case) -> Errors:
    exact, leaves, others = case.to(torch.float64), case.leaves, case.leaves
    with torch.autocast(case.device.type, torch.bfloat16):
        results, expected = outputs(case.call(*leaves)), outputs(case.call_reference(*others))
    _equal([r.dtype for r in results], [e.dtype for e in expected], "output dtypes under autocast")
    dys = weights_for(expected)
    grads = torch.autograd.grad(results, leaves, dys, allow_unused=True)
    expected_grads = torch.autograd.grad(expected, others, dys, allow_unused=True)
    for grad, leaf in zip(grads, leaves, strict=True):
        _require(
            grad is None or grad.dtype == leaf.dtype,
            f"a gradient under autocast is {grad is not None and grad.dtype} of {leaf.dtype}",
        )
    truth, true_grads = gradients(exact.call_reference, exact.leaves, [d.double() for d in dys])
    coarsest = max(torch.finfo(r.dtype).eps for r in expected)
    found = []
    for ours, theirs, trues, least in (
        (results, expected, truth, 0.0),
        (grads, expected_grads, true_grads, coarsest),
    ):
        for our, their, true in _without_none(ours, theirs, trues):
            allowed = max(torch.finfo(our.dtype).eps, least)
            found.append((_error(our, true), _error(their, true), allowed))
    return found


#: every check, in the order in which they run
CHECKS: dict[str, Callable[[Case], Any]] = {
    c.__name__: c
    for c in (
        forward, gradient, gradcheck, gradgradcheck, forward_mode, batched, transforms, opcheck,
        compile, layouts, input_layouts, inputs_unchanged, two_backwards, freed, subsets, autocast,
        precision, sweep,
    )
}  # fmt: skip


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


class Recorder(TorchDispatchMode):
    """Records one call of each operator that does not belong to PyTorch."""

    STOCK = frozenset(
        {"aten", "prim", "prims", "higher_order", "inductor", "profiler", "_c10d_functional"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in self.STOCK:
            detached = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            self.calls.setdefault(func, (func, detached, kwargs))
        return func(*args, **kwargs)


def _require(condition: bool, message: str) -> None:
    """An assert that ``python -O`` does not remove."""
    if not condition:
        raise AssertionError(message)


def _with_reference(case: Case) -> Case:
    if case.reference is None:
        raise NotApplicable("no reference was given")
    return case


def _outputs_of(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """The call as a function that returns its differentiable outputs alone, in one tuple."""
    return lambda *leaves: outputs(case.call(*leaves))


def _raises(error: type[Exception], case: Case) -> None:
    try:
        case.call(*case.leaves)
    except error:
        return
    raise AssertionError(f"the reference raises {error.__name__}, ours does not")


def _same(ours: Any, theirs: Any, what: str) -> None:
    _require(len(ours) == len(theirs), f"{what}: {len(ours)} of them for {len(theirs)}")
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            present = b if a is None else a
            _require(
                present is None or not present.count_nonzero(),
                f"{what}: one is None, the other is not zero",
            )
            continue
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-11, equal_nan=True, msg=lambda m: f"{what} differ: {m}"
        )


def _equal(ours: Any, theirs: Any, what: str) -> None:
    _require(ours == theirs, f"{what}: {ours}, expected {theirs}")


def _stack(rows: Any) -> tuple[Tensor | None, ...]:
    return tuple(
        None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)
    )


def _bits(a: Tensor, b: Tensor) -> bool:
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def _swap(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """The permutation that turns a block of the hessian, of shape (b.shape, a.shape), into
    (a.shape, b.shape)."""
    return (*range(b.dim(), b.dim() + a.dim()), *range(b.dim()))


def _without_none(*results: Any) -> list[tuple[Tensor, ...]]:
    """The results side by side, but for those of which one is None."""
    return [row for row in zip(*results, strict=True) if not any(t is None for t in row)]


def _error(value: Tensor, truth: Tensor) -> float:
    if not truth.numel():
        return 0.0
    finite = truth.isfinite()
    scale = truth[finite].abs().max().item() if finite.any() else 0.0
    difference = torch.where(finite, (value.detach().double() - truth).abs(), 0).max().item()
    return difference / scale if scale else difference


def applicable(names: Iterable[str] | None) -> dict[str, Callable[[Case], Any]]:
    """The checks of these names, or all.

    Raises:
        ValueError: an unknown name.
    """
    chosen = list(CHECKS) if names is None else list(names)
    unknown = [n for n in chosen if n not in CHECKS]
    if unknown:
        raise ValueError(f"unknown checks {unknown}: choose among {list(CHECKS)}")
    return {n: CHECKS[n] for n in chosen}
