"""Representations of handwritten digits, learned by two losses that compare vectors, with our
formulas.

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
classifies correctly, given all labels or five per class.

Each epoch ends with a checkpoint. After Ctrl-C the same command continues from the last one and
ends with exactly the weights of an uninterrupted run. A finished run leaves its weights and its
picture but no checkpoint, so the same command then starts again.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

try:
    import numpy as np
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
NEIGHBOURS, FEW = 5, 5


def view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each digit shifted by -1, 0 or 1 pixel in both directions, with noise added."""
    images = torch.nn.functional.pad(x.view(-1, 8, 8), (1, 1, 1, 1))
    down, right = torch.randint(3, (2, len(x), 1), generator=generator).to(x.device)
    pixel = torch.arange(8, device=x.device)
    row, column = (down + pixel).unsqueeze(2), (right + pixel).unsqueeze(1)
    shifted = images[torch.arange(len(x), device=x.device).view(-1, 1, 1), row, column].flatten(1)
    return shifted + NOISE * torch.randn(x.shape, generator=generator).to(x.device)


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
    z: np.ndarray, labels: np.ndarray, test_z: np.ndarray, test_labels: np.ndarray
) -> tuple[float, ...]:
    """Test accuracy of the nearest neighbours and of a linear probe, given all labels, and of both
    given FEW labels per class."""
    few = np.concatenate([np.flatnonzero(labels == digit)[:FEW] for digit in range(10)])
    # so that the regularisation of the probe has the same effect on each
    scale = z.std(axis=0).mean()
    found = []
    for rows in (np.arange(len(z)), few):
        for reader in (
            KNeighborsClassifier(min(NEIGHBOURS, FEW)),
            LogisticRegression(max_iter=1000),
        ):
            with threadpool_limits(1):
                found.append(
                    reader.fit(z[rows] / scale, labels[rows]).score(test_z / scale, test_labels)
                )
    return tuple(found)


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
    x, test_x, labels, test_labels = data(args.seed, args.device)
    learners = learners_of(args.device)
    untrained = learners["InfoNCE"].represent
    spaces = {"pixels": (x, test_x), "untrained": (untrained(x), untrained(test_x))}
    print(f"{len(x)} digits for training, {len(test_x)} for the test; {where(args)}")
    for name, learner in learners.items():
        print(f"{name}: {learner.loss} of {learner.encoder}")
    try:
        train(learners, x, labels.cpu(), args)
    except KeyboardInterrupt:
        stop(args.checkpoint)

    spaces |= {
        name: (learner.represent(x), learner.represent(test_x))
        for name, learner in learners.items()
    }
    draw({name: test for name, (_, test) in spaces.items()}, test_labels, learners, args)
    save(
        {name: learner.encoder.state_dict() for name, learner in learners.items()},
        args.out / "weights.pt",
    )
    print(f"wrote {args.out / 'weights.pt'}")
    args.checkpoint.unlink()
    few = f"neighbours, {FEW} labels per class"
    print(f"{'test accuracy, %':18}{'neighbours':>12}{'probe':>12}{few:>34}{'probe':>12}")
    accuracies = {}
    for name, (z, test_z) in spaces.items():
        accuracies[name] = judge(
            z.cpu().numpy(), labels.cpu().numpy(), test_z.cpu().numpy(), test_labels.cpu().numpy()
        )
        neighbours, probe, few_neighbours, few_probe = (100 * a for a in accuracies[name])
        print(f"{name:18}{neighbours:12.2f}{probe:12.2f}{few_neighbours:34.2f}{few_probe:12.2f}")
    told = ", ".join(
        f"{name} {100 * accuracies[name][1]:.2f} %" for name in ("InfoNCE", "triplet", "pixels")
    )
    print(f"test accuracy of a linear probe: {told}")


if __name__ == "__main__":
    main()
