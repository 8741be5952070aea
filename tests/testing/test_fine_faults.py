"""Each check sees a fault as fine as it promises to see: one part in a million, one element, one
subset of the inputs, one layout. All the checks that turn red are named beside it."""

from __future__ import annotations

import functools
import math
import threading

import pytest
import torch

from custom_backprop.testing import CHECKS, validate
from custom_backprop.testing.outcome import COSTLY, OF_KERNELS, SEARCHED

FINE = 1 + 1e-6


def first_of(shape, factor=FINE):
    """1, and in the first element ``factor``."""
    t = torch.ones(shape, dtype=torch.float64)
    t.view(-1)[0] = factor
    return t


def reference(x, w):
    return x.sin() * w


class Right(torch.autograd.Function):
    """y = sin(x) w, right in every way."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return x.sin() * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.backwards = 0

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return dy * w * x.cos(), dy * x.sin()

    @staticmethod
    def jvp(ctx, tx, tw):
        x, w = ctx.saved_tensors
        return tx * w * x.cos() + tw * x.sin()


def planted(**methods):
    """``Right`` with some of its methods broken."""
    return type("Planted", (Right,), {k: staticmethod(m) for k, m in methods.items()}).apply


def is_plain(t):
    """Neither batched nor under torch.func."""
    return not (
        torch._C._functorch.is_legacy_batchedtensor(t)
        or torch._C._are_functorch_transforms_active()
    )


def transforms():
    """How many of torch.func's are active: a Jacobian is two, a hessian four."""
    top = torch._C._functorch.peek_interpreter_stack()
    return 0 if top is None else top.level()


def gradient_off(condition, which=0, factor=FINE):
    """One of the gradients is off where ``condition(ctx, dy)``."""

    def backward(ctx, dy):
        grads = list(Right.backward(ctx, dy))
        if condition(ctx, dy):
            grads[which] = grads[which] * factor
        return tuple(grads)

    return planted(backward=backward)


def value_off(condition, factor=FINE):
    """The value is off, and its derivative with it, where ``condition(x, w)``."""
    return lambda x, w: Right.apply(x, w) * (factor if condition(x, w) else 1.0)


def undefined(ctx, dy):
    x, _ = ctx.saved_tensors
    return Right.backward(ctx, dy) if dy is not None else (torch.full_like(x, 1e-6), None)


def without_materialized(ctx, inputs, output):
    Right.setup_context(ctx, inputs, output)
    ctx.set_materialize_grads(False)


def a_hundredth_is_constant(ctx, dy):
    dx, dw = Right.backward(ctx, dy)
    if torch.is_grad_enabled() and is_plain(dy):
        dx = 0.99 * dx + 0.01 * dx.detach()
    return dx, dw


class OffWhereBatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * (FINE if torch._C._functorch.is_legacy_batchedtensor(dy) else 1.0)


def second_derivative_off_in_a_batch(ctx, dy):
    dx, dw = Right.backward(ctx, dy)
    if torch.is_grad_enabled() and is_plain(dy):
        dx = OffWhereBatched.apply(dx)
    return dx, dw


def jvp_of_one_off(ctx, tx, tw):
    return Right.jvp(ctx, tx, tw * (1.01 if is_plain(tw) else 1.0))


def jvp_off_in_a_transform(ctx, tx, tw):
    return Right.jvp(ctx, tx, tw * (1.0 if is_plain(tw) else FINE))


def off_where_w_alone_is_batched(x, w):
    batched = torch._C._functorch.is_batchedtensor
    y = Right.forward(x, w)
    return y * FINE if batched(w) and not batched(x) else y


def one_bit_off_the_second_time(ctx, dy):
    dx, dw = Right.backward(ctx, dy)
    ctx.backwards += 1
    if ctx.backwards > 1 and is_plain(dy) and not torch.is_grad_enabled():
        dx = torch.nextafter(dx, torch.full_like(dx, math.inf))
    return dx, dw


def gives_away_what_it_keeps(ctx, dy):
    """The gradients of the last dy, which may have been changed since."""
    if not is_plain(dy) or torch.is_grad_enabled():
        return Right.backward(ctx, dy)
    last, grads = getattr(ctx, "kept", (None, None))
    if last is None or not torch.equal(last, dy):
        grads = Right.backward(ctx, dy)
        ctx.kept = dy.clone(), grads
    return grads


def writes(which, *, bits):
    """Backward writes a tensor: its first element by one unit, or no bit, which counts as written
    too."""

    def backward(ctx, dy):
        grads = Right.backward(ctx, dy)
        if is_plain(dy) and dy.is_contiguous() and not torch.is_grad_enabled():
            t = dy if which == "dy" else ctx.saved_tensors[which]
            t = t.data if bits else t.detach()
            t.mul_(first_of(t.shape, 1 + 2.0**-52) if bits else 1)
        return grads

    return planted(backward=backward)


def holds_its_output(ctx, inputs, output):
    Right.setup_context(ctx, inputs, output)
    ctx.output = output


def always_wants_a_gradient(x, w):
    return Right.apply(x, w) + torch.zeros((), dtype=x.dtype, requires_grad=True)


def only(*needs):
    return lambda ctx, dy: ctx.needs_input_grad == needs and is_plain(dy)


def compiled_off(condition=lambda x, w: True):
    def call(x, w):
        off = torch.compiler.is_compiling() and condition(x, w)
        return reference(x, w) * (FINE if off else 1.0)

    return call


def off_under_autocast(x, w):
    y = Right.apply(x, w)
    if not torch.is_autocast_enabled("cpu") or y.dtype != torch.bfloat16:
        return y
    return y + y.detach().abs().max() * first_of(y.shape, 0.03).where(first_of(y.shape) > 1, 0)


def gradient_off_after_autocast(ctx, dy):
    dx, dw = Right.backward(ctx, dy)
    return dx * (1.05 if dy.dtype == torch.bfloat16 and ctx.autocast else 1), dw


def notes_autocast(ctx, inputs, output):
    Right.setup_context(ctx, inputs, output)
    ctx.autocast = torch.is_autocast_enabled("cpu")


def doubled_but_at_one_input(which):
    """2 x; at one number of bfloat16 the value, or the derivative, is one unit off."""

    class Doubled(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return 2 * x * (factor(x) if which == "value" else 1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            return 2 * dy * (factor(x) if which == "derivative" else 1)

        @staticmethod
        def jvp(ctx, tx):
            return 2 * tx

    def factor(x):
        unit = torch.finfo(x.dtype).eps
        off = x == 1.5 if x.dtype == torch.bfloat16 else torch.zeros_like(x, dtype=torch.bool)
        return torch.where(off, 1 + unit, 1.0).to(x.dtype)

    return Doubled.apply


def gradients_require_grad(ctx, dy):
    dx, dw = Right.backward(ctx, dy)
    return dx, dw if torch.is_grad_enabled() or not is_plain(dy) else dw.requires_grad_()


def one_bit_off_at_times():
    """Every second forward."""
    calls = iter(range(1 << 30))

    def forward(x, w):
        y = Right.forward(x, w)
        off = is_plain(x) and next(calls) % 2
        return torch.nextafter(y, torch.full_like(y, math.inf)) if off else y

    return planted(forward=forward)


def reads_what_nobody_wrote(x, w):
    """64 MiB come from the system, as zeros, and not from what another test left behind."""
    return Right.forward(x, w) * (FINE if torch.empty(1 << 24)[0].isnan() else 1.0)


def hides_what_it_saves(ctx, inputs, output):
    Right.setup_context(ctx, inputs, output)
    ctx.hidden = lambda: inputs


def from_what_is_hidden(ctx, dy):
    if not is_plain(dy) or torch.is_grad_enabled():
        return Right.backward(ctx, dy)
    x, w = ctx.hidden()
    return dy * w * x.cos(), dy * x.sin()


def notes_strides(ctx, inputs, output):
    Right.setup_context(ctx, inputs, output)
    ctx.strides = inputs[0].stride()


def by_noted_strides(ctx, dy):
    x, w = ctx.saved_tensors
    if is_plain(dy) and is_plain(x) and not torch.is_grad_enabled():
        x = x.as_strided(x.shape, ctx.strides)
    return dy * w * x.cos(), dy * x.sin()


def attribute_of_the_context(ctx, inputs, output):
    Right.setup_context(ctx, inputs, output)
    ctx.w = inputs[1]


def drops_nan(x, w):
    y = Right.forward(x, w)
    return torch.where(y.isnan(), 0.0, y)


def stays_finite(ctx, dy):
    dx, dw = Right.backward(ctx, dy)
    return dx, dw.clamp(-1e300, 1e300)


def accumulates_by_itself(ctx, dy):
    """Where the graph is freed, as after ``loss.backward()``."""
    dx, dw = Right.backward(ctx, dy)
    w = ctx.saved_tensors[1]
    if w._post_accumulate_grad_hooks:
        w.grad, dw = dw, None
    return dx, dw


@functools.wraps(reference)
def under_other_names(a, b):
    return reference(a, b)


def adds_an_epsilon(ctx, dy):
    dx, dw = Right.backward(ctx, dy)
    return dx + (1e-4 if dy.dtype == torch.bfloat16 else 0), dw


def saves_much(ctx, inputs, output):
    Right.setup_context(ctx, inputs, output)
    ctx.save_for_backward(*inputs, *(inputs[0].clone() for _ in range(9)))


def from_the_first_two(ctx, dy):
    x, w, *_ = ctx.saved_tensors
    return dy * w * x.cos(), dy * x.sin()


def exported_off(x, w):
    return reference(x, w) * (FINE if torch.compiler.is_exporting() else 1.0)


def in_a_thread(x, w):
    return threading.current_thread().name.startswith("ThreadPool")


#: check -> (function, the other checks that see it)
FAULTS = {
    "forward": [(planted(forward=lambda x, w: one_element_off(x, w)), set())],
    "gradient": [
        (
            gradient_off(lambda ctx, dy: dy.dtype == torch.float64, i, first_of((3, 2))),
            {"jacobians", "hessian"},
        )
        for i in (0, 1)
    ],
    "gradcheck": [
        (planted(setup_context=without_materialized, backward=undefined), {"layouts"}),
    ],
    "gradgradcheck": [(planted(backward=a_hundredth_is_constant), set())],
    "forward_mode": [(planted(jvp=jvp_of_one_off), set())],
    "batched": [
        (gradient_off(lambda ctx, dy: torch._C._functorch.is_legacy_batchedtensor(dy), i), set())
        for i in (0, 1)
    ]
    + [(planted(backward=second_derivative_off_in_a_batch), set())],
    "vmap": [(planted(forward=off_where_w_alone_is_batched), set())],
    "jacobians": [(planted(jvp=jvp_off_in_a_transform), set())],
    "hessian": [(gradient_off(lambda ctx, dy: transforms() > 2), set())],
    "compile": [(compiled_off(), set()), (compiled_off(lambda x, w: not x.requires_grad), set())],
    "layouts": [
        (gradient_off(lambda ctx, dy, s=s: is_plain(dy) and dy.stride() == s, 1), set())
        for s in ((0, 0), (1, 3), (5, 2))
    ],
    "input_layouts": [
        (value_off(lambda x, w, s=s: is_plain(w) and w.stride() == s), set())
        for s in ((1, 3), (5, 2), (0, 1))
    ],
    "inputs_unchanged": [
        (
            writes(0, bits=False),
            {"gradcheck", "two_backwards", "hooks"},
        ),
        (writes(1, bits=True), {"gradcheck", "two_backwards"}),
        (writes("dy", bits=True), set()),
        (writes("dy", bits=False), set()),
    ],
    "two_backwards": [
        (planted(backward=one_bit_off_the_second_time), {"gradcheck", "layouts"}),
        (planted(backward=gives_away_what_it_keeps), set()),
    ],
    "freed": [(planted(setup_context=holds_its_output), {"saved_tensors"})],
    "gradient_memory": [(planted(backward=gradients_require_grad), {"two_backwards"})],
    "determinism": [
        (one_bit_off_at_times(), {"non_finite"}),
        (planted(forward=reads_what_nobody_wrote), set()),
    ],
    "in_place": [
        (planted(setup_context=hides_what_it_saves, backward=from_what_is_hidden), set()),
    ],
    "non_finite": [
        (planted(forward=drops_nan), set()),
        (planted(forward=lambda x, w: Right.forward(x, w) + 0 * x.detach().sum()), set()),
        (planted(backward=stays_finite), set()),
    ],
    "hooks": [(planted(backward=accumulates_by_itself), set())],
    "saved_tensors": [
        (planted(setup_context=notes_strides, backward=by_noted_strides), set()),
        (planted(setup_context=attribute_of_the_context), set()),
    ],
    "keywords": [(under_other_names, set())],
    "threads": [(value_off(in_a_thread), set())],
    "memory_use": [(planted(setup_context=saves_much, backward=from_the_first_two), set())],
    "export": [(exported_off, set())],
    "dynamic_shapes": [(compiled_off(lambda x, w: x.shape[0] > 3), set())],
    "loss_scale": [(planted(backward=adds_an_epsilon), set())],
    "accuracy": [
        (value_off(lambda x, w: x.dtype == torch.float32 and x.abs().max() > 60, 0.0), set())
    ],
    "subsets": [
        (gradient_off(only(True, False)), set()),
        (gradient_off(only(False, True), 1), set()),
        (always_wants_a_gradient, set()),
    ],
    "autocast": [
        (off_under_autocast, set()),
        (planted(setup_context=notes_autocast, backward=gradient_off_after_autocast), set()),
    ],
    "precision": [
        (gradient_off(lambda ctx, dy: dy.dtype == torch.float32, 1), {"autocast"}),
        (gradient_off(lambda ctx, dy: dy.dtype == torch.float16, 0, 1.01), set()),
        (value_off(lambda x, w: x.dtype == torch.float32), {"autocast"}),
    ],
}
#: those that need another call
#: (test_search.py has SEARCHED)
OTHERS = (
    {"batch_invariance", "float64", "opcheck", "sweep", "unwanted", "mutations"}
    | OF_KERNELS
    | SEARCHED
)


def one_element_off(x, w):
    y = Right.forward(x, w)
    return y * first_of(y.shape) if y.dtype == torch.float64 else y


def inputs():
    torch.manual_seed(0)
    return torch.rand(3, 2) + 0.5, torch.rand(3, 2) + 0.5


def red(function, *, leave_out=(), **options):
    names = [c for c in CHECKS if c not in {*leave_out, *SEARCHED}]
    report = validate(function, inputs(), reference, checks=names, **options)
    return {r.check for r in report.results if r.status == "wrong"}


def test_what_is_right_is_green():
    assert red(Right.apply) == set()
    assert red(reference) == set()


@pytest.mark.parametrize(
    ("check", "function", "others"),
    [
        pytest.param(check, function, others, id=f"{check}-{i}")
        for check, faults in FAULTS.items()
        for i, (function, others) in enumerate(faults)
    ],
)
def test_a_fine_fault_turns_its_check_red(check, function, others):
    leave_out = {"compile", *COSTLY} - {check}  # no fault but its own, and slow
    assert red(function, leave_out=leave_out) == {check, *others}


@pytest.mark.parametrize("which", ["value", "derivative"])
def test_one_of_65536_inputs_turns_the_sweep_red(which):
    def run(function):
        report = validate(
            function,
            torch.randn(3, 4),
            lambda x: 2 * x,
            elementwise=True,
            checks=[c for c in CHECKS if c != "compile"],
        )
        return {r.check: r.detail for r in report.results if r.status == "wrong"}

    assert run(lambda x: 2 * x) == {}
    found = run(doubled_but_at_one_input(which))
    assert set(found) == {"sweep"}
    assert f"the {which} in torch.bfloat16 at 1.5" in found["sweep"]


@pytest.mark.parametrize(("at", "seen"), [(9.5, True), (-9.5, True), (10.5, False)])
def test_one_input_between_minus_10_and_10_turns_precision_red(at, seen):
    def off_at_one(x):
        return 2 * x * torch.where((x == at) & (x.dtype == torch.bfloat16), 1.1, 1.0).to(x.dtype)

    report = validate(
        off_at_one, torch.randn(4), lambda x: 2 * x, elementwise=True, checks=["precision"]
    )
    assert report.ok != seen


def test_a_derivative_that_is_lost_in_the_tail_turns_the_sweep_red():
    """The square overflows float16 where the derivative does not vanish."""

    class Softsign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x / (1 + x.abs())

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            return dy / (1 + x.abs()).square()

    def stock(x):
        return torch.nn.functional.softsign(x)

    report = validate(Softsign.apply, torch.randn(4), stock, elementwise=True, checks=["sweep"])
    assert "the derivative in" in report.results[0].detail


def test_a_fake_of_other_strides_turns_opcheck_red():
    with torch.library._scoped_library("planted_fake", "FRAGMENT") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: 2 * x, "CPU")
        library.impl("double", lambda x: (2 * x).t().contiguous().t(), "Meta")
        report = validate(
            lambda x: x * torch.ops.planted_fake.double(x.detach().clone()),
            torch.randn(3, 2),
            checks=["opcheck"],
        )
    assert report.status("opcheck") == "wrong"


def test_every_check_has_a_fault():
    assert set(FAULTS) | OTHERS == set(CHECKS)


def test_two_gradients_in_one_memory_are_seen():
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return a + b

        @staticmethod
        def backward(ctx, dy):
            return dy.view_as(dy), dy.view_as(dy)

    report = validate(Sum.apply, inputs(), torch.add, checks=["gradient", "gradient_memory"])
    assert [r.check for r in report.failures] == ["gradient_memory"]
    assert "memory of the gradient of input 1" in report.failures[0].detail


def test_what_hooks_of_saved_tensors_do_not_see_is_not_offered():
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.derivative = x.cos()
            return x.sin()

        @staticmethod
        def backward(ctx, dy):
            return dy * ctx.derivative

    report = validate(Sine.apply, torch.randn(3), torch.sin, checks=["saved_tensors"])
    assert report.status("saved_tensors") == "not offered"
    assert "ctx.derivative" in report.results[0].detail


def test_an_output_that_is_saved_may_not_be_changed_in_place_and_that_is_no_fault():
    assert validate(torch.exp, torch.randn(3), torch.exp, checks=["in_place"]).ok
    assert validate(torch.exp, torch.randn(3), torch.sin, checks=["in_place"]).ok
    report = validate(torch.exp, torch.randn(3), lambda x: x * 1, checks=["in_place"])
    assert report.status("in_place") == "not offered"
    assert "modified by an inplace operation" in report.results[0].detail


def test_gradients_that_nobody_wants_are_not_offered():
    def as_wanted(ctx, dy):
        grads = Right.backward(ctx, dy)
        return tuple(
            g if want else None for g, want in zip(grads, ctx.needs_input_grad, strict=False)
        )

    report = validate(Right.apply, inputs(), reference, checks=["unwanted"])
    assert report.status("unwanted") == "not offered"
    assert "of the arguments 0, 1" in report.results[0].detail
    report = validate(planted(backward=as_wanted), inputs(), reference, checks=["unwanted"])
    assert report.status("unwanted") == "right"


@pytest.mark.parametrize(
    ("function", "given", "said"),
    [
        (torch.mul, (torch.zeros(3), torch.rand(3)), "1.001 in the gradient of input 1"),
        (torch.exp, (torch.rand(1),), "values in the wrong places"),
        (torch.sum, (torch.rand(3),), "values in the wrong places"),
        (torch.floor, (torch.rand(3) + 0.1,), "an incoming gradient that is ignored"),
    ],
)
def test_a_weak_sample_is_named(function, given, said):
    report = validate(function, given, function, checks=["forward", "mutations"])
    assert report.verdict == "right"
    assert report.status("mutations") == "not run"
    assert "weak sample: " in report.results[1].detail
    assert said in report.results[1].detail
    strong = validate(torch.mul, inputs(), torch.mul, checks=["forward", "mutations"])
    assert strong.status("mutations") == "right"
    strong.merge(report)
    assert strong.status("mutations") == "right"


def test_figures_are_reported():
    report = validate(
        lambda x: torch.log(1 + torch.exp(x)),
        torch.randn(4),
        torch.nn.functional.softplus,
        elementwise=True,
        checks=["accuracy", "memory_use"],
    )
    assert report.status("memory_use") == "right"
    ours, theirs = report.figures["memory_use"]["saved"]
    assert ours > theirs > 0
    assert report.status("accuracy") == "wrong"
    assert "no digit of the value" in report.failures[0].detail
    report = validate(torch.tanh, torch.randn(4), torch.tanh, checks=["accuracy"])
    ours, theirs = report.figures["accuracy"]["value"]
    assert 0 < ours == theirs < 8
    assert "accuracy of value" in str(report)
    cells = "accuracy of value", f"{ours:.4g}", f"{theirs:.4g}"
    assert f"| {' | '.join(cells)} |" in report.to_markdown()
    assert f"<td>{'</td><td>'.join(cells)}</td>" in report.to_html()


def test_without_a_compiler_inductor_is_not_run_and_said_so(monkeypatch):
    monkeypatch.setattr("custom_backprop.testing.checks.traced.cpp_compiler", lambda: None)
    assert validate(reference, inputs(), checks=["compile"]).status("compile") == "right"
    checks = ["forward", "compile"]
    report = validate(reference, inputs(), reference, inductor=True, checks=checks)
    assert report.ok
    assert report.status("compile") == "not run"
    assert "C++ compiler" in report.results[-1].detail
