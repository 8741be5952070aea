"""One page a check of :func:`custom_backprop.testing.validate`, from its docstring and source."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from custom_backprop.testing import CHECKS

from . import pages, prose
from .ops import table

FOLDER = "reference/checks"


def by_module() -> dict[str, list[Callable[..., Any]]]:
    """The checks of each file, in their order."""
    found: dict[str, list[Callable[..., Any]]] = {}
    for check in CHECKS.values():
        found.setdefault(check.__module__, []).append(check)
    return found


def page(name: str) -> str:
    check = CHECKS[name]
    file = Path(inspect.getsourcefile(check) or "")
    where = f"[{file.relative_to(pages.ROOT)}](/{pages.docname(file)}.md)"
    source = inspect.getsource(check).rstrip()
    return (
        f"# {name}\n\n{prose.markdown(check.__doc__ or '', _links())}\n\n"
        f"## Run it alone\n\n````python\nfrom custom_backprop.testing import validate\n\n"
        f'print(validate(MyFunction.apply, inputs, reference, checks=["{name}"]))\n````\n\n'
        f"## How it checks\n\n{where}\n\n````python\n{_without_docstring(source)}\n````\n\n"
        f"[All checks](/{FOLDER}/index.md); [how to validate](/validate.md).\n"
    )


def _links() -> dict[str, str]:
    return {name: f"/{FOLDER}/{name}.md" for name in CHECKS}


def _without_docstring(source: str) -> str:
    """The source of a function, without the text that the page shows already."""
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    lines, first = source.split("\n"), function.body[0]
    if ast.get_docstring(function) is None or len(function.body) < 2:
        return source
    return "\n".join(lines[: first.lineno - 1] + lines[first.end_lineno :])


def index() -> str:
    parts = [
        "# Checks\n\nWhat `custom_backprop.testing.validate` checks of a backward. Each finds "
        "*right* or *wrong*; what the code does not offer, and what this machine cannot run, is "
        "neither."
    ]
    modules = by_module()
    for module, checks in modules.items():
        if len(modules) > 1:
            about = (sys.modules[module].__doc__ or module).strip().split("\n\n")[0]
            parts.append(prose.prose(about))
        rows = [[f"[`{c.__name__}`](/{FOLDER}/{c.__name__}.md)", _summary(c)] for c in checks]
        parts.append(table(["check", "what it finds"], rows))
    tree = "\n".join(f"/{FOLDER}/{name}" for name in CHECKS)
    return "\n\n".join(parts) + f"\n\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n"


def _summary(check: Callable[..., Any]) -> str:
    first = inspect.cleandoc(check.__doc__ or "").split("\n\n")[0]
    return prose.prose(" ".join(first.split()), _links())


def generate() -> None:
    pages.write(f"{FOLDER}/index", index())
    for name in CHECKS:
        pages.write(f"{FOLDER}/{name}", page(name))


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", lambda app: generate(), priority=400)
