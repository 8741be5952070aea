"""What docs/peers.md is made of. (The packages themselves are not installed for the tests.)"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

from benchmarks.peers import OPS
from benchmarks.peers.by_hand import BY_HAND

ROOT = Path(__file__).parents[2]


def test_every_op_has_a_result_and_a_script():
    results = json.loads((ROOT / "benchmarks/results/peers.json").read_text(encoding="utf-8"))
    assert set(results) == {op.key for op in OPS}
    for op in OPS:
        ast.parse(op.script(["forward"]))
        assert results[op.key]["verdict"] in ("right", "wrong", "not run")


def test_the_page_says_what_the_results_say():
    page = (ROOT / "docs/peers.md").read_text(encoding="utf-8")
    for result in json.loads((ROOT / "benchmarks/results/peers.json").read_text()).values():
        wrong = [f["check"] for f in result["findings"] if f["by_hand"]]
        row = next(
            line
            for line in page.split(f"## {result['package']} ")[1].splitlines()
            if line.startswith(f"| {result['op']} |")
        )
        assert all(f"`{check}`" in row for check in wrong)
        assert ("wrong" in row) == bool(wrong)


class Square(torch.autograd.Function):
    """x², with one fault."""

    @staticmethod
    def forward(ctx, x, fault):
        ctx.fault = fault
        y = (1.01 if fault == "forward" else 1) * x * x
        if fault == "input_layouts" and not x.is_contiguous():
            y = y + 1
        if fault == "inputs_unchanged":
            x.data.zero_()
        ctx.save_for_backward(x.clone() if fault == "two_backwards" else x)
        return y

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = 2 * x * dy * (1.01 if ctx.fault in ("forward", "gradient") else 1)
        if ctx.fault == "gradgradcheck":
            dx = dx.detach()
        if ctx.fault == "layouts" and not dy.is_contiguous():
            dx = dx + 1
        if ctx.fault == "two_backwards":
            x.data.zero_()
        return dx if ctx.fault != "subsets" else torch.zeros_like(dx), None


@pytest.mark.parametrize("fault", [*BY_HAND, "none"])
def test_each_fault_is_found_by_hand(fault):
    torch.manual_seed(0)
    x = torch.randn(3, 4, requires_grad=True)
    given = (lambda x: Square.apply(x, fault)), torch.square, [x]
    found = {name for name, by_hand in BY_HAND.items() if by_hand(*given)}
    assert (fault in found) == (fault != "none")
    assert found if fault != "none" else not found
