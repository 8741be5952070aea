"""The site: ``sphinx-build -W docs build/site``. ``website/`` has what is more than Sphinx."""

from __future__ import annotations

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]
# the pages of ops run kernels, which needs no GPU; triton asks before its first import
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import custom_backprop  # noqa: E402

project = "custom_backprop"
author = "The custom_backprop authors"
copyright = f"2026, {author}"
version = release = custom_backprop.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "website"]
exclude_patterns = ["website", "_static"]

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_block", "attrs_inline"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page for GitHub may start with a lower heading

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # torch's
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"custom_backprop {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#b8371a",
        "color-brand-content": "#b8371a",
        "color-brand-visited": "#93402c",
    },
    "dark_css_variables": {
        "color-brand-primary": "#ff8a65",
        "color-brand-content": "#ff8a65",
        "color-brand-visited": "#e0a08a",
    },
}
