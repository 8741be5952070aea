"""LaTeX as MathML, which browsers draw themselves: a page needs no script and no font for it."""

from __future__ import annotations

import re
from html import escape

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

_ENVIRONMENTS = re.compile(r"\\(begin|end)\{(aligned|align|split|gathered|gather|equation)\*?\}")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|operatorname)\{[^}]*\}")
_WORD = re.compile(r"<mo>([^<>&]*[^\W\d_]{2,}[^<>&]*)</mo>")
_LETTER = re.compile(r"<mo>([^\W\d_])</mo>")
_ALIGN = re.compile(r'<mtd columnalign="(\w+)">')
_TEXT = re.compile(r">([^<]+)<")
logger = logging.getLogger(__name__)


class NotMathematics(ValueError):
    """What is not LaTeX that can be drawn."""


def mathml(latex: str, *, block: bool = False) -> str:
    """``latex`` as an element ``math``.

    Raises:
        NotMathematics: a command is unknown, or a brace or an environment does not end.
    """
    try:
        found = convert(_rows(latex.strip()), display="block" if block else "inline")
    except Exception as error:  # each fault has its own class there
        raise NotMathematics(f"{type(error).__name__}: {latex!r}") from error
    left = [text for text in _TEXT.findall(found) if "\\" in text or text in ("&", "&#x00026;")]
    if left:
        raise NotMathematics(f"{left[0]!r} is not known: {latex!r}")
    # \operatorname: a name, which has no space on both sides
    found = _WORD.sub(r"<mi>\1</mi>", found)
    # what browsers draw: a table's cells by style, and its fractions large
    found = _ALIGN.sub(r'<mtd style="text-align: \1">', found)
    found = found.replace("<mtable", '<mtable displaystyle="true"')
    return _LETTER.sub(r'<mi mathvariant="normal">\1</mi>', found)


def _rows(latex: str) -> str:
    """Rows that are aligned at ``&``, as a table: the converter knows no other."""
    latex = re.sub(r"\\(begin|end)\{equation\*?\}", "", latex)
    latex = _TEXT_COMMAND.sub(lambda m: m[0].replace(r"\_", "_"), latex)
    begin = _ENVIRONMENTS.search(latex)
    if begin is None and re.search(r"(?<!\\)\\\\", latex) and "\\begin" not in latex:
        return rf"\begin{{array}}{{rl}}{latex}\end{{array}}"
    columns = "c" if begin and begin[2].startswith("gather") else "rl" * 4
    return _ENVIRONMENTS.sub(
        lambda m: rf"\{m[1]}{{array}}" + (f"{{{columns}}}" if m[1] == "begin" else ""), latex
    )


def _inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(_or_warning(node.astext(), node, block=False))
    raise nodes.SkipNode


def _block(self: HTML5Translator, node: nodes.math_block) -> None:
    identity = f' id="{escape(node["ids"][0])}"' if node.get("ids") else ""
    self.body.append(f'<div class="math"{identity}>')
    self.body.append(_or_warning(node.astext(), node, block=True))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def _or_warning(latex: str, node: nodes.Element, *, block: bool) -> str:
    try:
        return mathml(latex, block=block)
    except NotMathematics as error:
        logger.warning("%s", error, location=node, type="mathml")
        return f"<code>{escape(latex)}</code>"


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
