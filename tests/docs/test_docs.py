"""The code in the README and in the docs runs, in the order in which it is read; the table of ops
is the database's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from custom_backprop.testing.table import markdown

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted(
        p for p in (ROOT / "docs").glob("*.md") if "```python" in p.read_text(encoding="utf-8")
    ),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    script = tmp_path / "page.py"  # a file: triton reads the source of its kernels
    script.write_text("\n".join(blocks), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_table_of_ops_is_the_database():
    assert (ROOT / "docs" / "ops.md").read_text(encoding="utf-8") == markdown(), (
        "python -m custom_backprop.testing.table > docs/ops.md"
    )


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)", prose)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
