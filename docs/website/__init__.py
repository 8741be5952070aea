"""What the site has beyond Sphinx: a Sphinx extension, in small parts."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

from . import api, checks, docstrings, guides, mathml, ops, pages


def setup(app: Sphinx) -> dict[str, Any]:
    for part in (api, checks, docstrings, guides, mathml, ops, pages):
        part.setup(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
