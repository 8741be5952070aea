"""The table of ops in ``docs/ops.md``, written from the database: ``python -m
custom_backprop.testing.table > docs/ops.md``."""

from __future__ import annotations

from pathlib import Path

from .database import database

CHECKOUT = Path(__file__).parents[2]

HEAD = """\
# Ops

Every op by family: forward and backward in one line, where it is derived, and the kernels that
compute it. dy is dL/dy, and so on for each tensor; [c] is 1 where c holds, else 0; σ is the
logistic function, Φ and φ the normal distribution and density.

Written from the op database by `python -m custom_backprop.testing.table > docs/ops.md`.
"""


def markdown() -> str:
    """The page, with one table per family."""
    families: dict[str, list[str]] = {}
    for spec in database().values():
        module = f", `nn.{spec.module[0].__name__}`" if spec.module else ""
        formula = spec.formula.replace("|", "\\|")
        families.setdefault(spec.family, []).append(f"| `{spec.name}`{module} | {formula} |")
    parts = [HEAD]
    for family, rows in families.items():
        links = f"[derivation](../custom_backprop/formulas/{family}.py)"
        if (CHECKOUT / "triton_kernels" / f"{family}.py").exists():  # and not those of others
            links += f", [kernels](../triton_kernels/{family}.py)"
        parts.append(
            "\n".join([f"## {family}", "", links, "", "| op | formula |", "|---|---|", *rows, ""])
        )
    return "\n".join(parts)


if __name__ == "__main__":
    print(markdown(), end="")
