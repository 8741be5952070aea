"""One page a public module, by autodoc. What has a page of its own is linked."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx

from . import pages
from .guides import by_name

FOLDER = "reference/api"
#: the public modules, and what each is for in a few words
MODULES = {
    "custom_backprop": "convert a model, and choose the backend",
    "custom_backprop.nn": "layers and losses",
    "custom_backprop.functional": "functions",
    "custom_backprop.optim": "optimizers",
    "custom_backprop.init": "initialisation",
    "custom_backprop.monitor": "vanishing and exploding gradients",
    "custom_backprop.testing": "proofs of a backward",
    "custom_backprop.cost": "what a step costs",
    "custom_backprop.distributed": "several processes",
    "custom_backprop.extend": "ops of your own",
}


def page(name: str) -> str:
    module = import_module(name)
    parts = [f".. automodule:: {name}\n   :no-members:"]
    known = by_name() if name.endswith((".nn", ".functional")) else {}
    linked = []
    for public in sorted(module.__all__, key=str.lower):
        value = getattr(module, public)
        if public in known:
            linked.append(f"* :doc:`{public} <{known[public]}>`")
        elif not isinstance(value, ModuleType):
            parts.append(_entry(name, public, value))
    if linked:
        names = "\n".join(f"   {line}" for line in linked)
        parts.insert(1, f"Each of these has a page:\n\n.. hlist::\n   :columns: 3\n\n{names}")
    return f"# {name}\n\n```{{eval-rst}}\n" + "\n\n".join(parts) + "\n```\n"


def _entry(module: str, name: str, value: Any) -> str:
    if inspect.isclass(value):
        options = "\n   :members:" if value.__module__.startswith("custom_backprop") else ""
        return f".. autoclass:: {module}::{name}{options}"
    if callable(value) and not isinstance(value, dict):
        return f".. autofunction:: {module}::{name}"
    return f".. py:data:: {module}.{name}\n   :type: {type(value).__name__}"


def index() -> str:
    rows = "\n".join(f"- [`{n}`](/{FOLDER}/{n}.md): {about}" for n, about in MODULES.items())
    tree = "\n".join(f"/{FOLDER}/{n}" for n in MODULES)
    return f"# API\n\n{rows}\n\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n"


def generate() -> None:
    pages.write(f"{FOLDER}/index", index())
    for name in MODULES:
        pages.write(f"{FOLDER}/{name}", page(name))


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", lambda app: generate(), priority=400)
