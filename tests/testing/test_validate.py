"""The engine of proof must itself be proved: each planted mistake turns the check that is meant for
it red."""

from __future__ import annotations

import json

import pytest
import torch

from custom_backprop.testing import CHECKS, validate
from custom_backprop.testing.outcome import OF_KERNELS


class Scale(torch.autograd.Function):
    """y = 2 x w: correct."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return 2 * x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return 2 * dy * w, 2 * dy * x

    @staticmethod
    def jvp(ctx, tx, tw):
        x, w = ctx.saved_tensors
        return 2 * (tx * w if tx is not None else 0) + 2 * (tw * x if tw is not None else 0)


def reference(x, w):
    return 2 * x * w


def inputs():
    return torch.randn(3, 2), torch.randn(3, 2)


def planted(**members):
    """A copy of Scale with some of its methods broken."""
    wrapped = {k: v if isinstance(v, bool) else staticmethod(v) for k, v in members.items()}
    return type("Planted", (Scale,), wrapped).apply


def failures(fn, **options):
    report = validate(fn, inputs(), reference, **options)
    return {r.check for r in report.results if r.status == "wrong"}


def saved(ctx):
    return ctx.saved_tensors


def test_a_correct_function_passes_all_that_applies():
    report = validate(Scale.apply, inputs(), reference)
    assert report.ok
    assert report.verdict == "right"
    # torch.compile refuses a Function with a jvp; both gradients are computed; no custom operator
    refused = {"compile", "dynamic_shapes", "unwanted"}
    assert {r.check for r in report.not_offered} == refused
    assert report.status("opcheck") == "n/a"


class Plain(torch.autograd.Function):
    """y = 2 x w, written as most people write a Function: right, and no more."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return 2 * x * w

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return 2 * dy * w, 2 * dy * x


def test_what_a_plain_function_does_not_offer_is_not_wrong():
    report = validate(Plain.apply, inputs(), reference).raise_if_failed()
    assert {r.check for r in report.not_offered} == {
        "forward_mode",
        "vmap",
        "jacobians",
        "hessian",
        "unwanted",
    }
    with pytest.raises(AssertionError, match="jvp"):
        report.raise_if_failed(require=["forward_mode"])
    report.raise_if_failed(require=["gradgradcheck"])
    with pytest.raises(ValueError, match="gradchek"):
        report.missing(["gradchek"])


def in_float32(function):
    """Refuses all but float32, like many a kernel."""

    def call(x, w):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return function(x, w)

    return call


@pytest.mark.parametrize("backward", [None, "x.grad", "dropped", "cut"])
def test_a_function_of_float32_alone_is_checked_in_float32(backward):
    wrongs = {
        None: Scale.backward,
        "x.grad": lambda ctx, dy: (2.001 * dy * saved(ctx)[1], 2 * dy * saved(ctx)[0]),
        "dropped": dropped_gradient,
        "cut": cut_second_derivative,
    }
    report = validate(in_float32(planted(backward=wrongs[backward])), inputs(), reference)
    assert report.status("float64") == "not offered"
    assert "float32 only" in report.notes[0]
    wrong = {r.check for r in report.failures}
    if backward is None:
        assert not wrong
        assert report.status("forward_mode") == report.status("gradcheck") == "right"
    elif backward == "cut":
        assert wrong == {"gradgradcheck", "hessian"}
    else:
        assert {"gradient", "gradcheck"} <= wrong


def test_a_function_that_computes_in_float32_whatever_comes_is_checked_in_float32():
    def call(x, w):
        return (2 * x.float() * w.float()).to(x.dtype)

    report = validate(call, inputs(), reference).raise_if_failed()
    assert report.status("float64") == "not offered"
    assert validate(torch.mul, inputs(), torch.mul).status("float64") == "right"
    assert validate(torch.floor, inputs()[0], torch.floor).status("float64") == "right"
    report = validate(call, inputs(), reference, dtype=torch.float64, checks=["forward"])
    assert "say dtype=float32" in report.failures[0].detail
    report = validate(lambda x, w: 2.1 * x * w, inputs(), reference, checks=["forward"])
    assert "float32" not in report.failures[0].detail


@pytest.mark.parametrize("what", ["an input", "a leaf", "dy"])
def test_an_overwritten_tensor_is_one_finding(what):
    originals = []

    def forward(x, w):
        y = 2 * x * w
        if what == "an input":
            originals.append(x.clone())
            x.detach().zero_()
        return y

    def backward(ctx, dy):
        x, w = saved(ctx)
        grads = 2 * dy * w, 2 * dy * x
        if what == "dy" and not torch.is_grad_enabled():
            dy.detach().zero_()
        return grads

    if what == "a leaf":
        report = validate(lambda x, w: x.mul_(2).mul(w), inputs(), reference)
    else:
        setup = Scale.setup_context

        def setup_context(ctx, inputs, output):
            x = originals.pop() if originals else inputs[0].clone()
            setup(ctx, (x, inputs[1].clone()), output)

        function = planted(forward=forward, backward=backward, setup_context=setup_context)
        cut = ("gradgradcheck", "hessian", "compile")  # by the clones that are saved
        checks = [c for c in CHECKS if c not in cut]
        report = validate(function, inputs(), reference, checks=checks)
    assert [r.check for r in report.failures] == ["inputs_unchanged"]
    assert "given copies" in report.notes[0]


def test_what_cannot_run_is_neither_right_nor_wrong():
    def needs_a_gpu(x):
        raise RuntimeError("no GPU")

    def fails(x):
        raise RuntimeError("unknown mode")

    for function, stock, reason in (
        (needs_a_gpu, torch.sin, "no GPU"),
        (torch.sin, fails, "the reference raises RuntimeError: unknown mode"),
        (lambda x: None, torch.sin, "no output is a floating-point tensor"),
    ):
        report = validate(function, torch.randn(3), stock)
        assert report.verdict == "not run"
        assert not report.ok
        assert {r.status for r in report.results} == {"not run"}
        assert reason in report.results[0].detail
        assert str(report).count(reason) == 1


def test_stock_function_passes():
    validate(
        lambda x: torch.nn.functional.silu(x), [torch.randn(5)], torch.nn.functional.silu
    ).raise_if_failed()


def wrong_sign(ctx, dy):
    x, w = ctx.saved_tensors
    return -2 * dy * w, 2 * dy * x


def dropped_gradient(ctx, dy):
    return 2 * dy * ctx.saved_tensors[1], None


def one_gradient_for_all(ctx, dy):
    x, w = ctx.saved_tensors
    return 2 * dy.flatten()[0] * w, 2 * dy * x


def cut_second_derivative(ctx, dy):
    x, w = ctx.saved_tensors
    return (2 * dy * w).detach(), 2 * dy * x


def assumes_contiguous_dy(ctx, dy):
    x, w = ctx.saved_tensors
    flat = (
        dy.as_strided((3, 2), (2, 1))
        if type(dy) is torch.Tensor and dy.untyped_storage().nbytes() >= 48
        else dy
    )
    return 2 * flat * w, 2 * dy * x


def overwrites_its_input(ctx, dy):
    x, w = ctx.saved_tensors
    x.data.mul_(1.01)
    return 2 * dy * w, 2 * dy * x


@pytest.mark.parametrize(
    ("mistake", "seen_by"),
    [
        (wrong_sign, {"gradient", "gradcheck"}),
        (dropped_gradient, {"gradient", "gradcheck"}),
        (one_gradient_for_all, {"gradient", "gradcheck"}),
        (cut_second_derivative, {"gradgradcheck", "hessian"}),
        (assumes_contiguous_dy, {"layouts"}),
        (overwrites_its_input, {"inputs_unchanged", "two_backwards"}),
    ],
)
def test_mistakes_in_backward_are_seen(mistake, seen_by):
    assert seen_by <= failures(planted(backward=mistake))


def test_a_cycle_that_keeps_memory_is_seen():
    def keeps_its_output(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.output = output

    assert failures(planted(setup_context=keeps_its_output), checks=["freed"]) == {"freed"}


def test_a_wrong_jvp_is_seen():
    assert {"forward_mode", "jacobians"} <= failures(
        planted(jvp=lambda ctx, tx, tw: 3 * tx * saved(ctx)[1])
    )


def test_a_wrong_forward_is_seen():
    assert {"forward", "gradcheck"} <= failures(planted(forward=lambda x, w: 2 * x * w * w))


def test_lost_precision_is_seen():
    lossy = planted(forward=lambda x, w: (2 * x.bfloat16() * w.bfloat16()).to(x.dtype))
    assert "precision" in failures(lossy, checks=["precision"])


def test_three_units_are_lost_precision_but_not_on_one_draw_alone():
    """Of a few numbers an error may be luck, good or bad; not of the mean of several draws."""
    drawn = []

    def three_units_off(x, w):
        return 2 * x * w * (1 + 3 * torch.finfo(x.dtype).eps)

    def unlucky(x, w):
        drawn.append((x.detach().double(), w.detach().double()))
        same = [torch.equal(a, b) for a, b in zip(drawn[0], drawn[-1], strict=True)]
        return three_units_off(x, w) if all(same) else reference(x, w)

    given = [t.bfloat16().float() for t in inputs()]
    options = {"checks": ["precision"], "low_precision": (torch.bfloat16,)}
    assert not validate(three_units_off, given, reference, **options).ok
    assert validate(unlucky, given, reference, **options).ok
    assert len(drawn) > 10


def test_wrong_autocast_dtype_is_seen():
    linear = torch.nn.functional.linear

    def in_float32(x, w):
        with torch.autocast("cpu", enabled=False):
            return linear(x.float(), w.float())

    report = validate(in_float32, inputs(), linear, checks=["autocast"])
    assert report.status("autocast") == "wrong"


def test_batched_gradients_that_need_values_are_not_offered():
    reads_a_value = planted(
        backward=lambda ctx, dy: (2 * dy.sum().item() * saved(ctx)[1], 2 * dy * saved(ctx)[0])
    )
    report = validate(reads_a_value, inputs(), reference, checks=["gradient", "batched"])
    assert report.status("batched") == "not offered"
    assert report.status("gradient") == "wrong"


def test_missing_second_derivative_must_be_declared_and_raise():
    once = planted(
        backward=torch.autograd.function.once_differentiable(
            lambda ctx, dy: (2 * dy * saved(ctx)[1], 2 * dy * saved(ctx)[0])
        )
    )
    report = validate(once, inputs(), reference, checks=["gradgradcheck"])
    assert report.status("gradgradcheck") == "not offered"
    assert "gradgradcheck" not in failures(once, checks=["gradgradcheck"], double_backward=False)
    assert "gradgradcheck" in failures(Scale.apply, checks=["gradgradcheck"], double_backward=False)


def test_operators_are_checked():
    with torch.library._scoped_library("planted", "FRAGMENT") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x.mul_(2), "CPU")  # writes its input, against its schema
        report = validate(
            lambda x: x * torch.ops.planted.double(x.detach().clone()),
            [torch.randn(3)],
            checks=["opcheck"],
        )
    assert report.status("opcheck") == "wrong"


def test_a_bare_tensor_is_the_one_input():
    seen = []

    def double(x):
        seen.append(x.shape)
        return 2 * x

    validate(double, torch.randn(2, 3), lambda x: 2 * x, checks=["forward"]).raise_if_failed()
    assert set(seen) == {(2, 3)}


def test_a_module_is_validated_with_its_parameters():
    class Wrong(torch.nn.Linear):
        def forward(self, x):
            return x @ self.weight.detach().T + self.bias

    stock = torch.nn.Linear(3, 2)
    wrong = Wrong(3, 2)
    wrong.load_state_dict(stock.state_dict())
    validate(
        stock, [torch.randn(4, 3)], stock, checks=["forward", "gradient", "gradcheck", "precision"]
    ).raise_if_failed()
    assert (
        validate(wrong, [torch.randn(4, 3)], stock, checks=["forward", "gradient"]).status(
            "gradient"
        )
        == "wrong"
    )
    assert stock.weight.dtype == torch.float32, "validate works on a copy"


def test_without_a_reference_the_oracle_checks_do_not_apply():
    report = validate(lambda x: x.sin(), [torch.randn(3)]).raise_if_failed()
    assert {r.check for r in report.results if r.status == "n/a"} == {
        "forward",
        "gradient",
        "opcheck",
        *OF_KERNELS,
        "shapes",
        "autocast",
        "non_finite",
        "precision",
        "batch_invariance",
        "sweep",
        "unwanted",
        "memory_use",
        "loss_scale",
        "accuracy",
        *OF_KERNELS,
    }


def test_report_prints_and_serialises():
    report = validate(
        planted(backward=lambda ctx, dy: (-dy, dy)),
        inputs(),
        reference,
        checks=["gradient", "layouts"],
        name="planted",
    )
    assert "planted: WRONG" in str(report)
    assert json.loads(report.to_json())["results"][0]["status"] == "wrong"
    with pytest.raises(AssertionError, match="planted: WRONG"):
        report.raise_if_failed()


def test_of_a_function_its_apply_is_validated():
    report = validate(Plain, inputs(), reference)
    assert report.name == "Plain"
    assert report.status("gradient") == "right"


def test_large_jacobians_are_cut_and_indented():
    x = torch.randn(9), torch.randn(9)
    detail = validate(planted(backward=lambda ctx, dy: (-dy, dy)), x, checks=["gradcheck"])
    _, *lines = str(detail).splitlines()
    assert "..." in str(detail)
    assert len(lines) < 20
    assert all(line.startswith("  ") for line in lines)


def test_bad_arguments():
    with pytest.raises(TypeError, match="the class Linear: make an instance"):
        validate(torch.nn.Linear, torch.randn(3))
    with pytest.raises(TypeError, match="a function or a module, got str"):
        validate("relu", torch.randn(3))
    with pytest.raises(TypeError, match="floating-point"):
        validate(lambda x: x, [torch.arange(3)])
    with pytest.raises(ValueError, match="one differentiated tensor, not 2"):
        validate(Scale.apply, inputs(), reference, elementwise=True)
    with pytest.raises(ValueError, match="unknown checks"):
        validate(lambda x: x, [torch.randn(3)], checks=["gradchek"])


def test_every_check_says_what_it_does():
    assert all(check.__doc__ for check in CHECKS.values())


@pytest.mark.parametrize(
    "correct",
    [
        lambda a, b: {"y": a * b},
        lambda a, b: (a * b, [a + b, None]),
        lambda a, b: (a * b, 3, a.argmax()),
        lambda a, b: a.sin(),
        lambda a, b: (a.sin(), b.cos()),
    ],
    ids=["dict", "nested, None", "a number, integers", "an unused input", "one of each input"],
)
def test_a_result_of_any_kind_passes_every_check(correct):
    validate(correct, inputs(), correct).raise_if_failed()


def test_inputs_of_any_shape_pass_every_check():
    for shape in ((), (1,), (0, 3)):
        validate(torch.mul, [torch.rand(shape), torch.rand(2, 1, 3)], torch.mul).raise_if_failed()


def test_of_no_elements_the_error_is_0():
    nothing = torch.rand(0, 3)
    report = validate(torch.mul, [nothing, nothing], torch.mul, checks=["precision"])
    assert set(report.errors.values()) == {(0.0, 0.0)}


def test_zeros_and_no_gradient_are_the_same():
    def without(a, b):
        return a.sin()

    def zeros(a, b):
        return a.sin() + 0 * b

    checks = [c for c in CHECKS if c != "non_finite"]  # 0 times NaN is NaN
    for ours, theirs in ((without, zeros), (zeros, without)):
        validate(ours, inputs(), theirs, checks=checks).raise_if_failed()


def test_a_gradient_behind_one_that_is_none_is_compared():
    report = validate(lambda a, b: 2 * b, inputs(), lambda a, b: 3 * b, checks=["gradient"])
    assert not report.ok


def test_lost_precision_beside_an_infinity_is_seen():
    def off(x):
        return x.log() * (1 + 9 * torch.finfo(x.dtype).eps)

    x = torch.cat([torch.zeros(1), torch.rand(9) + 2])
    for dtype in (torch.float32, torch.bfloat16):
        options = {"checks": ["precision"], "low_precision": (dtype,)}
        assert validate(torch.log, x, torch.log, **options).ok
        assert not validate(off, x, torch.log, **options).ok


def test_a_gradient_that_is_constant_passes_every_check():
    validate(torch.floor, torch.rand(5) + 0.1, torch.floor).raise_if_failed()


@pytest.mark.parametrize(
    "correct",
    [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: (a.reshape(-1), b.sum()),
        lambda a, b: {"y": [a * b]},
    ],
)
def test_gradients_that_are_views_of_the_incoming_one_are_no_mistake(correct):
    validate(
        correct,
        inputs(),
        correct,
        checks=["forward", "gradient", "two_backwards", "layouts", "precision"],
    ).raise_if_failed()


@pytest.mark.parametrize(
    ("ours", "theirs", "seen_by"),
    [
        (
            lambda a, b: {"y": 2 * a * b},
            lambda a, b: {"y": 3 * a * b},
            {"forward", "gradient", "precision"},
        ),
        (
            lambda a, b: (a, (2 * b,)),
            lambda a, b: (a, (3 * b,)),
            {"forward", "gradient", "precision"},
        ),
        (lambda a, b: (a * b, a.argmax()), lambda a, b: (a * b, a.argmin()), {"forward"}),
    ],
)
def test_every_output_is_compared(ours, theirs, seen_by):
    report = validate(ours, inputs(), theirs, checks=["forward", "gradient", "precision"])
    assert {r.check for r in report.results if r.status == "wrong"} == seen_by


def test_tensors_by_name_are_differentiated():
    wrong = planted(backward=lambda ctx, dy: (2 * dy * saved(ctx)[1], 7 * dy * saved(ctx)[0]))
    x, w = inputs()
    w.requires_grad_()
    x.requires_grad_()
    report = validate(
        lambda x, w: wrong(x, w),
        [x],
        reference,
        kwargs={"w": w},
        checks=["gradient", "gradcheck", "subsets"],
    )
    assert {r.check for r in report.results if r.status == "wrong"} == {"gradient", "gradcheck"}
    validate(
        lambda x, w: planted()(x, w),
        [x],
        reference,
        kwargs={"w": w},
        checks=["gradient", "gradcheck", "subsets"],
    ).raise_if_failed()


def test_tensors_in_lists_are_refused():
    with pytest.raises(TypeError, match="arguments by themselves"):
        validate(lambda tensors: torch.cat(tensors), [list(inputs())])


def test_a_batch_dimension_that_is_not_the_first_is_tried():
    class First(torch.autograd.Function):
        """Right for the first dimension alone."""

        @staticmethod
        def forward(x):
            return x.softmax(-1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(output)

        @staticmethod
        def backward(ctx, dy):
            (y,) = ctx.saved_tensors
            return y * (dy - (y * dy).sum(-1, keepdim=True))

        @staticmethod
        def vmap(info, in_dims, x):
            return First.apply(x), in_dims[0]

    report = validate(First.apply, [torch.randn(3, 3)], lambda x: x.softmax(-1), checks=["vmap"])
    assert "dimension -1" in report.results[0].detail


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_wrong_numbers_under_autocast_alone_are_seen(where):
    def forward(x, w):
        return 2 * x * w * (3 if where == "forward" and torch.is_autocast_enabled("cpu") else 1)

    def backward(ctx, dy):
        x, w = saved(ctx)
        factor = 6 if where == "backward" and x.dtype == torch.bfloat16 else 2
        return factor * dy * w, 2 * dy * x

    assert "autocast" in failures(planted(forward=forward, backward=backward), checks=["autocast"])


def test_an_expanded_input_is_tried():
    def wrong(x, w):
        return planted()(x, w) * (0.0 if 0 in x.stride() else 1.0)

    assert failures(wrong, checks=["input_layouts"]) == {"input_layouts"}


def test_a_report_names_what_was_not_run_and_has_no_bare_infinity():
    report = validate(planted(), inputs(), reference, checks=["forward"])
    with pytest.raises(KeyError):
        report.status("layouts")
    report.errors["float16"] = (float("inf"), 1.0)
    found = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert found["errors"]["float16"] == ["inf", 1.0]
