"""docs/peers.md, from the results."""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from typing import Any

from .op import Op

INTRODUCTION = """# Peers, validated

`custom_backprop.testing.validate` takes anybody's code. Here it is given what two packages of
Triton kernels export, op by op: liger-kernel and flash-linear-attention, both widely used, both
from the package index. No GPU took part: the kernels ran in Triton's interpreter, launched by the
packages' own code, and were compiled offline for sm_80, sm_90, sm_100 and gfx942.

```sh
pip install -e '.[peers]'
python -m benchmarks.peers_validated
```

How to read it:

- Inputs are small and of float32. Results are compared with plain torch in float64.
- *Wrong* means that a result is wrong, or that something was changed which belongs to the caller.
  Some of it is a choice that the authors made, to save memory, and is right in the loop for which
  they made it. *Wrong in second derivatives* means that all else is right.
- Each finding was repeated in plain torch, without `validate`, before it was listed
  (`benchmarks/peers/by_hand.py`). What did not show there is not listed. Where a finding needs the
  interpreter to be seen at all, such as an access out of bounds, the kernel was read.
- *Not offered* is not a fault: the op refuses clearly.
- The interpreter computes `tl.exp` and its like more exactly than a GPU, and knows no TF32. So
  accuracy is not judged here, nor half precision, autocast and `torch.compile`.
"""

#: check -> (title, what it means, key of the op in the example, the example)
FINDINGS = {
    "gradgradcheck": (
        "Second derivatives are cut",
        "Under `create_graph=True` the gradients come back with no graph, or with a part of it, "
        "and nothing raises: a gradient penalty is dropped, or wrong. Neither package says that it "
        "has second derivatives; `torch.autograd.function.once_differentiable` on `backward` would "
        "turn the silence into an error.",
        "liger-kernel:softmax",
        """

def norm_of_gradient_with_penalty(f, x):
    x = x.clone().requires_grad_()
    loss = f(x).square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    return torch.autograd.grad(loss + dx.square().sum(), x)[0].norm()


with interpreted():
    print(norm_of_gradient_with_penalty(function, inputs[0]))
print(norm_of_gradient_with_penalty(reference, inputs[0]))
""",
    ),
    "forward": ("Outputs", "", "", ""),
    "gradient": ("Gradients", "", "", ""),
    "input_layouts": (
        "Inputs that are not contiguous",
        "The same numbers, transposed or sliced, give other results.",
        "liger-kernel:cross_entropy",
        """

def gradient(f, x, target):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x.t().contiguous().t(), target), x)[0]


with interpreted():
    print(gradient(function, *inputs)[0])
print(gradient(reference, *inputs)[0])
""",
    ),
    "layouts": (
        "Gradients that are not contiguous",
        "A `grad_output` that comes transposed, sliced, or with stride 0 as from "
        "`y.sum().backward()`, gives other gradients than the same numbers stored in order.",
        "",
        "",
    ),
    "inputs_unchanged": (
        "Inputs are overwritten",
        "Forward or backward writes into a tensor of the caller. Where autograd's version counter "
        "does not move, nothing can notice. This saves a copy of the tensor, and is harmless where "
        "nobody reads it again. Some ops have an argument `in_place` for it.",
        "liger-kernel:cross_entropy",
        """
x, target = inputs[0].clone().requires_grad_(), inputs[1]
with interpreted():
    function(x, target)
print((x.detach() - inputs[0]).abs().max(), x._version)
""",
    ),
    "two_backwards": (
        "A second backward",
        "With `retain_graph=True`, a second backward gives other gradients than the first, because "
        "the first one overwrote what forward had saved.",
        "liger-kernel:cross_entropy",
        """
x, target = inputs[0].clone().requires_grad_(), inputs[1]
with interpreted():
    loss = 0.5 * function(x.clone(), target)
    for _ in range(2):
        print(torch.autograd.grad(loss, x, retain_graph=True)[0].norm())
""",
    ),
    "memory": ("Memory", "", "", ""),
    "subsets": (
        "Frozen inputs",
        "Where one input alone requires grad, its gradient is missing or wrong.",
        "liger-kernel:fused_linear_cross_entropy",
        """
x, weight, target = inputs  # the hidden states are frozen, the head is trained
with interpreted():
    head = weight.clone().requires_grad_()
    function(x, head, target).backward()
print(head.grad)
head = weight.clone().requires_grad_()
reference(x, head, target).backward()
print(head.grad.norm())
""",
    ),
    "freed": ("Freed", "", "", ""),
    "compiles": ("Compiled", "", "", ""),
}

#: (check, op) -> where it comes from
CAUSES = {
    ("input_layouts", "liger-kernel:cross_entropy"): (
        "Whether a gradient is wanted is read from the contiguous copy of the logits "
        "(`HAS_GRADIENTS=_input.requires_grad`), which inside `forward` does not require grad: the "
        "logits come back in place of their gradient"
    ),
    ("subsets", "liger-kernel:fused_linear_cross_entropy"): (
        "`forward` computes gradients where the hidden states require grad, and there alone"
    ),
}


def page(ops: list[Op], results: dict[str, Any]) -> str:
    """The page in Markdown."""
    parts = [INTRODUCTION]
    for package in dict.fromkeys(op.package for op in ops):
        mine = [results[op.key] for op in ops if op.package == package and op.key in results]
        if mine:
            parts.append(_table(package, mine))
    parts.append("## What was found\n")
    by_key = {op.key: op for op in ops}
    for check, finding in FINDINGS.items():
        found = [
            (key, f["by_hand"])
            for key, result in results.items()
            for f in result["findings"]
            if f["check"] == check and f["by_hand"]
        ]
        if found:
            parts.append(_section(check, finding, found, by_key))
    parts.append(_not_found(list(results.values())))
    parts.append(
        "A script that validates any of these ops:\n\n"
        "```sh\npython -m benchmarks.peers_validated --script liger-kernel:softmax\n```\n"
    )
    return "\n".join(parts)


def _table(package: str, results: list[dict[str, Any]]) -> str:
    versions = {r["version"] for r in results}
    verdicts = [_verdict(r) for r in results]
    said = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts)))
    rows = [
        "| op | verdict | wrong | not offered | compiled for sm_90: registers, bytes spilled |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        wrong = ", ".join(f"`{f['check']}`" for f in r["findings"] if f["by_hand"])
        refused = [c for c, status in r.get("checks", {}).items() if status == "not offered"]
        offered = ", ".join(f"`{c}`" for c in refused) or ""
        rows.append(
            f"| {r['op']} | {_verdict(r)} | {wrong or r.get('reason', '')} | {offered} | "
            f"{_compiled(r)} |"
        )
    return f"## {package} {', '.join(sorted(versions))}\n\n{said}.\n\n" + "\n".join(rows) + "\n"


def _verdict(result: dict[str, Any]) -> str:
    found = {f["check"] for f in result["findings"] if f["by_hand"]}
    return "wrong in second derivatives" if found == {"gradgradcheck"} else result["verdict"]


def _compiled(result: dict[str, Any]) -> str:
    said = result.get("details", {}).get("compiles", "")
    found = re.findall(r"on sm_90: (\d+) registers, (\d+) bytes spilled", said)
    return "; ".join(f"{registers}, {spilled}" for registers, spilled in found)


def _section(
    check: str, finding: tuple[str, str, str, str], found: list[tuple[str, str]], ops: dict[str, Op]
) -> str:
    title, meaning, example, code = finding
    lines = [f"### {title}\n"]
    if meaning:
        lines.append(f"{_wrapped(meaning)}\n")
    if check == "gradgradcheck":  # in nearly all: their names are enough
        for package in dict.fromkeys(ops[key].package for key, _ in found):
            names = [ops[key].name for key, _ in found if ops[key].package == package]
            lines.append(f"{_wrapped(f'- {package}: ' + ', '.join(names), '  ')}")
    for key, said in found if check != "gradgradcheck" else ():
        cause = f". {CAUSES[check, key]}" if (check, key) in CAUSES else ""
        lines.append(_wrapped(f"- {key.replace(':', ', ')}: {said}{cause}", "  "))
    if example in dict(found):
        source = f"{ops[example].setup()}\n{code}".replace(
            "\n\ntorch.manual_seed",
            "\nfrom custom_backprop.testing import interpreted\n\ntorch.manual_seed",
        )
        lines.append(f"\n```py\n{source}```\n\n```text\n{_printed(source)}```")
    return "\n".join(lines) + "\n"


def _not_found(results: list[dict[str, Any]]) -> str:
    """What the kernels do right, all of them."""
    ran = [r for r in results if r.get("checks", {}).get("memory") in ("right", "wrong")]
    lines = ["### What was not found\n"]
    if all(r["checks"]["memory"] == "right" for r in ran):
        text = (
            f"In {len(ran)} ops that launched kernels, none accessed memory outside its tensors, "
            "none has programs whose order decides, and none reads what nobody wrote (`memory`)."
        )
        atomic = [r["op"] for r in ran if "atomic" in r["details"]["memory"]]
        if atomic:
            text += (
                " Sums by atomic operations, whose last bits differ from run to run on a GPU: "
                f"{', '.join(atomic)}."
            )
        lines.append(_wrapped(text) + "\n")
    if all(r["checks"]["compiles"] == "right" for r in ran):
        lines.append(
            _wrapped(
                "Every launch compiles for sm_80, sm_90, sm_100 and gfx942 (`compiles`). All first "
                "derivatives are right, for contiguous inputs that all require grad (`gradient`)."
            )
            + "\n"
        )
    return "\n".join(lines)


def _printed(source: str) -> str:
    """What an example prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(source, {})
    return printed.getvalue()


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, 98, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
