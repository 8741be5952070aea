"""docs/peers.md, from the results."""

from __future__ import annotations

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
  they made it.
- Each finding was repeated in plain torch, without `validate`, before it was listed
  (`benchmarks/peers/by_hand.py`). What did not show there is not listed. Where a finding needs the
  interpreter to be seen at all, such as an access out of bounds, the kernel was read.
- *Not offered* is no fault: the op refuses clearly.
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
        "Forward or backward writes into a tensor of the caller, and autograd's version counter "
        "does not move, so that nothing can notice. This saves a copy of the tensor, and is "
        "harmless where nobody reads it again. Some ops have an argument `in_place` for it.",
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
    parts.append(
        "A script that validates any of these ops: `python -m benchmarks.peers_validated --script "
        "liger-kernel:softmax`.\n"
    )
    return "\n".join(parts)


def _table(package: str, results: list[dict[str, Any]]) -> str:
    versions = {r["version"] for r in results}
    counts = {v: sum(r["verdict"] == v for r in results) for v in ("right", "wrong", "not run")}
    said = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)
    rows = [
        "| op | verdict | wrong | not offered | compiled for sm_90: registers, bytes spilled |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        wrong = ", ".join(f"`{f['check']}`" for f in r["findings"] if f["by_hand"])
        refused = [c for c, status in r.get("checks", {}).items() if status == "not offered"]
        offered = ", ".join(f"`{c}`" for c in refused) or ""
        rows.append(
            f"| {r['op']} | {r['verdict']} | {wrong or r.get('reason', '')} | {offered} | "
            f"{_compiled(r)} |"
        )
    return f"## {package} {', '.join(sorted(versions))}\n\n{said}.\n\n" + "\n".join(rows) + "\n"


def _compiled(result: dict[str, Any]) -> str:
    import re

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
    lines.append(f"Found by `{check}`:\n")
    lines += [f"- {key.replace(':', ', ')}: {said}" for key, said in found]
    if example in dict(found):
        setup = ops[example].setup()
        lines.append(
            f"\n```py\n{setup}\nfrom custom_backprop.testing import interpreted\n{code}```"
        )
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 98)
