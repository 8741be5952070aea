"""A small GPT that learns English, one character after another, built of our layers alone.

The text is Python's own documentation, which is part of every Python (pydoc_data.topics), or a file
(--text). Its last tenth is for validation. The model is a Llama in small: an embedding, blocks of
RMSNorm, causal attention with rotary positions, RMSNorm and a SwiGLU MLP, a last RMSNorm, and the
cross-entropy of a linear layer, whose logits are never whole in memory. AdamW trains it on random
windows of the text, 100 batches an epoch, with gradients clipped to a norm of 1.

--compare trains stock PyTorch's twin too, from the same weights on the same batches, and compares
their losses, their time and their memory. The twin consists of the layers that anybody would write.
Both end with the same loss but for rounding, which training amplifies. With --recompute our MLPs
keep only their input for backward, which takes still less memory and a little more time.

Each epoch ends with a checkpoint. After Ctrl-C the same command continues from the last one and
ends with exactly the weights of an uninterrupted run. A finished run leaves its weights and its
picture but no checkpoint, so the same command then starts again.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from argparse import Namespace
from hashlib import sha256
from typing import Any

try:
    import torch
    from common import options, plt, resume, save, save_epoch, settings_of, stop, where, write
    from torch import Tensor
    from torch.nn.utils import clip_grad_norm_
    from tqdm import tqdm

    from custom_backprop import functional, nn, optim
    from custom_backprop.testing import peak_memory
except ImportError as error:
    sys.exit(f"{error}; the examples need: pip install -e '.[demo]'")

DIM, HEADS, HIDDEN, LAYERS, CONTEXT = 128, 4, 352, 4, 128
BATCH, EPOCH = 16, 100
RATE, WARMUP, DECAY, BETAS = 3e-3, 50, 0.1, (0.9, 0.95)
VALIDATION, SAMPLE, TEMPERATURE = 64, 400, 0.8


class Ours:
    """The parts of our model."""

    Embedding, Linear, RMSNorm = nn.Embedding, nn.Linear, nn.RMSNorm
    Rotary, MLP, Loss, AdamW = (
        nn.RotaryEmbedding,
        nn.SwiGLUMLP,
        nn.LinearCrossEntropyLoss,
        optim.AdamW,
    )
    attention = staticmethod(functional.scaled_dot_product_attention)


class StockRotary(torch.nn.Module):
    """Each pair (x_i, x_(i + dim/2)) at position p turned by the angle p 10000^(-2i/dim)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, positions: int) -> None:
        super().__init__()
        rates = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.outer(torch.arange(positions, dtype=torch.float64), rates)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class StockMLP(torch.nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(dim, hidden, bias=False)
        self.up_proj = torch.nn.Linear(dim, hidden, bias=False)
        self.down_proj = torch.nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        silu = torch.nn.functional.silu(self.gate_proj(x))
        return self.down_proj(silu * self.up_proj(x))


class StockLoss(torch.nn.Module):
    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(dim, classes, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(self.linear(x), target)


class Stock:
    """The parts of stock's twin, with the same names of parameters."""

    Embedding, Linear, RMSNorm = torch.nn.Embedding, torch.nn.Linear, torch.nn.RMSNorm
    Rotary, MLP, Loss, AdamW = StockRotary, StockMLP, StockLoss, torch.optim.AdamW
    attention = staticmethod(torch.nn.functional.scaled_dot_product_attention)


class Block(torch.nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, parts: Any, **mlp: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = parts.RMSNorm(DIM), parts.RMSNorm(DIM)
        self.qkv = parts.Linear(DIM, 3 * DIM, bias=False)
        self.out = parts.Linear(DIM, DIM, bias=False)
        self.rotary = parts.Rotary(DIM // HEADS, CONTEXT)
        self.mlp = parts.MLP(DIM, HIDDEN, **mlp)
        self.attention = parts.attention

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, context, dim of a head)
        y = self.attention(self.rotary(q), self.rotary(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(torch.nn.Module):
    """Characters in, the loss of the next ones out."""

    def __init__(self, parts: Any, characters: int, **mlp: bool) -> None:
        super().__init__()
        self.embedding = parts.Embedding(characters, DIM)
        self.blocks = torch.nn.Sequential(*[Block(parts, **mlp) for _ in range(LAYERS)])
        self.norm = parts.RMSNorm(DIM)
        self.loss = parts.Loss(DIM, characters)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # what is added to x by 2 LAYERS layers is that much smaller
                into_x = name.endswith(("out.weight", "down_proj.weight"))
                torch.nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS if into_x else 1))

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embedding(x)))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy, in nats a character, of (batch, seq) characters."""
        return self.loss(self.features(x).flatten(0, 1), target.flatten())

    @torch.no_grad()
    def sample(self, x: Tensor, count: int, chance: torch.Generator) -> Tensor:
        """``x`` (seq) and ``count`` more characters."""
        for _ in range(count):
            last = self.features(x[None, -CONTEXT:])[0, -1]
            p = functional.softmax(self.loss.linear(last) / TEMPERATURE, -1)
            x = torch.cat((x, torch.multinomial(p.cpu(), 1, generator=chance).to(x.device)))
        return x


class Learner:
    """A model in training, and what is recorded."""

    def __init__(self, parts: Any, characters: int, args: Namespace) -> None:
        torch.manual_seed(args.seed)
        mlp = {"recompute": True} if args.recompute and parts is Ours else {}
        self.model = GPT(parts, characters, **mlp).to(args.device)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.model.parameters() if p.dim() == 2], "weight_decay": DECAY},
            {"params": [p for p in self.model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = parts.AdamW(groups, lr=RATE, betas=BETAS)
        self.steps, self.last = 0, args.epochs * EPOCH
        self.seconds = 0.0
        self.history: dict[str, list[float]] = {"training": [], "validation": []}  # by epoch

    def rate(self) -> float:
        """Up to RATE by a straight line, then down to a tenth of it by a cosine."""
        if self.steps < WARMUP:
            return RATE * (self.steps + 1) / WARMUP
        done = (self.steps - WARMUP) / max(self.last - WARMUP, 1)
        return RATE * (0.55 + 0.45 * math.cos(math.pi * done))

    def step(self, x: Tensor, target: Tensor) -> Tensor:
        """Forward, backward, update, timed. Returns the loss."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad()
        loss = self.model(x, target)
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        self.steps += 1
        self.seconds += time.perf_counter() - start
        return loss.detach()

    @property
    def milliseconds(self) -> float:
        """The mean time of a step."""
        return 1e3 * self.seconds / self.steps

    @torch.no_grad()
    def validate(self, windows: Tensor) -> float:
        """The loss on windows (count, CONTEXT + 1)."""
        parts = windows.split(BATCH)
        losses = [self.model(w[:, :-1], w[:, 1:]).item() * len(w) for w in parts]
        return sum(losses) / len(windows)

    def state_dict(self) -> dict[str, Any]:
        own = {"steps": self.steps, "seconds": self.seconds, "history": self.history}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.seconds, self.history = (
            state[name] for name in ("steps", "seconds", "history")
        )


class Text:
    """A text as numbers: one for each character that it has."""

    def __init__(self, args: Namespace) -> None:
        if args.text is None:
            from pydoc_data.topics import topics

            content = "\n".join(topics.values())
        else:
            try:
                content = args.text.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                sys.exit(f"cannot read {args.text}: {error}")
        self.digest = sha256(content.encode()).hexdigest()
        self.characters = sorted(set(content))
        number = {character: i for i, character in enumerate(self.characters)}
        whole = torch.tensor([number[character] for character in content])
        size = len(whole) // 10
        if size <= CONTEXT:
            sys.exit(f"a text of {len(whole)} characters is too short: 10 windows of {CONTEXT + 1}")
        self.training, rest = whole[:-size], whole[-size:]
        windows = rest.unfold(0, CONTEXT + 1, CONTEXT)  # apart but for the character that both have
        evenly = torch.linspace(0, len(windows) - 1, min(VALIDATION, len(windows))).long()
        self.validation = windows[evenly].to(args.device)
        self.device = args.device

    def batch(self, chance: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random windows, and the same one character later."""
        starts = torch.randint(len(self.training) - CONTEXT, (BATCH, 1), generator=chance)
        windows = self.training[starts + torch.arange(CONTEXT + 1)].to(self.device)
        return windows[:, :-1], windows[:, 1:]

    def read(self, x: Tensor) -> str:
        return "".join(self.characters[i] for i in x)


def train(learners: dict[str, Learner], text: Text, args: Namespace) -> None:
    """Trains all, from the checkpoint if there is one."""
    shape = {"dim": DIM, "heads": HEADS, "hidden": HIDDEN, "layers": LAYERS, "context": CONTEXT}
    settings = settings_of(
        args, **shape, batch=BATCH, epoch=EPOCH, rate=RATE, validation=VALIDATION
    )
    settings["text"] = text.digest
    # after the weights are drawn, nothing else is random
    chance = torch.Generator().manual_seed(args.seed)
    done = resume(args.checkpoint, settings, learners, chance, args.epochs)
    with tqdm(
        total=args.epochs * EPOCH,
        initial=done * EPOCH,
        unit="step",
        mininterval=0.5,
        dynamic_ncols=True,
    ) as bar:
        for epoch in range(done + 1, args.epochs + 1):
            losses: dict[str, list[Tensor]] = {name: [] for name in learners}
            for i in range(EPOCH):
                batch = text.batch(chance)
                # each goes first in turn, so that neither always gets the warmer cache
                for name in sorted(learners, reverse=i % 2 == 0):
                    losses[name].append(learners[name].step(*batch))
                bar.update()
            for name, learner in learners.items():
                learner.history["training"].append(torch.stack(losses[name]).mean().item())
                learner.history["validation"].append(learner.validate(text.validation))
            save_epoch(args.checkpoint, settings, learners, chance, epoch)
            bar.set_postfix_str(
                ", ".join(
                    f"{name} {learner.history['validation'][-1]:.3f}"
                    for name, learner in learners.items()
                ),
                refresh=False,
            )


def step_memory(learner: Learner, batch: tuple[Tensor, Tensor], device: str) -> int:
    """Peak bytes of one training step of a copy."""
    twin = copy.deepcopy(learner)

    def step() -> None:
        twin.step(*batch)
        twin.optimizer.zero_grad()

    return peak_memory(step, device)


def draw(learners: dict[str, Learner], memory: dict[str, int], args: Namespace) -> None:
    """The losses by step, stock broad and pale and ours thin and dark on top; and, to compare, the
    memory and the time of a step."""
    widths = [3, 1, 1] if memory else [3]
    size = (7 + 2 * len(widths), 3.8)
    figure, axes = plt.subplots(1, len(widths), figsize=size, width_ratios=widths, squeeze=False)
    loss, *others = axes[0]
    steps = [EPOCH * (i + 1) for i in range(args.epochs)]
    for name, learner in reversed(learners.items()):
        look = {"linewidth": 1.3} if name == "ours" else {"linewidth": 6, "alpha": 0.35}
        for color, (which, values) in zip(("C1", "C0"), learner.history.items(), strict=True):
            loss.plot(steps, values, color=color, label=f"{which}, {name}", **look)
    loss.set(xlabel="step", ylabel="nats per character", title="Loss")
    loss.legend()
    shown: list[tuple[dict[str, float], str, str]] = [
        ({name: m / 2**20 for name, m in memory.items()}, "MiB", "Peak memory of a step"),
        (
            {name: learner.milliseconds for name, learner in learners.items()},
            "ms",
            "Time of a step",
        ),
    ]
    for plot, (bars, unit, title) in zip(others, shown, strict=False):
        drawn = plot.bar(list(bars), list(bars.values()), color=["C0", "0.75"], width=0.6)
        plot.bar_label(drawn, fmt="%.0f")
        plot.set(ylabel=unit, title=title)
        plot.grid(visible=False)
    write(figure, args.out / "char_gpt.png")


def main() -> None:
    args = options(
        "char_gpt",
        __doc__,
        epochs=10,
        threads=torch.get_num_threads(),
        compare=False,
        recompute=False,
        text=None,
    )
    args.checkpoint = args.out / "checkpoint.pt"
    text = Text(args)
    parts = {"ours": Ours, "stock": Stock} if args.compare else {"ours": Ours}
    learners = {name: Learner(of, len(text.characters), args) for name, of in parts.items()}
    ours = learners["ours"]
    count = sum(p.numel() for p in ours.model.parameters())
    print(
        f"{len(text.training)} characters for training, {len(text.characters)} different ones; "
        f"{count} parameters; {where(args)}"
    )
    batch = text.batch(torch.Generator().manual_seed(args.seed))
    memory = {}
    if args.compare:
        learners["stock"].model.load_state_dict(ours.model.state_dict())
        memory = {name: step_memory(l, batch, args.device) for name, l in learners.items()}
    try:
        train(learners, text, args)
    except KeyboardInterrupt:
        stop(args.checkpoint)

    draw(learners, memory, args)
    save({name: l.model.state_dict() for name, l in learners.items()}, args.out / "weights.pt")
    print(f"wrote {args.out / 'weights.pt'}")
    args.checkpoint.unlink()
    start, chance = text.validation[0, :CONTEXT], torch.Generator().manual_seed(args.seed)
    written = text.read(ours.model.sample(start, SAMPLE, chance)[CONTEXT:])
    print(f"a sample:\n{written}\n")
    found = ours.history["validation"][-1]
    if args.compare:
        stock = learners["stock"]
        print(
            f"ours / stock: time of a step {ours.milliseconds / stock.milliseconds:.2f}, "
            f"peak memory of a step {memory['ours'] / memory['stock']:.2f}; "
            f"difference of validation losses {found - stock.history['validation'][-1]:+.4f}"
        )
    print(f"time of a step: {ours.milliseconds:.0f} ms")
    print(f"validation loss: {found:.3f} nats per character")


if __name__ == "__main__":
    main()
