"""``python -m benchmarks.optim``: one step of each optimizer against torch's three variants, as
ratios torch / ours.

Parameters are float32: 100 of 64x64, 10 of 1M elements, and the 6 of a network for the digits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

from custom_backprop import optim
from custom_backprop.optim.lion import PlainLion

from .measure import compare
from .report import machine_of

SIZES: dict[str, list[tuple[int, ...]]] = {
    "100 of 64x64": [(64, 64)] * 100,
    "10 of 1M": [(2**20,)] * 10,
    "digits": [(256, 64), (256,), (128, 256), (128,), (10, 128), (10,)],
}
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}),
    ("Adagrad", {}),
    ("RMSprop", {}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("Adam", {}),
    ("AdamW", {"amsgrad": True}),
    ("Lion", {"weight_decay": 1e-2}),
]
#: what torch has no fused kernel for
UNFUSED = {"cpu": ("RMSprop",), "cuda": ("RMSprop", "Adagrad")}
VARIANTS: dict[str, dict[str, bool]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def stepper(
    kind: Any, shapes: list[tuple[int, ...]], device: str, clip: float | None = None, **kwargs: Any
) -> Callable[[], None]:
    """A step on gradients that do not change; with ``clip``, after torch's clipping."""
    params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = kind(params, lr=1e-4, **kwargs)

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(params, clip)  # type: ignore[arg-type]
        optimizer.step()

    return optimizer.step if clip is None else clipped


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optim", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="OPTIMIZER", help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each ratio")
    args = parser.parse_args()
    print(f"# torch / ours on {args.device}: above 1 ours is faster\n")
    print("; ".join(f"{k}: {v}" for k, v in machine_of(args.device).items()) + ".\n")
    print(f"| optimizer | parameters | ours, us | {' | '.join(VARIANTS)} |")
    print("|---" * (len(VARIANTS) + 3) + "|")
    for name, kwargs in OPTIMIZERS:
        if args.names and name not in args.names:
            continue
        for size, shapes in SIZES.items():
            ours = stepper(getattr(optim, name), shapes, args.device, **kwargs)
            cells, took = [], 0.0
            for variant, flags in VARIANTS.items():
                if (variant == "fused" and name in UNFUSED[args.device]) or (
                    name == "Lion" and variant != "default"
                ):
                    cells.append("")
                    continue
                stock = PlainLion if name == "Lion" else getattr(torch.optim, name)
                result = compare(
                    ours,
                    stepper(stock, shapes, args.device, **kwargs, **flags),
                    args.seconds,
                    args.device,
                    host=True,
                )
                cells.append(f"{result.ratio:.2f}")
                took = took or result.ours
            print(
                f"| {name} {' '.join(kwargs)} | {size} | {took * 1e6:.0f} | {' | '.join(cells)} |",
                flush=True,
            )
    print("\nAdamW with clipping (max_grad_norm) against clip_grad_norm_ and a fused step:\n")
    for size, shapes in SIZES.items():
        ours = stepper(optim.AdamW, shapes, args.device, max_grad_norm=1.0)
        result = compare(
            ours,
            stepper(torch.optim.AdamW, shapes, args.device, clip=1.0, fused=True),
            args.seconds,
            args.device,
            host=True,
        )
        print(f"- {size}: {result.ratio:.2f} ({result.ours * 1e6:.0f} us)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
