"""A recurrent network whose gradient explodes, and three kinds of clipping: of the gradient's norm,
of its values, and of the weights.

It reads the digits two pixels at a time, in 32 steps through the same layer:

    h_t = relu(W h_{t-1} + U x_t),    ∂L/∂h_t = J_{t+1}ᵀ ... J_32ᵀ ∂L/∂h_32,    J_k = diag(relu') W,

which is close to a power of one matrix. With weights 1.2 times Kaiming's, the gradient grows by
about that factor in each step, and some thousandfold in 32. One step of SGD then destroys the
weights. Clipping the norm, g <- g min(1, c / ‖g‖), preserves the direction. Clipping values, g_i <-
min(max(g_i, -c), c), does not. Clipping weights bounds W itself, and so every power of it.

Each complete run is saved: after Ctrl-C the same command continues with the next one.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from math import isfinite
from typing import Any

try:
    import torch
    from common import options, plt, where, write
    from digits import data
    from matplotlib.axes import Axes
    from torch import Tensor
    from tqdm import tqdm  # noqa: F401
    from vanishing_gradients import Result, in_turn, kinds, seen

    from custom_backprop import nn
    from custom_backprop.monitor import GradientMonitor
    from custom_backprop.nn.utils import clip_grad_norm_, clip_grad_value_, clip_weights_
except ImportError as error:
    sys.exit(f"{error}; the examples need: pip install -e '.[demo]'")

WIDTH, PIXELS, BATCH, RATE, MOMENTUM, EXCESS = 64, 2, 64, 0.02, 0.9, 1.2
NORM, VALUE, WEIGHT = 1.0, 0.01, 0.2
CLIPPINGS = ("nothing", "norm clipping", "value clipping", "weight clipping")


class Loop(torch.nn.Module):
    """x (n, 64) -> logits (n, 10), by one layer that is used in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.LinearActivation(WIDTH + PIXELS, WIDTH, activation="relu")
        self.head = nn.Linear(WIDTH, 10)
        torch.nn.init.kaiming_normal_(self.step.weight)
        torch.nn.init.zeros_(self.step.bias)
        with torch.no_grad():
            self.step.weight.mul_(EXCESS)

    def states(self, x: Tensor) -> list[Tensor]:
        states = [x.new_zeros(len(x), WIDTH)]
        for pixels in x.split(PIXELS, dim=1):
            states.append(self.step(torch.cat([states[-1], pixels], dim=1)))
        return states[1:]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.states(x)[-1])


def through_time(x: Tensor, y: Tensor, seed: int) -> list[float]:
    """‖∂L/∂h_t‖ before the first step, for each t."""
    torch.manual_seed(seed)
    model = Loop().to(x.device)
    states = model.states(x)
    loss = torch.nn.functional.cross_entropy(model.head(states[-1]), y)
    return [g.norm().item() for g in torch.autograd.grad(loss, states)]


def learn(
    clipping: str,
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
    args: Namespace,
    tick: Callable[[], object],
) -> Result:
    """Trains the network with one kind of clipping. Returns what its monitor saw, the loss of every
    step, and the test accuracy."""
    x, test_x, y, test_y = parts
    torch.manual_seed(args.seed)
    model = Loop().to(x.device)
    if clipping == "weight clipping":
        clip_weights_(model.parameters(), WEIGHT)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    loss_of = nn.CrossEntropyLoss()
    monitor = GradientMonitor(model, every=1, keep=args.epochs * (len(x) // BATCH))
    losses = []
    for _ in range(args.epochs):
        for batch in torch.randperm(len(x))[: len(x) // BATCH * BATCH].to(x.device).split(BATCH):
            optimizer.zero_grad()
            loss = loss_of(model(x[batch]), y[batch])
            loss.backward()
            monitor.step()
            if clipping == "norm clipping":
                clip_grad_norm_(model.parameters(), NORM)
            elif clipping == "value clipping":
                clip_grad_value_(model.parameters(), VALUE)
            optimizer.step()
            if clipping == "weight clipping":
                clip_weights_(model.parameters(), WEIGHT)
            losses.append(loss.detach())
        tick()
    monitor.remove()
    with torch.no_grad():
        accuracy = (model(test_x).argmax(dim=1) == test_y).double().mean().item()
    return {
        "monitor": monitor.state_dict(),
        "losses": torch.stack(losses).tolist(),
        "accuracy": accuracy,
    }


def curve(axes: Axes, name: str, values: list[float]) -> None:
    """The values by step. A run that breaks down ends in a cross, with the step in its label."""
    finite = next((i for i, v in enumerate(values) if not isfinite(v)), len(values))
    broken = finite < len(values)
    label = f"{name}: NaN from step {finite + 1} on" if broken else name
    (line,) = axes.plot(
        range(1, finite + 1), values[:finite], label=label, linewidth=1, marker="x" * broken,
        markevery=[finite - 1] if finite else None, markersize=9, markeredgewidth=2,
        zorder=3 if broken else 2,
    )  # fmt: skip
    if broken:
        line.set_clip_on(False)


def draw(
    back: list[float],
    monitors: dict[str, GradientMonitor],
    results: dict[str, Any],
    args: Namespace,
) -> None:
    """The gradient through time; its norm and the loss by step, for each kind of clipping."""
    figure, (time, norms, losses) = plt.subplots(1, 3, figsize=(13, 3.8))
    time.plot(range(1, len(back) + 1), back, "k.-")
    time.set(
        xlabel="t",
        ylabel="‖∂L/∂h_t‖",
        yscale="log",
        title="One backward pass, before the first step",
    )
    for name, monitor in monitors.items():
        curve(norms, name, [r.norm for r in monitor.history])
        curve(losses, name, results[name]["losses"])
    norms.set(xlabel="step", ylabel="‖∂L/∂W‖ before clipping", yscale="log", title="Gradient norm")
    losses.set(xlabel="step", ylabel="cross-entropy", yscale="log", title="Training loss")
    norms.legend()
    losses.legend()
    write(figure, args.out / "exploding_gradients.png")


def main() -> None:
    args = options("exploding_gradients", __doc__, epochs=15)
    args.checkpoint = args.out / "checkpoint.pt"
    parts = data(args.seed, args.device)
    print(f"{len(CLIPPINGS)} runs, {args.epochs} epochs each; {where(args)}")
    results = in_turn(
        list(CLIPPINGS), args.epochs, lambda name, tick: learn(name, parts, args, tick), args
    )

    monitors = {name: seen(Loop(), results[name]) for name in CLIPPINGS}
    back = through_time(parts[0][:BATCH], parts[2][:BATCH], args.seed)
    draw(back, monitors, results, args)
    head = f"{'':18}{'largest norm':>14}{'last norm':>12}{'last loss':>12}  {'test accuracy':>13}"
    lines = [f"{head}  verdicts of the monitor"]
    for name, monitor in monitors.items():
        norms = [r.norm for r in monitor.history]
        largest, last_loss = max(n for n in norms if n == n), results[name]["losses"][-1]
        row = f"{name:18}{largest:14.1e}{norms[-1]:12.1e}{last_loss:12.2e}"
        lines.append(f"{row}  {results[name]['accuracy']:13.2%}  {kinds(list(monitor.history))}")
    print("\n".join(lines))
    (args.out / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {args.out / 'table.txt'}")
    args.checkpoint.unlink()
    print(f"backward through time: ‖∂L/∂h_1‖ / ‖∂L/∂h_{len(back)}‖ = {back[0] / back[-1]:.1e}")


if __name__ == "__main__":
    main()
