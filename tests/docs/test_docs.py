"""The code in the README and in the docs runs, from top to bottom, and prints what the page shows.
The table of ops agrees with the database."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pages import agree, commands, outputs, python_blocks, script

from benchmarks import performance
from custom_backprop.testing import CHECKS
from custom_backprop.testing.table import markdown

ROOT = Path(__file__).parents[2]
ALL = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TRANSLATED = sorted((ROOT / "docs" / "zh").glob("*.md"))
PAGES = [p for p in ALL if "```python" in p.read_text(encoding="utf-8")]
COMMANDS = [
    pytest.param(shown, id=f"{page.name}: {shown.code}")
    for page in ALL
    for shown in commands(page.read_text(encoding="utf-8"))
]


def printed_by(*arguments: str, cwd: Path | None = None) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run_and_print_what_is_shown(page, tmp_path):
    blocks = python_blocks(page.read_text(encoding="utf-8"))
    program = tmp_path / "page.py"  # a file, since triton reads the source of its kernels
    program.write_text(script(blocks), encoding="utf-8")
    found = outputs(printed_by(str(program), cwd=tmp_path), len(blocks))
    for block, output in zip(blocks, found, strict=True):
        if block.output is not None:
            assert agree(block.output, output), f"shown:\n{block.output}\nprinted:\n{output}"


@pytest.mark.parametrize("shown", COMMANDS)
def test_commands_print_what_is_shown(shown):
    python, *arguments = shlex.split(shown.code)
    assert python == "python"
    output = printed_by(*arguments)
    assert agree(shown.output, output), f"shown:\n{shown.output}\nprinted:\n{output}"


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("a  b\nc", "a b c"),
        ("norm 1.53, at 3", "norm 1.54, at 3"),
        ("1.5e-18", "1.6e-18"),
        ("fallen by ~3.6e-18", "fallen by 9.1e-18"),
        ("float32 of sm_80", "float32 of sm_80"),
    ],
)
def test_what_agrees(shown, printed):
    assert agree(shown, printed)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("a b", "a c"),
        ("a b", "a b c"),
        ("norm 1.53", "norm 1.55"),
        ("step 10", "step 11"),
        ("1.5e-18", "1.5e-17"),
        ("~3.6e-18", "3.7e-17"),
        ("~3.6e-18", "-3.6e-18"),
        ("float32", "float64"),
        ("1.0", "nan"),
    ],
)
def test_what_does_not_agree(shown, printed):
    assert not agree(shown, printed)


def test_the_first_table_of_the_readme_is_measured():
    """Ratios of the converted models to stock, in eager mode."""
    results = (ROOT / "benchmarks" / "results" / "models-cpu.md").read_text(encoding="utf-8")
    speed, memory = (
        {
            row[0].split(",")[0]: re.search(r"\((.*)\)", row[2])[1]
            for row in (line.strip("| ").split(" | ") for line in part.splitlines())
            if len(row) == 5 and "(" in row[2]
        }
        for part in results.split("| peak memory, MiB |")[:2]
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    names = {"Llama": "llama", "GPT-2": "gpt2", "BERT": "bert", "SwiGLU MLPs": "swiglu-mlp"}
    rows = re.findall(r"^\| ([\w -]+), [\d.]+M.* \| ([\d.]+) \| ([\d.]+) \|$", readme, re.MULTILINE)
    assert len(rows) == len(speed) == len(memory)
    for name, fast, small in rows:
        key = names.get(name, name.lower())
        assert (fast, small) == (speed[key], memory[key]), name


def test_the_table_of_checks_names_all():
    page = (ROOT / "docs" / "validate.md").read_text(encoding="utf-8")
    table = page.split("\n| check | what it tests |\n")[1].split("\n\n")[0]
    first_column = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(first_column))
    assert sorted(named) == sorted(CHECKS)


def test_the_table_of_ops_is_the_database():
    assert (ROOT / "docs" / "ops.md").read_text(encoding="utf-8") == markdown(), (
        "python -m custom_backprop.testing.table > docs/ops.md"
    )


def test_performance_is_made_of_the_result_files():
    page = performance.PAGE.read_text(encoding="utf-8")
    assert page == performance.markdown(), "python -m benchmarks.performance"


def test_performance_takes_in_what_a_card_has_measured():
    text = "# Card\n\ntorch: 2\n\n## Times\n\n![a](b.png)\n\n| op |\n|---|\n"
    heading, _, below, figure, table = performance.of_a_card(text)
    assert (heading, below, table) == ("### Card", "#### Times", "| op |\n|---|")
    assert figure == f"![a]({performance.LINK}/b.png)"


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda p: p.name)
def test_a_translated_page_has_the_same_code(page):
    """So the code runs once. Formulas are the same, too, but for words in them."""
    original = (ROOT / "docs" / page.name).read_text(encoding="utf-8")
    translated = page.read_text(encoding="utf-8")
    assert python_blocks(translated) == python_blocks(original)
    found, wanted = (re.findall(r"\$\$.*?\$\$", t, re.DOTALL) for t in (translated, original))
    assert found == wanted
    assert translated.count("\n## ") == original.count("\n## ")


def test_backpropagation_shows_the_network_of_the_tests():
    source = (ROOT / "tests" / "examples" / "numpy_network.py").read_text(encoding="utf-8")
    source = source.replace("from __future__ import annotations\n\n", "")  # not inside a page
    page = (ROOT / "docs" / "backpropagation.md").read_text(encoding="utf-8")
    assert source in [block.code for block in python_blocks(page)]


def test_the_network_worked_by_hand_has_the_numbers_that_are_printed():
    page = (ROOT / "docs" / "backpropagation.md").read_text(encoding="utf-8")
    section = page.split("\n## 5.")[1].split("\n## 6.")[0]
    output = next(b.output for b in python_blocks(section) if b.output)
    by_hand = re.findall(r"\d+\.\d{4}\b", section.split("```")[0])
    assert len(by_hand) > 25
    assert set(by_hand) <= set(re.findall(r"\d+\.\d{4}\b", output))


@pytest.mark.parametrize("page", [*ALL, *TRANSLATED], ids=lambda p: p.name)
def test_formulas_are_seen_by_github(page):
    """An inline formula begins after white space, on one line, and has no | in a table."""
    text = re.sub(r"```.*?```|``.*?``|`.*?`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"^\$\$.*?\$\$$", "", text, flags=re.DOTALL | re.MULTILINE)
    for line in text.splitlines():
        formulas = re.findall(r"(?:^|(?<=[\s(]))\$(?!\s)[^$|]+(?<!\s)\$(?![\w$])", line)
        assert 2 * len(formulas) == line.count("$"), line


def anchors(page):
    """Those that GitHub makes of a page's headings."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [*ALL, *TRANSLATED], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for path, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", prose):
        if "://" not in path:
            there = page.parent / path if path else page
            assert there.exists(), path
            assert not anchor or anchor in anchors(there), f"{path}#{anchor}"


def without_output(block):
    return block[0] if block[1] == "python" else ""


@pytest.mark.parametrize("page", ALL, ids=lambda p: p.name)
def test_lines_are_short(page):
    """At most 100 columns, except for tables, pictures, lone links and outputs."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^```(\w*)\n.*?^```$", without_output, text, flags=re.DOTALL | re.MULTILINE)
    long = [line for line in text.split("\n") if len(line) > 100 and line[0] not in "|!["]
    assert long == []
