"""What the site has beyond Sphinx: a Sphinx extension, in small parts."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

from . import docstrings, mathml, ops, pages


def setup(app: Sphinx) -> dict[str, Any]:
    mathml.setup(app)
    docstrings.setup(app)
    pages.setup(app)
    ops.setup(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
