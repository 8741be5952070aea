"""What turns formulas into mathematics, and what opens the pages of the site: each fault that it
shall find is planted."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from custom_backprop.testing import database

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
for needed in ("sphinx", "latex2mathml"):
    pytest.importorskip(needed, reason=f"{needed} is in the extra 'docs'")

import browse  # noqa: E402
from website import mathml, notation, prose  # noqa: E402


@pytest.mark.parametrize(
    ("plain", "latex"),
    [
        ("x / (1 + |x|)", r"\frac{x}{1 + \vert x\vert }"),
        ("dy d/v", r"\operatorname{d}\!y\,\frac{d}{v}"),
        ("Σ g / n", r"\frac{\sum g}{n}"),
        ("d²/2β", r"\frac{d^{2}}{2 \beta}"),
        ("e^-x / Σ_j e^(x_j - m)", r"\frac{e^{-x}}{\sum_{j} e^{x_{j} - m}}"),
        ("(1 + u²)^(-1/2)", r"(1 + u^{2})^{-1/2}"),
        ("∂y_j/∂x_i", r"\frac{\partial y_{j}}{\partial x_{i}}"),
        ("dWd = dyᵀ h", r"\operatorname{d}\!W_d = \operatorname{d}\!y^{\mathsf{T}}\,h"),
        ("<dy_b, W_t>", r"\langle \operatorname{d}\!y_{b}, W_{t}\rangle "),
        ("σ(x)", r"\sigma (x)"),
        ("σ (1 - σ)", r"\sigma\,(1 - \sigma)"),
        ("1e-6", r"10^{-6}"),
    ],
)
def test_plain_notation(plain, latex):
    assert notation.translated(plain) == latex


@pytest.mark.parametrize(
    "text", ["", "the sum", "x +", "(x", "x = ", 'y = "layer"', "x \\frac", "f(x", "2 /", "x = {y}"]
)
def test_what_is_no_mathematics(text):
    with pytest.raises(notation.NotMathematics):
        notation.translated(text)


@pytest.mark.parametrize("spec", database().values(), ids=str)
def test_every_formula_of_the_database(spec):
    assert prose.formula(spec.formula).startswith("```{math}")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a sum of x_i, so dx_i = 2 x_i.", ["x_{i}", r"\operatorname{d}\!x_{i} = 2\,x_{i}"]),
        ("Where y is near 1, a unit of 1 - y² is lost.", ["y", "1 - y^{2}"]),
        ("the z-loss of a layer's output (Shazeer, 2020), in 2 of 3 cases", []),
        ("the softmax's s is linear", ["s"]),
    ],
)
def test_formulas_in_prose(text, pieces):
    found = notation.inline(text)
    assert [piece for piece, formula in found if formula] == pieces
    if not pieces:
        assert found == [(text, False)]


@pytest.mark.parametrize("latex", [r"\foo", r"\frac{a}", "a & b", "{a", r"\begin{array}{l} a"])
def test_latex_that_cannot_be_drawn(latex):
    with pytest.raises(mathml.NotMathematics):
        mathml.mathml(latex)


def test_what_browsers_draw():
    found = mathml.mathml(r"\begin{aligned} a &= \log p \\ b &= f'(x) \end{aligned}", block=True)
    assert 'display="block"' in found
    assert '<mtd style="text-align: right"><mi>a</mi></mtd>' in found
    assert '<mi>log</mi><mspace width="0.1667em" /><mi>p</mi>' in found
    assert "mathvariant" not in found
    assert "&lt;" in mathml.mathml(r"\text{a < b}")


SOUND = """<!doctype html><title>t</title><p id="here">Text, <code>\\frac{a}{b}</code>
<a href="#here">here</a> <a href="other.html#there">there</a> <a href="https://pytorch.org">out</a>
"""
OTHER = '<!doctype html><title>t</title><p id="there">There'

FAULTS = {
    "a page": ('<a href="gone.html">gone</a>', "no page"),
    "an anchor": ('<a href="other.html#gone">gone</a>', "no place"),
    "outside": ('<a href="../outside.html">out</a>', "outside of the site"),
    "LaTeX": (r"<p>the \frac{a}{b} of it", "shown as typed"),
    "dollars": ("<p>where $x_i$ is", "shown as typed"),
    "Markdown": ("<p>see [this](page.md)", "shown as typed"),
    "a formula": (r"<math><mi>\foo</mi></math>", "in a formula"),
    "a script": ("<script>undefined.x</script>", "a script failed"),
    "a promise": ("<script>Promise.reject(new Error('no'))</script>", "a script failed"),
    "a complaint": ("<script>console.error('no')</script>", "a script complains"),
    "a picture": ('<img src="gone.png">', "no picture"),
    "a style sheet": (
        '<link rel="stylesheet" href="https://fonts.example.com/x.css">',
        "a request leaves the machine",
    ),
}


@pytest.mark.skipif(
    not any(map(shutil.which, browse.NAMES)), reason="Chromium is a package of the system"
)
def test_the_browser_finds_each_fault(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    (tmp_path / "outside.html").write_text(OTHER)
    (folder / "other.html").write_text(OTHER)
    (folder / "sound.html").write_text(SOUND)
    for name, (html, _) in FAULTS.items():
        (folder / f"{name}.html").write_text(SOUND + html)
    faults = browse.browse(folder).faults
    for name, (_, expected) in FAULTS.items():
        mine = [f for f in faults if f.startswith(f"{name}.html: ")]
        assert any(expected in f for f in mine), f"{name}: {faults}"
        faults = [f for f in faults if f not in mine]
    assert faults == []
