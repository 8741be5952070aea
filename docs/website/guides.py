"""Pages that people write: plain formulas in them become mathematics, and an op's name in code
becomes a link to its page."""

from __future__ import annotations

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util.nodes import make_refnode

from custom_backprop.testing import CHECKS, database

from . import notation, prose

_WRITTEN_HERE = ("reference/ops/", "reference/families/", "reference/checks/", "reference/api/")
_OWN = (nodes.literal, nodes.math, nodes.literal_block, nodes.math_block, nodes.raw)
#: pages in whose tables names are those of checks
NAMES_CHECKS = ("validate", "peers")
#: a link whose text stays code
REFERENCE = "page of the site"
_QUALIFIED = re.compile(r"(?:custom_backprop\.)?(?:(?:functional|nn|F)\.)?(\w+)(?:\(.*\))?")


def by_name() -> dict[str, str]:
    """What a page may name -> the page of the op: functions, and their modules."""
    found = {}
    for spec in database().values():
        page = f"/reference/ops/{spec.name}"
        found[spec.name] = page
        if spec.module:
            found.setdefault(spec.module[0].__name__, page)
    return found


class Guides(SphinxTransform):
    """Changes the tree of a page, after it was read and before its links are followed."""

    default_priority = 700

    def apply(self, **kwargs: object) -> None:
        name = self.env.docname
        if name.startswith(_WRITTEN_HERE) or name.startswith("reference/source/"):
            return
        if name != "ops":
            self._formulas()
        self._links(name)

    def _formulas(self) -> None:
        for block in list(self.document.findall(nodes.literal_block)):
            if block.get("language") in (None, "none", "default"):
                mathematics = prose.equations(block.astext().rstrip())
                if mathematics.startswith("```{math}"):
                    latex = mathematics.removeprefix("```{math}\n").removesuffix("\n```")
                    new = nodes.math_block(latex, latex, nowrap=False, number=None, label=None)
                    new["docname"] = self.env.docname
                    block.replace_self(new)
        for text in list(self.document.findall(nodes.Text)):
            if not _inside(text, (*_OWN, nodes.title, addnodes.pending_xref, nodes.reference)):
                pieces = notation.inline(text.astext(), names=False)
                if any(formula for _, formula in pieces):
                    text.parent.replace(
                        text,
                        [nodes.math(p, p) if formula else nodes.Text(p) for p, formula in pieces],
                    )

    def _links(self, name: str) -> None:
        pages = {} if name == "peers" else by_name()  # there the names are those of others
        for literal in list(self.document.findall(nodes.literal)):
            m = _QUALIFIED.fullmatch(literal.astext())
            if m is None or _inside(literal, (nodes.title, addnodes.pending_xref, nodes.reference)):
                continue
            target = pages.get(m[1])
            if m[0] in CHECKS and name in NAMES_CHECKS and _inside(literal, (nodes.entry,)):
                target = f"/reference/checks/{m[0]}"
            if target:
                link = addnodes.pending_xref(
                    "", refdomain="", reftype=REFERENCE, reftarget=target, refwarn=True, refdoc=name
                )
                literal.replace_self(link)
                link += literal


def _inside(node: nodes.Node, kinds: tuple[type[nodes.Element], ...]) -> bool:
    parent = node.parent
    while parent is not None:
        if isinstance(parent, kinds):
            return True
        parent = parent.parent
    return False


def _resolve(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.Element
) -> nodes.Element | None:
    page = node["reftarget"].removeprefix("/")
    if node["reftype"] != REFERENCE or page not in env.all_docs:
        return None
    return make_refnode(app.builder, node["refdoc"], page, None, text)


def setup(app: Sphinx) -> None:
    app.add_transform(Guides)
    app.connect("missing-reference", _resolve)
