"""LaTeX as MathML, which browsers draw themselves: a page needs no script and no font for it."""

from __future__ import annotations

import re
from html import escape
from itertools import pairwise
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

_ENVIRONMENTS = re.compile(r"\\(begin|end)\{(aligned|align|split|gathered|gather|equation)\*?\}")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|operatorname)\{[^}]*\}")
_TEXT = re.compile(r">([^<]+)<")
logger = logging.getLogger(__name__)


class NotMathematics(ValueError):
    """What is not LaTeX that can be drawn."""


def mathml(latex: str, *, block: bool = False) -> str:
    """``latex`` as an element ``math``.

    Raises:
        NotMathematics: a command is unknown, or a brace or an environment does not end.
    """
    if len(re.findall(r"(?<!\\){", latex)) != len(re.findall(r"(?<!\\)}", latex)):
        raise NotMathematics(f"a brace has no partner: {latex!r}")
    try:
        found = convert(_rows(latex.strip()), display="block" if block else "inline", xmlns="")
    except Exception as error:  # each fault has its own class there
        raise NotMathematics(f"{type(error).__name__}: {latex!r}") from error
    left = [text for text in _TEXT.findall(found) if "\\" in text or text in ("&", "&#x00026;")]
    if left:
        raise NotMathematics(f"{left[0]!r} is not known: {latex!r}")
    found = re.sub(r"<(?![/a-zA-Z])", "&lt;", re.sub(r"&(?![#\w]+;)", "&amp;", found))  # of \text
    root = ElementTree.fromstring(found)
    if any(len(fraction) != 2 for fraction in root.iter("mfrac")):
        raise NotMathematics(f"half a fraction: {latex!r}")
    _polish(root)
    return ElementTree.tostring(root, encoding="unicode")


def _polish(element: Element) -> None:
    """Changes what the converter gives to what browsers draw well."""
    for child in list(element):
        _polish(child)
    text = element.text or ""
    if element.tag == "mo":
        if re.fullmatch(r"[^\W\d_][\w ]*|∂", text):  # a name, which has no space on both sides
            element.tag = "mi"
            element.attrib.clear()
            if len(text) == 1 and text != "∂":  # upright, as names of several letters are
                element.set("mathvariant", "normal")
        elif text == "/":
            element.attrib |= {"lspace": "0", "rspace": "0"}
        elif text == "|" and "fence" not in element.attrib:
            element.attrib |= {"stretchy": "false", "lspace": "0", "rspace": "0"}
    elif element.tag == "mtd" and "columnalign" in element.attrib:
        element.set("style", f"text-align: {element.attrib.pop('columnalign')}")
    elif element.tag == "mtable":
        element.set("displaystyle", "true")
    elif element.tag == "msup" and element[1].text and set(element[1].text) <= set("′″‴"):
        element.tag, element[1].tag = "mrow", "mo"  # a prime is small and raised by itself
        element[1].attrib |= {"lspace": "0", "rspace": "0", "form": "postfix"}
    if element.tag in ("mrow", "math", "mtd"):
        _space_names(element)


def _space_names(row: Element) -> None:
    """A thin space between the name of a function and a letter: log p."""
    children = list(row)
    for before, after in pairwise(children):
        names = _is_name(before), _is_name(after)
        if any(names) and not any(c.tag in ("mo", "mspace", "mtext") for c in (before, after)):
            row.insert(list(row).index(after), Element("mspace", width="0.1667em"))


def _is_name(element: Element) -> bool:
    while element.tag in ("msub", "msup", "msubsup", "munder", "mrow") and len(element):
        element = element[0]
    return element.tag == "mi" and len(element.text or "") > 1


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
