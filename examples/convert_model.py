"""One line before training: custom_backprop.convert(model).

Three models of Hugging Face, small and with random weights, each in two copies that start alike:
stock's, and one that convert() has changed in place. Both train on the same batches: a Llama
finds the next word of a text, a BERT the words that are masked in it, a ViT the digit in an image.
The text is Python's own documentation, which is part of every Python (pydoc_data.topics). The
digits are scikit-learn's.

For each model the program prints what was converted and what was left, and why. Then come the
losses, which are equal but for rounding, the time of a step, and the memory that it takes.
"""

from __future__ import annotations

import copy
import re
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

try:
    import torch
    from common import options, plt, where, write
    from sklearn.datasets import load_digits
    from torch import Tensor
    from tqdm import tqdm
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        LlamaConfig,
        LlamaForCausalLM,
        ViTConfig,
        ViTForImageClassification,
    )

    import custom_backprop
    from custom_backprop.testing import peak_memory
except ImportError as error:
    sys.exit(f"{error}; this example needs: pip install -e '.[demo,hf]'")

WIDTH, LAYERS, HEADS = 128, 2, 4
SEQUENCES, LENGTH, MASKED = 8, 128, 0.15
IMAGES = 128
RATE, TOLERANCE = 1e-3, 1e-3
SHAPE: Any = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
NO_DROPOUT: Any = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

#: draws a batch, the arguments of a model, from a generator
Draw = Callable[[torch.Generator], dict[str, Tensor]]


class Text:
    """Python's documentation as numbers, one for each word or sign; 0 is the mask."""

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        content = re.findall(r"\w+|[^\w\s]", "\n".join(topics.values()))
        number = {word: i for i, word in enumerate(sorted(set(content)), 1)}
        self.count = len(number) + 1
        self.whole = torch.tensor([number[word] for word in content])

    def windows(self, chance: torch.Generator) -> Tensor:
        starts = torch.randint(len(self.whole) - LENGTH, (SEQUENCES, 1), generator=chance)
        return self.whole[starts + torch.arange(LENGTH)]

    def next_word(self, chance: torch.Generator) -> dict[str, Tensor]:
        x = self.windows(chance)
        return {"input_ids": x, "labels": x}

    def masked_words(self, chance: torch.Generator) -> dict[str, Tensor]:
        x = self.windows(chance)
        hidden = torch.rand(x.shape, generator=chance) < MASKED
        return {"input_ids": x.masked_fill(hidden, 0), "labels": x.masked_fill(~hidden, -100)}


class Digits:
    """Images of 8x8 points."""

    def __init__(self) -> None:
        digits = load_digits()
        self.images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
        self.labels = torch.from_numpy(digits.target).long()

    def batch(self, chance: torch.Generator) -> dict[str, Tensor]:
        i = torch.randint(len(self.images), (IMAGES,), generator=chance)
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


def models(seed: int) -> dict[str, tuple[torch.nn.Module, Draw]]:
    """Each with what draws its batches."""
    torch.manual_seed(seed)
    text, digits = Text(), Digits()
    words: Any = {"vocab_size": text.count, "max_position_embeddings": LENGTH}
    llama = LlamaConfig(**words, **SHAPE, intermediate_size=352, use_cache=False)
    bert = BertConfig(**words, **SHAPE, **NO_DROPOUT, intermediate_size=4 * WIDTH)
    picture: Any = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    vit = ViTConfig(**picture, **SHAPE, **NO_DROPOUT, intermediate_size=4 * WIDTH)
    return {
        "Llama": (LlamaForCausalLM(llama), text.next_word),
        "BERT": (BertForMaskedLM(bert), text.masked_words),
        "ViT": (ViTForImageClassification(vit), digits.batch),
    }


class Learner:
    """A model in training, and what is recorded."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.memory = 0

    def step(self, batch: dict[str, Tensor]) -> float:
        """Forward, backward, update. Returns the loss."""
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()  # waits until a GPU has finished

    def learn(self, batch: dict[str, Tensor]) -> None:
        start = time.perf_counter()
        self.losses.append(self.step(batch))
        self.seconds.append(time.perf_counter() - start)

    @property
    def milliseconds(self) -> float:
        """The median time of a step."""
        return 1e3 * statistics.median(self.seconds)


def train(name: str, model: torch.nn.Module, draw: Draw, args: Namespace) -> dict[str, Learner]:
    """Stock's copy and the converted one, in turns on the same batches."""
    stock = model.to(args.device)
    ours = custom_backprop.convert(copy.deepcopy(stock))
    print(f"{name}: {sum(p.numel() for p in stock.parameters())} parameters")
    learners = {"stock": Learner(stock), "converted": Learner(ours)}
    chance = torch.Generator().manual_seed(args.seed)
    batch = {k: t.to(args.device) for k, t in draw(chance).items()}
    print(f"{custom_backprop.conversion_report(ours, **batch)}\n", flush=True)
    for i in tqdm(range(args.steps), name, unit="step", dynamic_ncols=True):
        # each goes first in turn, so that neither always gets the warmer cache
        for side in sorted(learners, reverse=i % 2 == 0):
            learners[side].learn(batch)
        batch = {k: t.to(args.device) for k, t in draw(chance).items()}
    for learner in learners.values():
        learner.memory = peak_memory(partial(learner.step, batch), args.device)
    return learners


def table(trained: dict[str, dict[str, Learner]]) -> str:
    lines = [f"{'':18}{'last loss':>14}{'ms a step':>12}{'MiB a step':>12}"]
    for name, learners in trained.items():
        for side, learner in learners.items():
            figures = f"{learner.milliseconds:12.1f}{learner.memory / 2**20:12.1f}"
            lines.append(f"{name:7}{side:11}{learner.losses[-1]:14.6f}{figures}")
    return "\n".join(lines)


def furthest(learners: dict[str, Learner]) -> float:
    """The largest difference of the two losses in all steps, relative."""
    pairs = zip(learners["converted"].losses, learners["stock"].losses, strict=True)
    return max(abs(ours / stock - 1) for ours, stock in pairs)


def draw(trained: dict[str, dict[str, Learner]], args: Namespace) -> None:
    """The losses by step, stock broad and pale and converted thin and dark on top; and the memory
    and the time of a step."""
    widths = [1.3] * len(trained) + [1, 1]
    figure, plots = plt.subplots(1, len(widths), figsize=(16, 3.6), width_ratios=widths)
    for plot, (name, learners) in zip(plots, trained.items(), strict=False):
        for side, learner in learners.items():
            look = {"linewidth": 1.3} if side == "converted" else {"linewidth": 6, "alpha": 0.35}
            plot.plot(learner.losses, color="C0", label=side, **look)
        plot.set(xlabel="step", title=f"{name}: loss")
        plot.legend()
    shown: list[tuple[str, str, Callable[[Learner], float]]] = [
        ("Peak memory of a step", "MiB", lambda learner: learner.memory / 2**20),
        ("Time of a step", "ms", lambda learner: learner.milliseconds),
    ]
    for plot, (title, unit, figure_of) in zip(plots[len(trained) :], shown, strict=True):
        for k, (side, color) in enumerate((("stock", "0.75"), ("converted", "C0"))):
            heights = [figure_of(learners[side]) for learners in trained.values()]
            places = [i + 0.4 * k - 0.2 for i in range(len(trained))]
            bars = plot.bar(places, heights, 0.4, color=color, label=side)
            plot.bar_label(bars, fmt="%.0f")
        plot.set_xticks(range(len(trained)), trained)
        plot.set(ylabel=unit, title=title)
        plot.grid(visible=False)
        plot.margins(y=0.3)
        plot.legend(loc="upper left")
    write(figure, args.out / "convert_model.png")


def main() -> None:
    args = options("convert_model", __doc__, steps=40, threads=torch.get_num_threads())
    print(f"{args.steps} steps, {where(args)}\n")
    trained: dict[str, Any] = {
        name: train(name, *pair, args) for name, pair in models(args.seed).items()
    }
    print(f"{table(trained)}\n")
    draw(trained, args)
    apart = {name: furthest(learners) for name, learners in trained.items()}
    print("losses differ by at most", ", ".join(f"{n} {d:.1e}" for n, d in apart.items()))
    if not max(apart.values()) <= TOLERANCE:
        sys.exit(f"the losses differ by more than {TOLERANCE:g} of themselves")


if __name__ == "__main__":
    main()
