"""One page an op, and one a family: written from the database, the formulas' docstrings, the
sources, what is measured here and what benchmarks have measured."""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from sphinx.application import Sphinx

from custom_backprop.testing import OpSpec, database

from . import figures, measures, notation, pages, prose, sources
from .pages import DOCS, ROOT

FOLDER = "reference/ops"
DIFFERENCES = DOCS / "differences.md"
PER_WHAT = {"formula": "formula", "aten": "ATen", "triton": "Triton, interpreted", "stock": "stock"}
ABOUT_UNITS = {
    True: "Each element's error in units in its own last place, at 2001 points in [-10, 10].",
    False: "The largest error of a tensor in units in the last place of its largest element, over "
    "small samples.",
}
#: of how many points one is drawn
ERRORS_SHOWN = 4
#: a family of more ops describes what they share, and each of them derives its own
LARGE = 4
#: parts of the repository that a page is made from
MADE_FROM = ("custom_backprop", "triton_kernels", "docs/website")


def families() -> dict[str, list[OpSpec]]:
    found: dict[str, list[OpSpec]] = {}
    for spec in database().values():
        found.setdefault(spec.family, []).append(spec)
    return found


def page(name: str) -> str:
    """The page of an op, but for what is in files that change without the code: tables of speed,
    differences, guides."""
    torch.set_num_threads(1)
    spec = database()[name]
    formulas = sources.formulas(spec)
    kernels, shared = sources.kernels(spec)
    return "\n\n".join(
        [
            _reference(spec),
            f"## Formula\n\n{prose.formula(spec.formula)}\n\n{_notation()}",
            f"## Derivation\n\n{_derivation(spec, formulas)}",
            _picture(spec) if spec.elementwise else _shapes(spec),
            f"## Saved for backward\n\n{_saved(spec)}",
            f"## Formula and kernel\n\n{_side_by_side(formulas, kernels, shared)}",
            f"## Accuracy\n\n{_accuracy(spec)}",
        ]
    )


def _reference(spec: OpSpec) -> str:
    lines = [f".. autofunction:: custom_backprop.functional::{spec.name}"]
    if spec.module:
        lines.append(
            f".. autoclass:: custom_backprop.nn::{spec.module[0].__name__}\n   :no-members:"
        )
    return "```{eval-rst}\n" + "\n\n".join(lines) + "\n```"


def _notation() -> str:
    return (
        "Here $\\operatorname{d}\\!y$ stands for $\\partial L/\\partial y$, the gradient of the "
        "loss, and so on for each tensor; $[c]$ is 1 where $c$ holds, else 0."
    )


def _derivation(spec: OpSpec, formulas: Sequence[sources.Function]) -> str:
    file = sources.FORMULAS / f"{spec.family}.py"
    module = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    steps, shown = [], set()
    for function in formulas:
        if function.docstring and function.docstring not in shown:
            shown.add(function.docstring)
            steps.append(
                f":::{{container}} step\n`{function.name}`\n\n"
                f"{prose.markdown(function.docstring, links())}\n:::"
            )
    whole = prose.markdown(module, links())
    if len(families()[spec.family]) > LARGE:
        return "\n\n".join([*steps, f"### All of the family\n\n{whole}"])
    return "\n\n".join([whole, "### Step by step", *steps])


def links() -> dict[str, str]:
    """What docstrings refer to -> the page of its family."""
    return {
        f"custom_backprop.formulas.{family}": f"/reference/families/{family}.md"
        for family in families()
    }


def _picture(spec: OpSpec) -> str:
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    y, first, second = measures.curves(spec, x)
    lines = [("y", y), ("dy/dx", first)]
    if second is not None:
        lines.append(("d²y/dx²", second))
    arguments = next(iter(spec.samples(measures.Make("cpu", torch.float64)))).kwargs
    given = "".join(f", {k}={v}" for k, v in arguments.items())
    svg = figures.curves(x, lines, f"{spec.name}: y, dy/dx and the second derivative")
    return f"## Picture\n\n`{spec.name}(x{given})`:\n\n```{{raw}} html\n{svg}\n```"


def _shapes(spec: OpSpec) -> str:
    rows = [[f"`{n}`", _shape(t.shape), str(t.dtype)[6:]] for n, t in measures.shapes(spec)]
    return "## Shapes\n\nOf a small call:\n\n" + table(["tensor", "shape", "dtype"], rows)


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "one number"


def _saved(spec: OpSpec) -> str:
    rows = []
    for who, function in (("ours", spec.function), ("stock", spec.reference)):
        kept = measures.saved(spec, function)
        what = "; ".join(
            f"{f'`{s.what}`' if s.what else 'new'} {_shape(s.shape)} {s.dtype}" for s in kept
        )
        new = sum(s.bytes for s in kept if not s.what)
        rows.append([who, what or "nothing", f"{sum(s.bytes for s in kept):,}", f"{new:,}"])
    return (
        "Of the same small call. Arguments and results are kept alive anyway by the layers around; "
        "what is *new* is memory that only backward needs.\n\n"
        + table(["", "what", "bytes", "of them new"], rows)
    )


def _side_by_side(
    formulas: Sequence[sources.Function],
    kernels: Sequence[sources.Function],
    shared: Sequence[sources.Function],
) -> str:
    left, right = (_listing(functions) for functions in (formulas, kernels))
    text = (
        "The mathematics in plain torch, which runs when backward is itself differentiated, and "
        "the kernels, which run on a GPU. "
        "Both as one forward and one backward enter them.\n\n"
        f"::::{{container}} side-by-side\n:::{{container}} side\n{left}\n:::\n"
        f":::{{container}} side\n{right}\n:::\n::::"
    )
    if shared:
        names = ", ".join(f"`{f.file.stem}.{f.name}`" for f in shared)
        text += f"\n\nWhat the kernels share with others: {names}."
    return text


def _listing(functions: Sequence[sources.Function]) -> str:
    by_file: dict[Any, list[sources.Function]] = {}
    for function in functions:
        by_file.setdefault(function.file, []).append(function)
    parts = []
    for file, found in by_file.items():
        code = "\n\n\n".join(f.text for f in found)
        name = file.relative_to(ROOT)
        parts.append(f"[{name}](/{pages.docname(file)}.md)\n\n````python\n{code}\n````")
    return (
        "\n\n".join(parts) or "No kernel of its own: it runs those of the ops that it is made of."
    )


def _accuracy(spec: OpSpec) -> str:
    rows = []
    for dtype, by_backend in measures.accuracy(spec).items():
        for name, (y, dx) in by_backend.items():
            rows.append([dtype, PER_WHAT[name], _units(y), _units(dx)])
    picture = ""
    if spec.elementwise:
        x, off = measures.errors_over(spec)
        lines = [(PER_WHAT[n], off[n][::ERRORS_SHOWN]) for n in ("stock", "triton")]
        title = f"{spec.name}: error of the gradient in float32 over x"
        svg = figures.errors(x[::ERRORS_SHOWN], lines, title)
        picture = f"\n\nThe gradient in float32, over x:\n\n```{{raw}} html\n{svg}\n```"
    return (
        f"{prose.escaped(ABOUT_UNITS[spec.elementwise])} The truth is stock's own in float64. "
        "Half a unit is a result that is rounded once. Measured on a CPU while this page was "
        "built; Triton's interpreter rounds as a GPU does, but for its elementary functions.\n\n"
        + table(["dtype", "computed by", "y", "gradients"], rows)
        + picture
    )


def _units(error: measures.Error) -> str:
    number = f"{error.units:.2f}" if error.units < 1000 else f"{error.units:.1e}"
    return number if error.at is None or error.units < 2 else f"{number} at x = {error.at:.4g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |"
                     for line in lines)  # fmt: skip


def speed(name: str) -> str:
    """The rows of an op in the tables of benchmarks."""
    parts = []
    for results, rows in measures.speed(name).items():
        machine = measures.results()[results]["machine"]
        about = "; ".join(f"{k}: {v}" for k, v in machine.items())
        cells = []
        for r in rows:
            memory = (
                f"{r['ours_bytes'] / 2**20:.1f} / {r['stock_bytes'] / 2**20:.1f}"
                if "ours_bytes" in r
                else ""
            )
            cells.append(
                [
                    r["size"], r["direction"], f"{r['ours'] * 1e6:.4g}", f"{r['stock'] * 1e6:.4g}",
                    f"**{r['ratio']:.2f}**", f"{r['low']:.2f} to {r['high']:.2f}", memory,
                ]
            )  # fmt: skip
        head = [
            "size",
            "",
            "ours, µs",
            "stock, µs",
            "stock / ours",
            "quartiles",
            "MiB, ours / stock",
        ]
        parts.append(f"**{results}**: {prose.escaped(about)}.\n\n{table(head, cells)}")
    if not parts:
        return "Not in the tables of [benchmarks/results](/reference/benchmarks/results/README.md)."
    about = "Above 1 ours is faster. MiB: the peak of forward and backward, ours / stock."
    return "\n\n".join([about, *parts])


def differences(name: str) -> str:
    """What the page of differences says of an op, with links to its sections."""
    text = pages.rewritten(DIFFERENCES)
    parts = []
    for section in re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]:
        title = section.split("\n", 1)[0].removeprefix("## ")
        found = []
        for block in re.split(r"\n\s*\n", re.sub(r"^```.*?^```", "", section, flags=re.S | re.M)):
            rows = block.strip().split("\n")
            if rows[0].startswith("|"):
                hits = [row for row in rows[2:] if _names(row, name)]
                found += ["\n".join([*rows[:2], *hits])] if hits else []
            elif not rows[0].startswith("#") and _names(block, name):
                found.append(block.strip())
        if found:
            anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            parts += [f"**[{title}](/differences.md#{anchor})**", *found]
    general = "[Differences from stock PyTorch](/differences.md) has those of all ops."
    return "\n\n".join([*parts, general])


def _names(text: str, name: str) -> bool:
    return bool(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text))


def guides(spec: OpSpec) -> str:
    """Links to the guides that name an op."""
    wanted = {spec.name} | ({spec.module[0].__name__} if spec.module else set())
    pattern = re.compile(
        rf"`(?:\w+\.)*(?:{'|'.join(wanted)})(?:\([^`]*\))?`|[.](?:{'|'.join(wanted)})\("
    )
    found = []
    for file in sorted(DOCS.glob("*.md")):
        text = file.read_text(encoding="utf-8")
        if file.stem not in ("index", "ops", "differences") and pattern.search(text):
            found.append(f"- [{text.split(chr(10), 1)[0].removeprefix('# ')}](/{file.stem}.md)")
    return "\n".join(found)


def whole(spec: OpSpec, made: str) -> str:
    """The page with its head and with what changes without the code."""
    family = f"[{spec.family}](/reference/families/{spec.family}.md)"
    parts = [f"# {spec.name}", f"Family: {family}.", made, f"## Speed\n\n{speed(spec.name)}",
             f"## Differences from stock\n\n{differences(spec.name)}"]  # fmt: skip
    if found := guides(spec):
        parts.append(f"## Read on\n\n{found}")
    return "\n\n".join(parts) + "\n"


def family_page(family: str, specs: Sequence[OpSpec]) -> str:
    files = [ROOT / "custom_backprop" / part / f"{family}.py"
             for part in ("formulas", "ops", "backends", "functional", "nn")]  # fmt: skip
    files.append(ROOT / "triton_kernels" / f"{family}.py")
    module = ast.get_docstring(ast.parse(files[0].read_text(encoding="utf-8"))) or ""
    rows = [[f"[`{s.name}`](/{FOLDER}/{s.name}.md)", _one_line(s.formula)] for s in specs]
    listed = "\n".join(
        f"- [{f.relative_to(ROOT)}](/{pages.docname(f)}.md)" for f in files if f.exists()
    )
    tree = "\n".join(f"/{FOLDER}/{s.name}" for s in specs)
    return (
        f"# {family}\n\n{table(['op', 'formula'], rows)}\n\n## Derivation\n\n"
        f"{prose.markdown(module, links())}\n\n## Files\n\n{listed}\n\n"
        f"```{{toctree}}\n:hidden:\n\n{tree}\n```\n"
    )


def _one_line(formula: str) -> str:
    try:
        return "; ".join(
            ", ".join(f"${notation.translated(s, words=True)}$" for s in prose.statements(part))
            for part in formula.split(";  ")
        )
    except notation.NotMathematics:
        return prose.escaped(formula)


def table_of_all() -> str:
    """What follows the first lines of ``ops.md`` on the site."""
    parts = []
    for family, specs in families().items():
        rows = [[f"[`{s.name}`](/{FOLDER}/{s.name}.md)" + (
                 f", `nn.{s.module[0].__name__}`" if s.module else ""), _one_line(s.formula)]
                for s in specs]  # fmt: skip
        parts.append(
            f"## [{family}](/reference/families/{family}.md)\n\n{table(['op', 'formula'], rows)}"
        )
    tree = "\n".join(f"/reference/families/{family}" for family in families())
    return "\n\n".join(parts) + f"\n\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n"


def generate() -> None:
    """Writes the pages. What is measured is measured again only if the code has changed."""
    cache = pages.GENERATED / "measured.json"
    state = _state()
    made = json.loads(cache.read_text(encoding="utf-8")) if cache.exists() else {}
    if made.get("state") != state:
        workers = min(os.cpu_count() or 1, 8)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            found = dict(zip(database(), pool.map(page, database(), chunksize=2), strict=True))
        made = {"state": state, "pages": found}
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(made), encoding="utf-8")
    for spec in database().values():
        pages.write(f"{FOLDER}/{spec.name}", whole(spec, made["pages"][spec.name]))
    for family, specs in families().items():
        pages.write(f"reference/families/{family}", family_page(family, specs))


def _state() -> str:
    """What the measured part of the pages depends on."""
    digest = hashlib.sha256(torch.__version__.encode())
    for part in MADE_FROM:
        for file in sorted((ROOT / part).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _read(app: Sphinx, name: str, source: list[str]) -> None:
    if name == "ops":
        source[0] = source[0].split("\n## ", 1)[0] + "\n" + table_of_all()


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", lambda app: generate(), priority=400)
    app.connect("source-read", _read, priority=600)
