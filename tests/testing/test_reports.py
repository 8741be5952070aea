"""Reports as pages, as JUnit's XML and as Markdown."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from custom_backprop.testing import Report, Result, own_forward, validate
from custom_backprop.testing.curves import Curve
from custom_backprop.testing.html import plot
from custom_backprop.testing.reproduce import script
from custom_backprop.testing.target import Target, target

REPORT = Report(
    "mine:<Fn>",
    [
        Result("forward", "right", "", 0.25),
        Result(
            "gradient", "wrong", "mine:<Fn>: Wrong: off by \x1b[31m3|4\x1b[0m", 0.5, "f32[1]", "s()"
        ),
        Result("layouts", "wrong", "also", 0.0, "f32[1]", "s()"),
        Result("vmap", "not offered", "no rule"),
        Result("hessian", "not offered", "no rule"),
    ],
    {"float32": (1e-7, 2e-7)},
    ["checked <twice>"],
    {"torch": "2.13", "command": "custom-backprop validate 'a'"},
)


def test_markdown():
    text = REPORT.to_markdown()
    assert "2 wrong, 2 not offered, 1 right." in text
    assert "| not offered | vmap, hessian | no rule |" in text
    assert "| **wrong** | gradient | off by" in text
    assert "3\\|4" in text
    assert text.count("s()") == 1
    assert 'the script of gradient, with `checks=["layouts"]`' in text
    assert text.endswith("torch 2.13.\n\n```\ncustom-backprop validate 'a'\n```")


def test_junit_is_xml_whatever_a_check_says():
    suite = ElementTree.fromstring(REPORT.to_junit()).find("testsuite")
    counts = [suite.get(name) for name in ("tests", "failures", "skipped", "time")]
    assert counts == ["5", "2", "2", "0.750"]
    assert suite.find("testcase[@name='gradient']/failure").text.endswith("3|4\n\nf32[1]\n\ns()")
    assert "not offered: no rule" in suite.find("testcase[@name='vmap']/skipped").get("message")


def test_a_page_escapes_what_it_shows():
    page = REPORT.to_html()
    assert "<code>mine:&lt;Fn&gt;</code>" in page
    assert "checked &lt;twice&gt;" in page
    assert "Same gradients as autograd gives" in page
    assert "<script" not in page


def test_a_plot_shows_where_a_result_is_no_number():
    curve = Curve(
        "value", "factor", (0.5, 1.0, 2.0, 4.0), (1.0, 2.0, None, 4.0), (1.0, 1.0, 1.0, 1.0)
    )
    drawn = plot(curve)
    assert drawn.count('<polyline class="ours"') == 2
    assert drawn.count('<polyline class="theirs"') == 1
    assert drawn.count("×") == 1
    assert "4 near 4" in drawn
    ElementTree.fromstring(drawn)


def half(x):
    return (x.to(torch.float16) * x).to(x.dtype) if x.dtype == torch.float32 else x * x


def test_curves_of_any_call():
    report = validate(half, "f64[2,3]", lambda x: x * x, checks=[], plots=True)
    found = {c.title: c for c in report.curves}
    assert len(found) == 6  # output and gradient, in three dtypes
    worse = found["output in float32"]
    assert max(e for e in worse.ours if e is not None) > 1000
    assert max(worse.theirs) <= 0.5
    assert max(found["output in float16"].ours) <= 0.5
    assert found["output in float16"].ours == found["output in float16"].theirs
    json.loads(report.to_json())


def test_the_curves_of_several_samples_are_the_worst_of_them():
    some, others = (
        Curve("y", "x", (1.0, 2.0, 3.0), ours, theirs)
        for ours, theirs in [
            ((1.0, 5.0, 1.0), (1.0, 1.0, 1.0)),
            ((2.0, None, 0.0), (0.0, 2.0, 1.0)),
        ]
    )
    both = Report("a", curves=[some])
    both.merge(Report("a", curves=[others]))
    assert both.curves == [replace(some, ours=(2.0, None, 1.0), theirs=(1.0, 2.0, 1.0))]


def test_a_script_imports_each_module_once():
    found = script(
        target("torch.nn.functional.silu"),
        '"f32[2]"',
        "gradient",
        Target(None, ("from mine import b",), "b"),
        imports=["from mine import a", "from custom_backprop.testing import Inputs"],
        options=["dtype=torch.float32"],
        interpreted="interpreted()",
    )
    assert found.splitlines() == [
        "from custom_backprop.testing import Inputs, interpreted, validate",
        "",
        "with interpreted():",
        "    import torch",
        "    from mine import a, b",
        "    print(validate(",
        '        torch.nn.functional.silu, "f32[2]",',
        '        reference=b, checks=["gradient"], dtype=torch.float32,',
        "    ))",
    ]


class Marked(torch.autograd.Function):
    """Two outputs, the second not differentiable; saved what forward computed."""

    @staticmethod
    def forward(x, y):
        return x.mul_(y), x.detach().round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1], *output)
        ctx.mark_dirty(inputs[0])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)


def test_the_reference_that_a_function_is_itself():
    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    before = x.detach().clone()
    product, rounded = own_forward(Marked.apply)(x, y)
    assert torch.equal(x, before)
    assert not rounded.requires_grad
    product.sum().backward()
    assert torch.equal(x.grad, y)
    assert torch.equal(y.grad, x)

    def wrapped(x, y):
        return Marked.apply(x, y)[0]

    assert own_forward(wrapped)(x, y).grad_fn is not None
    with pytest.raises(RuntimeError, match="not plain torch"):
        own_forward(lambda x: x.detach())(x)
