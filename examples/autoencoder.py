"""Handwritten digits compressed to 2 and 16 numbers and back, with our layers: the error is smaller
than that of any linear code. k-means, though, finds the ten digits no better in the codes than in
the raw pixels. Training uses no labels.

The data are 1797 scans of 8 x 8 pixels (scikit-learn's load_digits), minus their mean. Four
autoencoders learn to reproduce their input, by the mean squared error. Two are linear, 64 -> k ->
64, and are trained by L-BFGS in float64. Their optimum is known: the k-dimensional subspace of
principal component analysis. The example prints the largest angle between the two subspaces. Two
more have a layer with tanh on either side and are trained by Adam on batches.

Then k-means runs on the codes, trained by the gradient of its own loss. The loss J = Σ ‖x - c‖²,
where c is the centroid nearest to x, has ∂J/∂c = 2 Σ (c - x) over the n codes nearest to c, and the
second derivative 2n. So Newton's step moves c to their mean: Lloyd's algorithm is gradient descent
with the rate 1/2n (Bottou and Bengio, 1995). Clusters and digits are compared by their normalised
mutual information.

Each epoch ends with a checkpoint. After Ctrl-C the same command continues from the last one and
ends with exactly the weights of an uninterrupted run. A finished run leaves its weights and its
pictures but no checkpoint, so the same command then starts again.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

try:
    import torch
    from common import load, options, plt, save, settings_of, stop, where, write
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_digits
    from sklearn.metrics import normalized_mutual_info_score
    from threadpoolctl import threadpool_limits
    from torch import Tensor
    from tqdm import tqdm

    from custom_backprop import nn
except ImportError as error:
    sys.exit(f"{error}; the examples need: pip install -e '.[demo]'")

CODES = (2, 16)
BATCH, RATE, ITERATIONS, HISTORY = 64, 2e-3, 20, 40
CLUSTERS, STARTS, MOST_STEPS = 10, 10, 300


class Autoencoder(torch.nn.Module):
    """64 -> ``code`` -> 64, with one linear layer on either side, or with layers of ``hidden``
    units around the code."""

    def __init__(self, code: int, *hidden: int) -> None:
        super().__init__()
        self.encode, self.decode = _layers(64, *hidden, code), _layers(code, *reversed(hidden), 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def _layers(*sizes: int) -> torch.nn.Sequential:
    """Linear layers, all but the last followed by tanh. The data have mean 0, so a single layer
    needs no bias."""
    *inner, last = pairwise(sizes)
    hidden = [nn.LinearActivation(*size, activation="tanh") for size in inner]
    return torch.nn.Sequential(*hidden, nn.Linear(*last, bias=bool(inner)))


class Coder:
    """An autoencoder in training: by Adam on batches, or, if it is linear, by L-BFGS on all digits
    at once.

    With x = QR, the loss of a linear one depends only on the covariance of the digits, RᵀR / n: it
    is the loss on the 64 rows of R, scaled. W starts with orthonormal rows in the span of some
    digits, and V = Wᵀ. Components along which the digits hardly vary would take long to disappear.
    """

    def __init__(self, code: int, hidden: tuple[int, ...], x: Tensor) -> None:
        self.model = Autoencoder(code, *hidden).to(x)
        self.x = x if hidden else torch.linalg.qr(x)[1] * (x.shape[1] / len(x)) ** 0.5
        if not hidden:
            start = torch.linalg.qr(x[torch.randperm(len(x))[:code].to(x.device)].t())[0]
            with torch.no_grad():
                for layers, weight in ((self.model.encode, start.t()), (self.model.decode, start)):
                    layers[0].load_state_dict({"weight": weight})
        self.loss = nn.MSELoss()
        self.batch = BATCH if hidden else None
        parameters = list(self.model.parameters())
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(parameters, lr=RATE)
            if hidden
            else torch.optim.LBFGS(
                parameters,
                max_iter=ITERATIONS,
                history_size=HISTORY,
                tolerance_grad=1e-13,
                tolerance_change=0,
                line_search_fn="strong_wolfe",
            )
        )
        self.history: list[float] = []  # the loss of each epoch

    def epoch(self, order: Tensor) -> None:
        """Goes through the digits once, in ``order``, or takes ITERATIONS steps of L-BFGS."""
        for batch in self.x[order.to(self.x.device)].split(self.batch) if self.batch else [self.x]:

            def closure(batch: Tensor = batch) -> Tensor:
                self.optimizer.zero_grad()
                loss = self.loss(self.model(batch), batch)
                loss.backward()
                return loss

            self.optimizer.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            self.history.append(self.loss(self.model(self.x), self.x).item())

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]


def coders(x: Tensor) -> dict[str, Coder]:
    """The four autoencoders."""
    shapes = {"linear": (), "nonlinear": (64,)}
    return {
        f"{name} {code}": Coder(code, hidden, x)
        for code in CODES
        for name, hidden in shapes.items()
    }


def data(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels in float64, between 0 and 1, minus their mean; the mean; and the labels, for the
    evaluation."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).to(device) / 16
    return x - x.mean(dim=0), x.mean(dim=0), torch.from_numpy(labels)


def angle_to_principal_components(model: Autoencoder, x: Tensor) -> float:
    """The sine of the largest angle between the subspace of a linear autoencoder's outputs and that
    of x's first principal components."""
    ours = torch.linalg.qr(next(model.decode.parameters()).detach())[0]
    principal = torch.linalg.svd(x, full_matrices=False)[2][: ours.shape[1]].t()
    return torch.linalg.matrix_norm(ours - principal @ (principal.t() @ ours), 2).item()


class SquaredDistances(torch.autograd.Function):
    """J = Σ_x min_c ‖x - c‖²;  ∂J/∂c = 2 Σ (c - x) = 2 (n c - Σ x) over the n rows x whose nearest
    centroid is c."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        squares, nearest = torch.cdist(x, centroids).square().min(dim=1)
        ctx.save_for_backward(x, centroids, nearest)
        ctx.mark_non_differentiable(nearest)
        return squares.sum(), nearest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dJ: Tensor, _: Any) -> tuple[None, Tensor]:
        x, centroids, nearest = ctx.saved_tensors
        sums = torch.zeros_like(centroids).index_add_(0, nearest, x)
        return None, dJ * 2 * (_counts(nearest, centroids) * centroids - sums)


def _counts(nearest: Tensor, centroids: Tensor) -> Tensor:
    """n for each centroid, in a shape that broadcasts along its components."""
    return torch.bincount(nearest, minlength=len(centroids)).to(centroids.dtype).unsqueeze(1)


def k_means(x: Tensor, generator: torch.Generator) -> tuple[float, Tensor, Tensor]:
    """The lowest loss of STARTS runs, its centroids, and the index of the nearest one to each
    row."""
    return min((_descend(x, c) for c in _starts(x, generator)), key=lambda found: found[0])


def _starts(x: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """CLUSTERS rows of x, each drawn with a probability proportional to its squared distance from
    those drawn before (Arthur and Vassilvitskii, 2007)."""
    for _ in range(STARTS):
        chosen = torch.randint(len(x), (1,), generator=generator)
        while len(chosen) < CLUSTERS:
            squares = torch.cdist(x, x[chosen.to(x.device)]).square().amin(dim=1)
            chosen = torch.cat([chosen, torch.multinomial(squares.cpu(), 1, generator=generator)])
        yield x[chosen.to(x.device)]


def _descend(x: Tensor, centroids: Tensor) -> tuple[float, Tensor, Tensor]:
    """Newton's steps by the gradient, until no row changes its centroid."""
    before = None
    for _ in range(MOST_STEPS):
        centroids = centroids.detach().requires_grad_()
        loss, nearest = SquaredDistances.apply(x, centroids)
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        (gradient,) = torch.autograd.grad(loss, centroids)
        centroids = centroids - gradient / (2 * _counts(nearest, centroids)).clamp_min(1)
    return loss.item(), centroids.detach(), nearest


def train(all_coders: dict[str, Coder], count: int, args: Namespace) -> None:
    """Trains all four on ``count`` digits, from the checkpoint if there is one."""
    settings = settings_of(args, batch=BATCH, rate=RATE, iterations=ITERATIONS, history=HISTORY)
    # after the weights are drawn, nothing else is random
    shuffle = torch.Generator().manual_seed(args.seed)
    done = 0
    if (state := load(args.checkpoint, settings)) is not None:
        done = state["epoch"]
        shuffle.set_state(state["shuffle"])
        for name, coder in all_coders.items():
            coder.load_state_dict(state["coders"][name])
        print(f"continuing after epoch {done} of {args.epochs}, from {args.checkpoint}")

    each = len(all_coders)
    with tqdm(
        total=args.epochs * each,
        initial=done * each,
        unit="epoch",
        mininterval=0.5,
        dynamic_ncols=True,
    ) as bar:
        for epoch in range(done + 1, args.epochs + 1):
            order = torch.randperm(count, generator=shuffle)
            for coder in all_coders.values():
                coder.epoch(order)
                bar.update()
            state = {"settings": settings, "epoch": epoch, "shuffle": shuffle.get_state()}
            save(
                {
                    **state,
                    "coders": {name: coder.state_dict() for name, coder in all_coders.items()},
                },
                args.checkpoint,
            )
            bar.set_postfix_str(
                ", ".join(f"{name} {coder.history[-1]:.4f}" for name, coder in all_coders.items()),
                refresh=False,
            )


def draw_codes(
    codes: dict[str, Tensor],
    found: dict[str, tuple[float, Tensor, Tensor]],
    labels: Tensor,
    args: Namespace,
) -> None:
    """The two-dimensional codes, coloured by digit, and the centroids."""
    flat = {name: z for name, z in codes.items() if z.shape[1] == 2}
    figure, axes = plt.subplots(1, len(flat), figsize=(5.5 * len(flat), 4.6))
    for plot, (name, z) in zip(axes, flat.items(), strict=True):
        points = plot.scatter(
            *z.t().cpu().numpy(),
            c=labels.numpy(),
            cmap="tab10",
            vmin=-0.5,
            vmax=9.5,
            s=8,
            alpha=0.7,
        )
        plot.scatter(
            *found[name][1].t().cpu().numpy(), c="black", marker="x", s=60, label="k-means"
        )
        plot.set(
            title=f"{name.split()[0]}: 64 -> 2", xlabel="first number of the code", ylabel="second"
        )
        plot.legend()
    figure.colorbar(points, ax=axes, ticks=range(10), label="digit (not used in training)")
    write(figure, args.out / "codes.png")


def draw_digits(rows: dict[str, Tensor], labels: Tensor, args: Namespace) -> None:
    """One of each digit, as it is and as each autoencoder reproduces it."""
    chosen = [int((labels == digit).nonzero()[0]) for digit in range(10)]
    figure, axes = plt.subplots(len(rows), 10, figsize=(9, 0.95 * len(rows)))
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for plot, i in zip(line, chosen, strict=True):
            plot.imshow(images[i].reshape(8, 8).cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
            plot.set(xticks=[], yticks=[])
            plot.grid(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    write(figure, args.out / "reconstructions.png")


def main() -> None:
    args = options("autoencoder", __doc__, epochs=40)
    args.checkpoint = args.out / "checkpoint.pt"
    torch.manual_seed(args.seed)
    x, mean, labels = data(args.device)
    all_coders = coders(x)
    print(f"{len(x)} digits; {where(args)}")
    for name, coder in all_coders.items():
        print(f"{name}: {coder.model}")
    try:
        train(all_coders, len(x), args)
    except KeyboardInterrupt:
        stop(args.checkpoint)

    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        codes = {name: coder.model.encode(x) for name, coder in all_coders.items()}
        images = {
            "digit": x + mean,
            **{name: coder.model(x) + mean for name, coder in all_coders.items()},
        }
    found = {name: k_means(z, generator) for name, z in {**codes, "pixels": x}.items()}
    draw_codes(codes, found, labels, args)
    draw_digits(images, labels, args)
    save(
        {name: coder.model.state_dict() for name, coder in all_coders.items()},
        args.out / "weights.pt",
    )
    print(f"wrote {args.out / 'weights.pt'}")
    args.checkpoint.unlink()

    with threadpool_limits(1):
        sklearn = KMeans(CLUSTERS, n_init=STARTS, random_state=args.seed).fit(x.cpu().numpy())
    agreement = {
        name: normalized_mutual_info_score(labels, nearest.cpu())
        for name, (_, _, nearest) in found.items()
    }
    by_sklearn = normalized_mutual_info_score(labels, sklearn.labels_)
    print(f"{'':14}{'squared error':>14}{'mutual information':>20}{'angle to PCA':>15}")
    for name, coder in all_coders.items():
        angle = (
            f"{angle_to_principal_components(coder.model, x):15.1e}"
            if name.startswith("linear")
            else ""
        )
        print(f"{name:14}{coder.history[-1]:14.5f}{agreement[name]:20.3f}{angle}")
    print(
        f"{'pixels':14}{'':14}{agreement['pixels']:20.3f}   "
        f"k-means loss {found['pixels'][0]:.1f}, scikit-learn's {sklearn.inertia_:.1f}"
    )
    angles = [
        angle_to_principal_components(coder.model, x)
        for name, coder in all_coders.items()
        if name.startswith("linear")
    ]
    equal = "the linear codes span PCA's spaces to 1e-3"
    print(
        equal
        if max(angles) <= 1e-3
        else f"the linear codes do not span PCA's spaces to 1e-3 after {args.epochs} epochs"
    )
    errors = [
        f"{code} numbers: nonlinear {all_coders[f'nonlinear {code}'].history[-1]:.4f}, "
        f"linear {all_coders[f'linear {code}'].history[-1]:.4f}"
        for code in CODES
    ]
    print(f"squared error of {'; of '.join(errors)}")
    best = max(codes, key=lambda name: agreement[name])
    print(
        f"normalised mutual information: {agreement[best]:.3f} ({best}), "
        f"scikit-learn's KMeans on raw pixels {by_sklearn:.3f}"
    )


if __name__ == "__main__":
    main()
