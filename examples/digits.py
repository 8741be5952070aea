"""Handwritten digits, learned with our layers, loss and optimizer, and with stock PyTorch's: with
the same seed, in the same loop, on the same batches.

The data are 1797 scans of 8 x 8 pixels (scikit-learn's load_digits); a fifth is the test set. The
network has 64 -> 1024 -> 512 -> 10 units, ReLU, cross-entropy and SGD with momentum, in float32.
Both learn equally well, but do not end with the same weights: our cross-entropy rounds differently,
and training amplifies a relative difference of 1e-7 at the start to 1e-2 or more by the end, also
between two runs of stock whose sums are computed in another order. In float64 the same training
ends with weights that differ by less than 1e-14.

--draw also writes a picture of our backward pass, with the gradients of the trained network on the
first batch: a page to open in a browser, and an SVG.

Each epoch ends with a checkpoint. After Ctrl-C the same command continues from the last one and
ends with exactly the weights of an uninterrupted run. A finished run leaves its weights and its
picture but no checkpoint, so the same command then starts again.
"""

from __future__ import annotations

import copy
import sys
import time
from argparse import Namespace
from typing import Any

try:
    import torch
    from common import options, plt, resume, save, save_epoch, settings_of, stop, where, write
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import Tensor
    from tqdm import tqdm

    from custom_backprop import monitor, nn, optim
    from custom_backprop.testing import peak_memory
except ImportError as error:
    sys.exit(f"{error}; the examples need: pip install -e '.[demo]'")

BATCH, RATE, MOMENTUM = 128, 0.1, 0.9


def our_model(first: int = 1024, second: int = 512) -> torch.nn.Module:
    return torch.nn.Sequential(
        nn.LinearActivation(64, first, activation="relu"),
        nn.LinearActivation(first, second, activation="relu"),
        nn.Linear(second, 10),
    )


def stock_model(first: int = 1024, second: int = 512) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(64, first),
        torch.nn.ReLU(),
        torch.nn.Linear(first, second),
        torch.nn.ReLU(),
        torch.nn.Linear(second, 10),
    )


class Learner:
    """A model in training: its loss, its optimizer, and what is recorded."""

    def __init__(
        self, model: torch.nn.Module, loss: torch.nn.Module, sgd: type[torch.optim.SGD], device: str
    ) -> None:
        self.model, self.loss, self.device = model.to(device), loss, device
        # fused=False rounds like a plain loop over the parameters, which is stock's default
        self.optimizer = sgd(self.model.parameters(), lr=RATE, momentum=MOMENTUM, fused=False)
        self.seconds = 0.0
        # one entry per epoch
        self.history: dict[str, list[Any]] = {"loss": [], "accuracy": [], "norms": []}

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Forward, backward, update, timed. Returns the loss."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        self.seconds += time.perf_counter() - start
        return loss.detach()

    def gradient_norms(self) -> Tensor:
        """The norm for the weight of each layer, after a step."""
        return torch.stack(
            [p.grad.norm() for p in self.model.parameters() if p.grad is not None and p.dim() == 2]
        )

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return (self.model(x).argmax(dim=1) == y).double().mean().item()

    def state_dict(self) -> dict[str, Any]:
        own = {"seconds": self.seconds, "history": self.history}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.seconds, self.history = state["seconds"], state["history"]


def data(seed: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x for training, x for the test, y for training, y for the test. Pixels are in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        pixels.astype("float32") / 16, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    return tuple(torch.from_numpy(part).to(device) for part in parts)  # type: ignore[return-value]


def train(
    learners: dict[str, Learner], parts: tuple[Tensor, Tensor, Tensor, Tensor], args: Namespace
) -> None:
    """Trains both, from the checkpoint if there is one."""
    x, test_x, y, test_y = parts
    settings = settings_of(args, batch=BATCH, rate=RATE, momentum=MOMENTUM)
    # after the weights are drawn, nothing else is random
    shuffle = torch.Generator().manual_seed(args.seed)
    done = resume(args.checkpoint, settings, learners, shuffle, args.epochs)
    batches = -(-len(x) // BATCH)
    with tqdm(
        total=args.epochs * batches,
        initial=done * batches,
        unit="step",
        mininterval=0.5,
        dynamic_ncols=True,
    ) as bar:
        for epoch in range(done + 1, args.epochs + 1):
            losses: dict[str, list[Tensor]] = {name: [] for name in learners}
            norms: dict[str, list[Tensor]] = {name: [] for name in learners}
            for i, batch in enumerate(torch.randperm(len(x), generator=shuffle).split(BATCH)):
                inputs, targets = x[batch.to(x.device)], y[batch.to(x.device)]
                # each goes first in turn, so that neither always gets the warmer cache
                for name in sorted(learners, reverse=i % 2 == 0):
                    losses[name].append(learners[name].step(inputs, targets))
                    norms[name].append(learners[name].gradient_norms())
                bar.update()
            for name, learner in learners.items():
                learner.history["loss"].append(torch.stack(losses[name]).mean().item())
                learner.history["norms"].append(torch.stack(norms[name]).mean(dim=0).tolist())
                learner.history["accuracy"].append(learner.accuracy(test_x, test_y))
            save_epoch(args.checkpoint, settings, learners, shuffle, epoch)
            bar.set_postfix_str(
                ", ".join(
                    f"{name} {learner.history['accuracy'][-1]:.2%}"
                    for name, learner in learners.items()
                ),
                refresh=False,
            )


def step_memory(learner: Learner, x: Tensor, y: Tensor) -> int:
    """Peak bytes of one training step of a copy."""
    twin = copy.deepcopy(learner)

    def step() -> None:
        twin.step(x, y)
        twin.optimizer.zero_grad()

    return peak_memory(step, learner.device)


def draw(learners: dict[str, Learner], args: Namespace) -> None:
    """Loss, accuracy and gradient norms by epoch: stock broad and pale, ours thin and dark on
    top."""
    figure, (loss, accuracy, norms) = plt.subplots(1, 3, figsize=(12, 3.8))
    epochs = range(1, args.epochs + 1)
    looks: dict[str, dict[str, Any]] = {
        "stock": {"linewidth": 6, "alpha": 0.35},
        "ours": {"linewidth": 1.3},
    }
    for name, look in looks.items():
        history = learners[name].history
        loss.plot(epochs, history["loss"], color="C0", label=name, **look)
        accuracy.plot(
            epochs, [100 * a for a in history["accuracy"]], color="C0", label=name, **look
        )
        for i, layer in enumerate(zip(*history["norms"], strict=True)):
            norms.plot(
                epochs,
                layer,
                color=f"C{i}",
                label=f"layer {i + 1}" if name == "ours" else None,
                **look,
            )
    loss.set(xlabel="epoch", ylabel="cross-entropy", yscale="log", title="Training loss")
    accuracy.set(xlabel="epoch", ylabel="digits classified correctly, %", title="Test accuracy")
    norms.set(
        xlabel="epoch",
        ylabel="‖∂L/∂W‖, mean of the epoch",
        yscale="log",
        title="Gradient norm per layer",
    )
    loss.legend()
    norms.legend()
    write(figure, args.out / "digits.png")


def draw_backward(learner: Learner, x: Tensor, y: Tensor, args: Namespace) -> None:
    """The graph of one step, and the gradients in it."""
    loss = learner.loss(learner.model(x), y)
    picture = monitor.draw(loss, learner.model, title="Backward pass of the digits")
    for name in ("backward.html", "backward.svg"):
        picture.save(args.out / name)
        print(f"wrote {args.out / name}")


def main() -> None:
    args = options("digits", __doc__, epochs=30, draw=False)
    args.checkpoint = args.out / "checkpoint.pt"
    parts = data(args.seed, args.device)
    learners = {}
    sides = {
        "ours": (our_model, nn.CrossEntropyLoss(), optim.SGD),
        "stock": (stock_model, torch.nn.CrossEntropyLoss(), torch.optim.SGD),
    }
    for name, (model, loss, sgd) in sides.items():
        torch.manual_seed(args.seed)
        learners[name] = Learner(model(), loss, sgd, args.device)
    ours, stock = learners["ours"], learners["stock"]
    print(f"{len(parts[0])} digits for training, {len(parts[1])} for the test; {where(args)}")
    print(f"ours: {ours.model}\nstock: {stock.model}")
    memory = [step_memory(learner, parts[0][:BATCH], parts[2][:BATCH]) for learner in (ours, stock)]
    try:
        train(learners, parts, args)
    except KeyboardInterrupt:
        stop(args.checkpoint)

    draw(learners, args)
    if args.draw:
        draw_backward(ours, parts[0][:BATCH], parts[2][:BATCH], args)
    save(
        {name: learner.model.state_dict() for name, learner in learners.items()},
        args.out / "weights.pt",
    )
    print(f"wrote {args.out / 'weights.pt'}")
    args.checkpoint.unlink()
    pairs = zip(ours.model.parameters(), stock.model.parameters(), strict=True)
    accuracies = [100 * learner.history["accuracy"][-1] for learner in (ours, stock)]
    print(f"largest difference of weights: {max((a - b).abs().max().item() for a, b in pairs):.1e}")
    print(f"time of all training steps: ours {ours.seconds:.2f} s, stock {stock.seconds:.2f} s")
    print(
        "peak memory of one step (tensors it allocates): "
        f"ours {memory[0] / 1024:.0f} KiB, stock {memory[1] / 1024:.0f} KiB"
    )
    print(f"test accuracy: ours {accuracies[0]:.2f} %, stock {accuracies[1]:.2f} %")


if __name__ == "__main__":
    main()
