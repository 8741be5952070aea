"""Representations of handwritten digits, learned by two losses that compare vectors, with our
formulas. Given few labels and shifted digits, a linear probe of them is right in 8 of 10 cases, and
one of the pixels in 5. For digits in their places, the pixels are as good.

The data are 1797 scans of 8 x 8 pixels (scikit-learn's load_digits); a fifth is the test set. Two
encoders have the same shape, 64 -> 256 -> 64:

InfoNCE uses no labels. It gets two views of each digit, shifted by up to one pixel and with noise.
The two must find each other among the views of all other digits in the batch (van den Oord et al.,
2018, symmetric as in CLIP). The loss compares the output of one more linear layer, which is dropped
after training (Chen et al., 2020).
Triplet margin uses labels: a view of a digit must be nearer to one of its own class than to one of
another class, by a margin.

Then the representations are compared with the plain pixels: in how many test digits the class is
that of the five nearest neighbours among the training digits, and how many a linear probe
classifies correctly. Both get all labels; or five per class; or five per class where the test
digits are shifted by up to one pixel, and nine shifts of each labelled digit to learn from.

Each epoch ends with a checkpoint. After Ctrl-C the same command continues from the last one and
ends with exactly the weights of an uninterrupted run. A finished run leaves its weights and its
picture but no checkpoint, so the same command then starts again.
"""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

try:
    import torch
    from common import options, plt, resume, save, save_epoch, settings_of, stop, where, write
    from digits import data
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from threadpoolctl import threadpool_limits
    from torch import Tensor
    from tqdm import tqdm

    from custom_backprop import nn
except ImportError as error:
    sys.exit(f"{error}; the examples need: pip install -e '.[demo]'")

BATCH, RATE = 256, 1e-3
TEMPERATURE, MARGIN = 0.2, 1.0
NOISE = 0.3
NEIGHBOURS, FEW, SHIFTS = 5, 5, 9


def view(x: Tensor, generator: torch.Generator, noise: float = NOISE) -> Tensor:
    """Each digit shifted by -1, 0 or 1 pixel in both directions, with noise added."""
    images = torch.nn.functional.pad(x.view(-1, 8, 8), (1, 1, 1, 1))
    down, right = torch.randint(3, (2, len(x), 1), generator=generator).to(x.device)
    pixel = torch.arange(8, device=x.device)
    row, column = (down + pixel).unsqueeze(2), (right + pixel).unsqueeze(1)
    shifted = images[torch.arange(len(x), device=x.device).view(-1, 1, 1), row, column].flatten(1)
    return shifted + noise * torch.randn(x.shape, generator=generator).to(x.device)


def partners(labels: Tensor, same: bool, generator: torch.Generator) -> Tensor:
    """For each digit of a batch, another one of its class, or of another class; itself if there is
    none."""
    fits = (labels.unsqueeze(1) == labels) if same else (labels.unsqueeze(1) != labels)
    fits = fits & ~torch.eye(len(labels), dtype=torch.bool)
    alone = ~fits.any(dim=1, keepdim=True)
    return torch.multinomial(
        (fits | (alone & torch.eye(len(labels), dtype=torch.bool))).float(), 1, generator=generator
    ).squeeze(1)


class Learner:
    """An encoder in training. Only the loss uses ``head``."""

    def __init__(self, loss: torch.nn.Module, head: torch.nn.Module, device: str) -> None:
        self.encoder = torch.nn.Sequential(
            nn.LinearActivation(64, 256, activation="relu"), nn.Linear(256, 64)
        ).to(device)
        self.loss, self.head = loss, head.to(device)
        self.optimizer = torch.optim.Adam(
            [*self.encoder.parameters(), *self.head.parameters()], lr=RATE
        )
        self.history: list[float] = []  # the loss of each epoch

    def step(self, views: list[Tensor]) -> Tensor:
        """Forward, backward, update. Returns the loss."""
        self.optimizer.zero_grad()
        loss = self.loss(*self.head(self.encoder(torch.cat(views))).chunk(len(views)))
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def represent(self, x: Tensor) -> Tensor:
        """The representations of unchanged digits, normalised to length 1."""
        return torch.nn.functional.normalize(self.encoder(x))

    def state_dict(self) -> dict[str, Any]:
        own = {"optimizer": self.optimizer.state_dict(), "history": self.history}
        return {"encoder": self.encoder.state_dict(), "head": self.head.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.encoder.load_state_dict(state["encoder"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]


def learners_of(device: str) -> dict[str, Learner]:
    """Both learners."""
    head = torch.nn.Sequential(torch.nn.ReLU(), nn.Linear(64, 32))
    return {
        "InfoNCE": Learner(nn.InfoNCELoss(TEMPERATURE, symmetric=True), head, device),
        "triplet": Learner(nn.TripletMarginLoss(MARGIN, swap=True), torch.nn.Identity(), device),
    }


def train(learners: dict[str, Learner], x: Tensor, labels: Tensor, args: Namespace) -> None:
    """Trains both, from the checkpoint if there is one."""
    settings = settings_of(
        args, batch=BATCH, rate=RATE, temperature=TEMPERATURE, margin=MARGIN, noise=NOISE
    )
    # after the weights are drawn, nothing else is random
    chance = torch.Generator().manual_seed(args.seed)
    done = resume(args.checkpoint, settings, learners, chance, args.epochs)
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
            for batch in torch.randperm(len(x), generator=chance).split(BATCH):
                digits, classes = x[batch.to(x.device)], labels[batch]
                twice = [view(digits, chance) for _ in range(2)]
                others = [
                    view(digits[partners(classes, same, chance).to(x.device)], chance)
                    for same in (True, False)
                ]
                losses["InfoNCE"].append(learners["InfoNCE"].step(twice))
                losses["triplet"].append(learners["triplet"].step([twice[0], *others]))
                bar.update()
            for name, learner in learners.items():
                learner.history.append(torch.stack(losses[name]).mean().item())
            save_epoch(args.checkpoint, settings, learners, chance, epoch)
            bar.set_postfix_str(
                ", ".join(
                    f"{name} {learner.history[-1]:.3f}" for name, learner in learners.items()
                ),
                refresh=False,
            )


def judge(
    represent: Callable[[Tensor], Tensor], parts: tuple[Tensor, ...], seed: int
) -> dict[str, float]:
    """Test accuracy, in per cent, of the nearest neighbours and of a linear probe, in each
    setting: with all labels, with FEW per class, and with as few for shifted digits."""
    x, test_x, labels, test_labels = parts
    chance = torch.Generator().manual_seed(seed)
    few = torch.cat([(labels == digit).nonzero()[:FEW, 0] for digit in range(10)])
    shifted = torch.cat([view(x[few], chance, noise=0) for _ in range(SHIFTS)])
    seen = {
        "all labels": (x, labels, test_x),
        f"{FEW} labels": (x[few], labels[few], test_x),
        f"{FEW} labels, shifted": (
            shifted,
            labels[few].repeat(SHIFTS),
            view(test_x, chance, noise=0),
        ),
    }
    found = {}
    for setting, (learned, classes, test) in seen.items():
        z, test_z = represent(learned).cpu().numpy(), represent(test).cpu().numpy()
        # so that the regularisation of the probe has the same effect on each
        scale = z.std(axis=0).mean()
        for name, reader in (
            ("neighbours", KNeighborsClassifier(NEIGHBOURS)),
            ("probe", LogisticRegression(max_iter=1000)),
        ):
            with threadpool_limits(1):
                reader.fit(z / scale, classes.cpu().numpy())
                right = reader.score(test_z / scale, test_labels.cpu().numpy())
            found[f"{setting}: {name}"] = 100 * right
    return found


def draw(
    spaces: dict[str, Tensor], labels: Tensor, learners: dict[str, Learner], args: Namespace
) -> None:
    """The test digits along the first two principal components of each space, and the losses."""
    figure, axes = plt.subplots(1, len(spaces) + 1, figsize=(4 * (len(spaces) + 1), 3.9))
    for plot, (name, z) in zip(axes, spaces.items(), strict=False):
        centred = z - z.mean(dim=0)
        plane = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].t()
        points = plot.scatter(
            *plane.t().cpu().numpy(),
            c=labels.cpu().numpy(),
            cmap="tab10",
            vmin=-0.5,
            vmax=9.5,
            s=10,
        )
        plot.set(title=name, xlabel="first principal component", ylabel="second")
    figure.colorbar(points, ax=axes[-2], ticks=range(10), label="digit")
    for name, learner in learners.items():
        axes[-1].plot(range(1, args.epochs + 1), learner.history, label=name)
    axes[-1].set(xlabel="epoch", ylabel="loss", yscale="log", title="Training loss")
    axes[-1].legend()
    write(figure, args.out / "contrastive.png")


def main() -> None:
    args = options("contrastive", __doc__, epochs=60)
    args.checkpoint = args.out / "checkpoint.pt"
    torch.manual_seed(args.seed)
    parts = x, test_x, labels, test_labels = data(args.seed, args.device)
    learners = learners_of(args.device)
    untrained = copy.deepcopy(learners["InfoNCE"])
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "pixels": lambda digits: digits,
        "untrained": untrained.represent,
        **{name: learner.represent for name, learner in learners.items()},
    }
    print(f"{len(x)} digits for training, {len(test_x)} for the test; {where(args)}")
    for name, learner in learners.items():
        print(f"{name}: {learner.loss} of {learner.encoder}")
    try:
        train(learners, x, labels.cpu(), args)
    except KeyboardInterrupt:
        stop(args.checkpoint)

    spaces = {name: represent(test_x) for name, represent in ways.items()}
    draw(spaces, test_labels, learners, args)
    save(
        {name: learner.encoder.state_dict() for name, learner in learners.items()},
        args.out / "weights.pt",
    )
    print(f"wrote {args.out / 'weights.pt'}")
    args.checkpoint.unlink()
    table = {name: judge(represent, parts, args.seed) for name, represent in ways.items()}
    settings = [*dict.fromkeys(column.partition(":")[0] for column in table["pixels"])]
    print(" " * 18 + "".join(f"{setting:>28}" for setting in settings))
    print(f"{'test accuracy, %':18}" + f"{'neighbours':>18}{'probe':>10}" * len(settings))
    for name, row in table.items():
        values = list(row.values())
        pairs = zip(values[::2], values[1::2], strict=True)
        print(f"{name:18}" + "".join(f"{a:18.2f}{b:10.2f}" for a, b in pairs))
    for setting in (settings[0], settings[-1]):
        told = ", ".join(
            f"{name} {table[name][f'{setting}: probe']:.2f} %"
            for name in ("InfoNCE", "triplet", "pixels")
        )
        print(f"linear probe, {setting}: {told}")


if __name__ == "__main__":
    main()
