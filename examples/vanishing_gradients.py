"""Why a deep network does not learn, and what helps: twenty layers of 64 units on the digits, with
three activations and six starts.

The gradient at a layer is a product of the Jacobians of all layers after it,

    ∂L/∂z_l = J_{l+1}ᵀ ... J_Lᵀ ∂L/∂z_L,    J_k = W_k diag(f'(z_{k-1})),

so it shrinks at every layer by the factor by which a typical Jacobian shortens a vector. Sigmoid
(f' <= 1/4), tanh and ReLU start from small weights (standard deviation 0.05), from Xavier's (1/√n),
from Kaiming's (√(2/n)), from LSUV's (unit variance, measured layer by layer), and from small
weights with batch normalisation, or with the norm of the gradient clipped to 1.

Each complete network is saved: after Ctrl-C the same command continues with the next one. A
finished run leaves its picture and its table but no checkpoint.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

try:
    import torch
    from common import load, options, plt, save, settings_of, stop, where, write
    from digits import data
    from torch import Tensor
    from tqdm import tqdm

    from custom_backprop import nn
    from custom_backprop.init import init_for
    from custom_backprop.monitor import GradientMonitor, Reading
    from custom_backprop.nn.utils import clip_grad_norm_
except ImportError as error:
    sys.exit(f"{error}; the examples need: pip install -e '.[demo]'")

WIDTH, BATCH, RATE, MOMENTUM, SMALL, READINGS = 64, 64, 0.01, 0.9, 0.05, 24
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
STARTS = ("small", "Xavier", "Kaiming", "LSUV", "small + norm", "small + clip")
TRAINS = 0.9  # a network with at least this test accuracy counts as trained

Result = dict[str, Any]


def network(activation: str, start: str, depth: int, x: Tensor) -> torch.nn.Module:
    """``depth`` layers and a head, with the weights drawn."""
    if start == "small + norm":
        layers: list[torch.nn.Module] = []
        for _ in range(depth):
            layers += [
                nn.Linear(WIDTH, WIDTH),
                torch.nn.BatchNorm1d(WIDTH),
                ACTIVATIONS[activation](),
            ]
    else:
        layers = [nn.LinearActivation(WIDTH, WIDTH, activation=activation) for _ in range(depth)]
    model = torch.nn.Sequential(*layers, nn.Linear(WIDTH, 10)).to(x.device)
    if start == "LSUV":
        return init_for(model, activation, "lsuv", batch=x)
    deviation = {"Xavier": (1 / WIDTH) ** 0.5, "Kaiming": (2 / WIDTH) ** 0.5}.get(start, SMALL)
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=deviation)
            torch.nn.init.zeros_(layer.bias)
    return model


def learn(
    activation: str,
    start: str,
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
    args: Namespace,
    tick: Callable[[], object],
) -> Result:
    """Trains one network. Returns what its monitor saw, and its test accuracy."""
    x, test_x, y, test_y = parts
    torch.manual_seed(args.seed)
    model = network(activation, start, args.depth, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    loss = nn.CrossEntropyLoss()
    monitor = GradientMonitor(model, every=max(1, args.epochs * (len(x) // BATCH) // READINGS))
    for _ in range(args.epochs):
        for batch in torch.randperm(len(x))[: len(x) // BATCH * BATCH].to(x.device).split(BATCH):
            optimizer.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            monitor.step()
            if start == "small + clip":
                clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        tick()
    monitor.remove()
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_x).argmax(dim=1) == test_y).double().mean().item()
    return {"monitor": monitor.state_dict(), "accuracy": accuracy}


def in_turn(
    names: list[str],
    ticks: int,
    run: Callable[[str, Callable[[], object]], Result],
    args: Namespace,
    **more: Any,
) -> dict[str, Result]:
    """The result of each run by name. Complete ones come from the checkpoint. ``run`` advances the
    progress bar ``ticks`` times."""
    settings = settings_of(args, **more)
    results: dict[str, Result] = {}
    if (state := load(args.checkpoint, settings)) is not None:
        results = state["results"]
        print(f"continuing after {len(results)} of {len(names)}, from {args.checkpoint}")
    try:
        with tqdm(
            total=ticks * len(names),
            initial=ticks * len(results),
            mininterval=0.5,
            dynamic_ncols=True,
        ) as bar:
            for name in names[len(results) :]:
                bar.set_postfix_str(name)
                results[name] = run(name, bar.update)
                save({"settings": settings, "results": results}, args.checkpoint)
    except KeyboardInterrupt:
        stop(args.checkpoint, f"{len(results)} of {len(names)} are complete and", of="run")
    return results


def seen(model: torch.nn.Module, result: Result) -> GradientMonitor:
    """The monitor as it was when the run ended."""
    monitor = GradientMonitor(model, activations=False, keep=len(result["monitor"]["history"]))
    monitor.load_state_dict(result["monitor"])
    return monitor


def kinds(history: list[Reading]) -> str:
    """The verdicts of a run, each once."""
    return ", ".join(dict.fromkeys(v.kind for reading in history for v in reading.verdicts)) or "-"


def draw(monitors: dict[str, GradientMonitor], results: dict[str, Result], args: Namespace) -> None:
    """A heat map for each network: layers from the input at the top to the loss, steps from left to
    right."""
    figure, grid = plt.subplots(len(ACTIVATIONS), len(STARTS), figsize=(15, 7.5), sharex=True)
    for axes, (name, monitor) in zip(grid.flat, monitors.items(), strict=True):
        mesh = monitor.draw(axes, vmin=-10, vmax=1)
        axes.set(title=f"{name}: {results[name]['accuracy']:.0%}", xlabel="", ylabel="")
        axes.set_yticks([0.5, len(monitor.norms()[1]) - 0.5], ["first", "last"])
    figure.supxlabel("step")
    figure.supylabel("layer")
    figure.colorbar(mesh, ax=grid, label="log10 of ‖∂L/∂W‖ of the layer", extend="both", pad=0.01)
    write(figure, args.out / "vanishing_gradients.png")


def main() -> None:
    args = options("vanishing_gradients", __doc__, epochs=12, depth=20)
    args.checkpoint = args.out / "checkpoint.pt"
    x, test_x, y, test_y = data(args.seed, args.device)
    # every start except the small weights assumes inputs of unit variance
    mean, deviation = x.mean(), x.std()
    parts = (x - mean) / deviation, (test_x - mean) / deviation, y, test_y
    networks = {
        f"{activation}, {start}": (activation, start)
        for activation in ACTIVATIONS
        for start in STARTS
    }
    print(f"{len(networks)} networks of {args.depth} layers, {args.epochs} epochs; {where(args)}")

    def run(name: str, tick: Callable[[], object]) -> Result:
        return learn(*networks[name], parts, args, tick)

    results = in_turn(list(networks), args.epochs, run, args)
    monitors = {
        name: seen(network(*kind, args.depth, parts[0]), results[name])
        for name, kind in networks.items()
    }
    draw(monitors, results, args)
    lines = [
        f"{'':24}{'‖∂L/∂W‖ of the first layer':^28}{'last layer':>12}  {'test':>8}",
        f"{'':24}{'at the start':>14}{'at the end':>14}{'at the end':>12}",
    ]
    lines[1] += f"  {'accuracy':>8}  verdicts of the monitor"
    for name, monitor in monitors.items():
        _, _, (first, *_, last) = monitor.norms()
        accuracy, verdicts = results[name]["accuracy"], kinds(list(monitor.history))
        row = f"{name:24}{first[0]:14.1e}{first[-1]:14.1e}{last[-1]:12.1e}"
        lines.append(f"{row}  {accuracy:8.2%}  {verdicts}")
    print("\n".join(lines))
    (args.out / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {args.out / 'table.txt'}")
    args.checkpoint.unlink()
    trained = [name for name in networks if results[name]["accuracy"] >= TRAINS]
    print(f"trains the digits ({TRAINS:.0%} and more): {'; '.join(trained) or 'none'}")


if __name__ == "__main__":
    main()
