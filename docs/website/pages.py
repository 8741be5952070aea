"""Pages that are written for GitHub, on the site: links to files of the repository lead to pages
with them, and the table of contents is the list in ``index.md``.

What is made from the repository lies in ``docs/reference/``, which is written before each build and
not committed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
GENERATED = DOCS / "reference"

#: the end of the list in ``index.md``: pages that are not on GitHub
NOT_BY_HAND = """\
- [Checks](/reference/checks/index.md): what `validate` checks, and which bug each check finds
- [API](/reference/api/index.md): the public modules
"""
_FENCE = re.compile(r"^(```+|~~~+).*?^\1[ \t]*$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_SOURCE = re.compile(r"(?<=\]\()/reference/source/([^)]+)\.md(?=\))")
_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
_ITEM = re.compile(r"^- \[([^\]]*)\]\(([^)#\s]+)\.md\)", re.MULTILINE)


def is_written_by_hand(path: Path) -> bool:
    """Whether it is a page of ``docs/``, or of a folder with its translations."""
    return path.suffix == ".md" and path.parent in (DOCS, DOCS / "zh")


def docname(path: Path) -> str:
    """The name of the page that shows a file of the repository."""
    if is_written_by_hand(path):
        return str(path.relative_to(DOCS).with_suffix(""))
    name = path.relative_to(ROOT)
    return f"reference/{name.with_suffix('') if path.suffix == '.md' else Path('source', name)}"


def outside_code(change: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """The matches that are not in a block of code."""
    fences = [m.span() for m in _FENCE.finditer(text)]
    for m in change.finditer(text):
        if not any(start <= m.start() < end for start, end in fences):
            yield m


def files_linked(page: Path) -> list[tuple[re.Match[str], Path]]:
    """The links of a page that lead to files: the match, and the file."""
    found = []
    for m in outside_code(_LINK, page.read_text(encoding="utf-8")):
        if "://" in m[1] or m[1].startswith(("/", "mailto:")):
            continue
        file = Path(os.path.normpath(page.parent / m[1]))
        if file.is_dir():
            file /= "README.md"
        if file.is_file() and file.is_relative_to(ROOT):
            found.append((m, file))
    return found


def rewritten(page: Path) -> str:
    """The text of a page with its links as the site has them."""
    text, parts, last = page.read_text(encoding="utf-8"), [], 0
    for m, file in files_linked(page):
        if file.suffix in (".png", ".svg"):
            inside = file if file.is_relative_to(DOCS) else GENERATED / file.relative_to(ROOT)
            to = f"/{inside.relative_to(DOCS)}"
        else:
            to = f"/{docname(file)}.md{m[2] or ''}"
        parts += [text[last : m.start()], to]
        last = m.end()
    return "".join([*parts, text[last:]])


#: the pages that this build has written
written: set[Path] = set()


def write(name: str, text: str) -> None:
    """A generated page; untouched where it has this text already, so that it is not built again."""
    file = DOCS / f"{name}.md"
    written.add(file)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def source_page(file: Path) -> str:
    """A page that shows a file."""
    name = file.relative_to(ROOT)
    language = {".py": "python", ".toml": "toml", ".json": "json"}.get(file.suffix, "text")
    return (
        f"---\norphan: true\n---\n\n# {name}\n\n"
        f"```{{literalinclude}} /../{name}\n:language: {language}\n:linenos:\n```\n"
    )


def generate() -> None:
    """Writes a page for each file of the repository that a page links to, and removes those that
    no build writes any more."""
    waiting = [*sorted(DOCS.glob("*.md")), *(ROOT / n for n in ("README.md", "CHANGELOG.md"))]
    for page in list(written):  # by other parts of this package, which name source pages
        waiting += [ROOT / m[1] for m in _SOURCE.finditer(page.read_text(encoding="utf-8"))]
    done: set[Path] = set()
    while waiting:
        page = waiting.pop()
        if page in done:
            continue
        done.add(page)
        for _, file in files_linked(page) if page.suffix == ".md" else ():
            if file.suffix not in (".png", ".svg"):
                waiting.append(file)
            elif not file.is_relative_to(DOCS):
                copy = GENERATED / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    for page in done:
        if page.suffix != ".md":
            write(docname(page), source_page(page))
        elif page.parent == ROOT:  # in the table of contents
            write(docname(page), rewritten(page))
        elif not is_written_by_hand(page):
            write(docname(page), f"---\norphan: true\n---\n\n{rewritten(page)}")
    for file in GENERATED.rglob("*.md"):
        if file not in written:
            file.unlink()


def contents(text: str) -> str:
    """Tables of contents made from the lists of links under the headings of ``index.md``. What no
    list names follows the guides, and what is not written by hand the last list."""
    trees = []
    _, *parts = _HEADING.split(text)
    for caption, section in zip(parts[::2], parts[1::2], strict=True):
        if names := _ITEM.findall(section):
            trees.append((caption, names))
    listed = {name for _, names in trees for _, name in names}
    rest = sorted(p.stem for p in DOCS.glob("*.md") if f"/{p.stem}" not in listed)
    entries = {caption: [f"{title} <{name}>" for title, name in names] for caption, names in trees}
    entries["Guides"] += [f"/{n}" for n in rest if n != "index"]
    entries["Reference"] += ["/reference/checks/index", "/reference/api/index"]
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(names) + "\n```\n"
        for caption, names in entries.items()
    )


def _read(app: Sphinx, name: str, source: list[str]) -> None:
    page = DOCS / f"{name}.md"
    if is_written_by_hand(page):
        source[0] = rewritten(page)
        if name == "index":
            source[0] += f"{NOT_BY_HAND}{contents(source[0])}"


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", lambda app: generate())
    app.connect("source-read", _read)
