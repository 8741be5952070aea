"""Gradient descent on a line, three times: the equations in NumPy, our layers, stock torch.

    ŷ = W x + b,    L = 1/n Σ (ŷ - y)²

    ∂L/∂W = 2/n Σ (ŷ - y) x,    ∂L/∂b = 2/n Σ (ŷ - y)

    W <- W - η ∂L/∂W,    b <- b - η ∂L/∂b

All three start from the same W and b, and must agree to 1e-12 after every step, in float64.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from types import ModuleType

try:
    import numpy as np
    import torch
    from common import options, plt, write

    from custom_backprop import nn
except ImportError as error:
    sys.exit(f"{error}; the examples need: pip install -e '.[demo]'")

SLOPE, NOISE, POINTS, RATE, TOLERANCE = 4.0, 0.5, 100, 0.1, 1e-12


def by_numpy(x: np.ndarray, y: np.ndarray, W: np.ndarray, b: np.ndarray, steps: int) -> np.ndarray:
    """W and b before each step and after the last: (steps + 1, 2). x and y are (n, 1), W is (1, 1),
    b is (1)."""
    path = [(W.item(), b.item())]
    for _ in range(steps):
        error = x @ W.T + b - y
        dW = 2 / len(x) * error.T @ x
        db = 2 / len(x) * error.sum(axis=0)
        W, b = W - RATE * dW, b - RATE * db
        path.append((W.item(), b.item()))
    return np.array(path)


def by_torch(
    layer: torch.nn.Linear,
    loss: torch.nn.Module,
    x: np.ndarray,
    y: np.ndarray,
    W: np.ndarray,
    b: np.ndarray,
    steps: int,
    device: str,
) -> np.ndarray:
    """The same with a layer and a loss, ours or stock's. Only their backward differs."""
    layer.load_state_dict({"weight": torch.from_numpy(W), "bias": torch.from_numpy(b)})
    layer.to(device)
    inputs, targets = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    path = [(W.item(), b.item())]
    for _ in range(steps):
        dW, db = torch.autograd.grad(loss(layer(inputs), targets), (layer.weight, layer.bias))
        with torch.no_grad():
            layer.weight.sub_(RATE * dW)
            layer.bias.sub_(RATE * db)
        path.append((layer.weight.item(), layer.bias.item()))
    return np.array(path)


def draw(x: np.ndarray, y: np.ndarray, paths: dict[str, np.ndarray], args: Namespace) -> None:
    """The fitted line through the points; the three losses in one plot."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    W, b = paths["ours"][-1]
    ends = np.array([x.min(), x.max()])
    left.scatter(x, y, s=12, color="0.6", label=f"{POINTS} points of y = {SLOPE:g} x + noise")
    left.plot(
        ends,
        W * ends + b,
        color="C3",
        linewidth=2,
        label=f"fitted: y = {W:.3f} x {'-' if b < 0 else '+'} {abs(b):.3f}",
    )
    left.set(xlabel="x", ylabel="y", title=f"The line after step {args.steps}")
    left.legend(loc="upper left")

    shown = slice(min(args.steps, 100) + 1)
    for name, color, width in (("NumPy", "C1", 8), ("stock", "C0", 4), ("ours", "k", 1.2)):
        losses = np.mean((x @ paths[name][shown, :1].T + paths[name][shown, 1] - y) ** 2, axis=0)
        right.plot(losses, color=color, linewidth=width, label=name)
    right.set(xlabel="step", ylabel="loss L", title="The first steps: three results, one curve")
    right.legend()
    write(figure, args.out / "linear_regression.png")


def main() -> None:
    args = options("linear_regression", __doc__, steps=1000)
    rng = np.random.default_rng(args.seed)
    x = rng.uniform(-1, 1, (POINTS, 1))
    y = SLOPE * x + NOISE * rng.standard_normal((POINTS, 1))
    start = rng.standard_normal((1, 1)), rng.standard_normal(1)

    def layers(package: ModuleType) -> np.ndarray:
        return by_torch(
            package.Linear(1, 1, dtype=torch.float64),
            package.MSELoss(),
            x,
            y,
            *start,
            args.steps,
            args.device,
        )

    paths = {
        "NumPy": by_numpy(x, y, *start, args.steps),
        "ours": layers(nn),
        "stock": layers(torch.nn),
    }

    print(__doc__.split("\n\n", 1)[1])
    print(f"n = {POINTS}, η = {RATE}, {args.steps} steps\n")
    print(f"{'':8}{'W':>18}{'b':>18}{'|W, b - NumPy|':>18}")
    furthest = {name: float(np.abs(path - paths["NumPy"]).max()) for name, path in paths.items()}
    for name, path in paths.items():
        print(f"{name:8}{path[-1, 0]:18.14f}{path[-1, 1]:18.14f}{furthest[name]:18.1e}")
    print("(the last column: the largest over all steps)\n")
    draw(x, y, paths, args)
    if not max(furthest.values()) <= TOLERANCE:
        sys.exit(f"the three results differ by more than {TOLERANCE:g}")
    print(f"all three agree to {TOLERANCE:g}")


if __name__ == "__main__":
    main()
