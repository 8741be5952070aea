"""``python -m benchmarks.performance`` writes ``docs/performance.md`` from the files in
``benchmarks/results/``, and draws their figures anew. Nothing is measured here, and no number is on
the page that is not in one of these files."""

from __future__ import annotations

import json
import re
import statistics
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cases import DIRECTIONS
from .plots import bandwidths
from .report import RESULTS, draw, last

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
#: where the page finds the results
LINK = "../benchmarks/results"
#: from this ratio on, neither is faster by more than a user would notice; and how many ops are
#: listed by name
EVEN, MANY = 0.9, 16

INTRODUCTION = f"""# Performance

This page is made of result files by `python -m benchmarks.performance`. Every number in it is in a
file of [benchmarks/results]({LINK}/README.md), which says more of each.
Below a title are the command behind the file, its name, the machine and the versions.

A *ratio* is the time of stock over the time of ours, both taken in turns in one process: **above 1
ours is faster**. Ratios below 1 stay in. How a step grows with a network is in
[what backpropagation costs](cost.md), several processes are in [scaling](scaling.md)."""


@dataclass(frozen=True)
class Section:
    """One result file.

    Attributes:
        name: the file's, without its suffix.
        command: what wrote it.
        about: what its numbers are.
    """

    name: str
    title: str
    command: str
    about: str


GPU = [
    Section(
        "nvidia-h200",
        "Every op on an NVIDIA H200",
        "python -m benchmarks.report --sizes small large huge --seconds 0.03",
        "Small: 4096 numbers or about as many, and calls one after the other until the GPU has "
        "finished them, so the host's time counts. Large: 1M, and huge, in bfloat16, more than the "
        "cache; both are the GPU's own time, of CUDA graphs. Ops newer than this version of the "
        "package have not been measured on a GPU.",
    ),
    Section(
        "rows-nvidia-h200",
        "By the length of rows, on an NVIDIA H200",
        "python -m benchmarks.rows --seconds 0.03",
        "Bandwidth in TB/s, of the fewest bytes that an op can move: each input read once, each "
        "output and gradient written once. Since then `benchmarks.gpu` measures this.",
    ),
    Section(
        "optim-nvidia-h200",
        "Optimizers on an NVIDIA H200",
        "python -m benchmarks.optim --seconds 0.05",
        "A step until the GPU has finished it, against torch's three variants.",
    ),
    Section(
        "products-nvidia-h100-80gb-hbm3",
        "Matrix products on an NVIDIA H100",
        "python -m benchmarks.products --seconds 0.03",
        "Our own kernel against the vendor's library, with TFLOP/s of ours in parentheses. It "
        "loses, so `linear` calls the library.",
    ),
]
CPU = [
    Section(
        "cpu",
        "Every op on a CPU",
        "python -m benchmarks.report",
        "Small: 4096 numbers or about as many, medium: 64K, large: 1M. The C library's default "
        "allocator, as users have it: large blocks of new memory cost page faults.",
    ),
    Section(
        "cpu-kept",
        "Every op on a CPU, without page faults",
        "python -m benchmarks.report --allocator kept",
        "Freed memory is used again, which shows the arithmetic alone.",
    ),
    Section(
        "optim",
        "Optimizers on a CPU",
        "python -m benchmarks.optim",
        "A step, against torch's three variants.",
    ),
    Section(
        "models-cpu",
        "Whole models on a CPU",
        "python -m benchmarks.models",
        "Steps of training. In parentheses: the ratio to stock, eager to eager and compiled to "
        "compiled.",
    ),
]


def main() -> int:
    for section in (*GPU, *CPU):
        if (rows := _rows(section)) is not None:
            draw(rows, _file(section, "png"))
        elif section.name.startswith("rows"):
            draw_rows(section)
    PAGE.write_text(markdown(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
    return 0


def markdown() -> str:
    """The page."""
    parts = [INTRODUCTION, "## On a GPU"]
    for file in sorted(RESULTS.glob("gpu-*.md")):
        parts += of_a_card(file.read_text(encoding="utf-8"))
    for section in GPU:
        parts += paragraphs(section)
    parts.append("## On a CPU")
    for section in CPU:
        parts += paragraphs(section)
    return "\n\n".join(parts) + "\n"


def of_a_card(text: str) -> list[str]:
    """What ``benchmarks.gpu`` wrote, one heading below."""
    text = re.sub(r"^#(#*) ", r"###\1 ", text.rstrip(), flags=re.MULTILINE)
    return re.sub(r"^(!\[.*\]\()", rf"\1{LINK}/", text, flags=re.MULTILINE).split("\n\n")


def paragraphs(section: Section) -> list[str]:
    """A section: what was measured where, then ratios in words and a figure, or the file's
    tables."""
    text = _file(section, "md").read_text(encoding="utf-8")
    machine = text.split("\n\n")[1].rstrip(".")
    parts = [
        f"### {section.title}",
        f"```sh\n{section.command}\n```",
        _wrapped(
            f"[{section.name}.md]({LINK}/{section.name}.md). {machine[0].upper()}{machine[1:]}."
        ),
        _wrapped(section.about),
    ]
    rows = _rows(section)
    if rows is not None:
        parts.append("\n".join(_wrapped(f"- {line}", "  ") for line in summary(rows)))
    if _file(section, "png").exists():
        parts.append(f"![{section.title}]({LINK}/{section.name}.png)")
    return parts if rows is not None else [*parts, *tables(text)]


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """How many ops gain and which lose, by size and direction; then what they save in memory."""
    found = []
    for size in dict.fromkeys(r["size"] for r in rows if r["family"] != "training"):
        for direction in DIRECTIONS:
            ratios = sorted(
                (r["ratio"], r["op"])
                for r in rows
                if (r["size"], r["direction"]) == (size, direction) and "error" not in r
            )
            lose = [r for r in ratios if r[0] < EVEN]
            line = f"**{size}, {direction}**: {len(ratios) - len(lose)} of {len(ratios)} ops at "
            line += f"{EVEN} or above"
            if len(lose) > MANY:
                middle = statistics.median(ratio for ratio, _ in ratios)
                line += f"; the median is {middle:.2f}, the lowest {_named(lose[0])}"
            elif lose:
                line += f"; below: {', '.join(map(_named, lose))}"
            found.append(f"{line}.")
    for r in (r for r in rows if r["family"] == "training"):
        found.append(f"**{r['op']}**, `{r['size']}`: {r['ratio']:.2f}.")
    memory = sorted((r["ours_bytes"] / r["stock_bytes"], r["op"]) for r in last(rows))
    less, more = sum(m[0] < 0.99 for m in memory), [m for m in memory if m[0] > 1.01]
    line = f"**peak memory, {last(rows)[0]['size']}**: less than stock's for {less} of "
    line += f"{len(memory)} ops, {_named(memory[0])} at best; more for "
    return [*found, line + (", ".join(map(_named, more)) or "none") + "."]


def tables(text: str) -> list[str]:
    """What follows the introduction of a result file, without its figure. Names are code."""
    parts = re.sub(r"^\| (\w+_\w+)", r"| `\1`", text.rstrip(), flags=re.MULTILINE).split("\n\n")
    first = next(i for i, part in enumerate(parts) if part.startswith("|"))
    return [part for part in parts[first:] if not part.startswith("!")]


def draw_rows(section: Section) -> None:
    """Ours and stock by the length of rows, from a table of TB/s."""
    (table,) = tables(_file(section, "md").read_text(encoding="utf-8"))
    header, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    panels: dict[str, Any] = {direction: {} for direction in DIRECTIONS}
    for name, *cells in lines:
        op, direction = name.replace("`", "").split()
        pairs = [cell.split(" / ") for cell in cells]
        panels[direction][op] = tuple([float(v) for v in of] for of in zip(*pairs, strict=True))
    bandwidths(header[1:], panels, f"TB/s: {section.name}", _file(section, "png"))


def _file(section: Section, suffix: str) -> Path:
    return RESULTS / f"{section.name}.{suffix}"


def _rows(section: Section) -> list[dict[str, Any]] | None:
    """The ratios of ``benchmarks.report``; None where another command wrote the file."""
    file = _file(section, "json")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else [{}]
    return rows if "direction" in rows[0] else None


def _named(ratio: tuple[float, str]) -> str:
    return f"`{ratio[1]}` {ratio[0]:.2f}"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    sys.exit(main())
