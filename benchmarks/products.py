"""``python -m benchmarks.products``: our matrix product against the vendor's, plain and with an
activation, on a GPU; and the vendor's with relu in its own epilogue.

With an activation, stock's product is followed by our pass over its result, as in an ordinary call,
where "triton" is not forced. Writes ``benchmarks/results/products-CARD.md``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from custom_backprop.backends.kernels import kernels

from .measure import compare
from .report import RESULTS, card, machine_of

#: rows, columns and inner size, as in a step on the digits and its gradients, and in larger layers
SHAPES = (
    (128, 1024, 64), (128, 512, 1024), (128, 64, 1024), (512, 1024, 128), (1024, 1024, 1024),
    (2048, 2048, 2048), (4096, 1024, 4096), (4096, 4096, 1024), (4096, 4096, 4096),
    (16384, 4096, 4096),
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float32)
KINDS = (None, "relu", "gelu")


def ratio(
    shape: tuple[int, int, int], dtype: torch.dtype, activation: str | None, seconds: float
) -> str:
    """Stock / ours, and in parentheses the TFLOP/s of ours."""
    m, n, k = shape
    x, weight = (torch.randn(*s, device="cuda", dtype=dtype) for s in ((m, k), (n, k)))
    bias = torch.randn(n, device="cuda", dtype=dtype)
    ours, passes = kernels("matmul"), kernels("activation")

    def stock() -> object:
        z = torch.nn.functional.linear(x, weight, bias)
        return z if activation is None else passes.forward(activation, z)

    result = compare(
        lambda: ours.product(x, weight.t(), bias, activation, (), activation == "gelu"),
        stock,
        seconds,
        "cuda",
    )
    return f"{result.ratio:.2f} ({2e-12 * m * n * k / result.ours:.0f})"


def epilogue(shape: tuple[int, int, int], seconds: float) -> str:
    """The vendor's product and our pass / its product with relu in the epilogue, in bfloat16; and
    whether a NaN is lost there."""
    m, n, k = shape
    x, weight = (torch.randn(*s, device="cuda", dtype=DTYPES[0]) for s in ((m, k), (n, k)))
    bias, passes = torch.randn(n, device="cuda", dtype=DTYPES[0]), kernels("activation")
    result = compare(
        lambda: torch._addmm_activation(bias, x, weight.t()),
        lambda: passes.forward("relu", torch.nn.functional.linear(x, weight, bias)),
        seconds,
        "cuda",
    )
    bias[0] = torch.nan
    kept = torch._addmm_activation(bias, x, weight.t())[:, 0].isnan().all()
    return f"{result.ratio:.2f}" + ("" if kept else ", loses NaN")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.products",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--seconds", type=float, default=0.1, help="for each ratio (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU, and none is visible")
    columns = [f"{str(d)[6:]} {kind or chr(8212)}" for d in DTYPES for kind in KINDS]
    lines = [
        "# Matrix products with a bias: stock / ours, and TFLOP/s of ours",
        "",
        "; ".join(f"{k}: {v}" for k, v in machine_of("cuda").items() if k != "dtype") + ".",
        "",
        "Rows x columns x inner size; gelu also stores z. Float32 without TF32. Written by "
        "`python -m benchmarks.products`.",
        "",
        f"| shape | {' | '.join(columns)} | bfloat16 relu, the vendor's epilogue |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for shape in SHAPES:
        cells = [ratio(shape, dtype, kind, args.seconds) for dtype in DTYPES for kind in KINDS]
        cells.append(epilogue(shape, args.seconds))
        lines.append(f"| {' x '.join(map(str, shape))} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"products-{card()}.md"
    file.write_text("\n".join([*lines, ""]))
    print(f"wrote {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
