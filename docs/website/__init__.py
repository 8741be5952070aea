"""What the site has beyond Sphinx: a Sphinx extension, in small parts."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from . import api, checks, docstrings, guides, mathml, ops, pages


def setup(app: Sphinx) -> dict[str, Any]:
    for part in (api, checks, docstrings, guides, mathml, ops, pages):
        part.setup(app)
    code = b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))
    return {
        "env_version": zlib.crc32(code),  # pages are read again if this package has changed
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
