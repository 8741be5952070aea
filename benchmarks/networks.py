"""The models that ``benchmarks.models`` trains, with random weights, and their batches.

Dropout is off in all, so that two twins can be compared. Each is called as ``model(**batch)`` and
returns the loss, or an output of Hugging Face that has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Size:
    """Features and layers; tokens of a sequence, sequences and images of a batch; the most words of
    a vocabulary; classes of images; the height and width of large ones."""

    hidden: int = 256
    layers: int = 4
    tokens: int = 256
    sequences: int = 4
    images: int = 32
    words: int = 2**17
    classes: int = 100
    pixels: int = 224

    @property
    def heads(self) -> int:
        return self.hidden // 64 or 1

    @property
    def inner(self) -> int:
        """Units inside a gated MLP: 8/3 of the features, in multiples of 64."""
        return self.hidden * 8 // 3 // 64 * 64 or self.hidden


#: of a test; of a CPU; of a GPU, where GPT-2 has 124 million parameters
QUICK = Size(hidden=32, layers=1, tokens=8, sequences=2, images=2, words=50, classes=5, pixels=32)
MEDIUM = Size()
LARGE = Size(hidden=768, layers=12, tokens=1024, sequences=8, images=128)


@dataclass(frozen=True)
class Network:
    """``batch`` draws one from a generator. ``count`` is how many ``unit`` it has. ``library`` is
    imported by ``build``."""

    unit: str
    count: Callable[[Size], int]
    build: Callable[[Size], nn.Module]
    batch: Callable[[Size, Generator], dict[str, Tensor]]
    library: str = "torch"


def llama(size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: Any = {"hidden_size": size.hidden, "num_hidden_layers": size.layers, "use_cache": False}
    heads: Any = {"num_attention_heads": size.heads, "num_key_value_heads": size.heads}
    words, inner = min(32000, size.words), size.inner
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=words, intermediate_size=inner, **shape, **heads)
    )


def gpt2(size: Size) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout: Any = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape: Any = {"n_embd": size.hidden, "n_layer": size.layers, "n_head": size.heads}
    words = min(50257, size.words)
    special: Any = {"bos_token_id": words - 1, "eos_token_id": words - 1}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=words, use_cache=False, **shape, **special, **no_dropout)
    )


def bert(size: Size) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(vocab_size=min(30522, size.words), **_encoder(size)))


def vit(size: Size) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    shape: Any = {"num_labels": size.classes, **_encoder(size)}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=4, **shape))


def _encoder(size: Size) -> dict[str, Any]:
    no_dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    shape = {"hidden_size": size.hidden, "intermediate_size": 4 * size.hidden}
    depth = {"num_hidden_layers": size.layers, "num_attention_heads": size.heads}
    return {**shape, **depth, **no_dropout}


class ResNet(nn.Module):
    """A ResNet for images of 32x32: a first convolution, and three stages of blocks."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        widths, blocks = [size.hidden // 8 * 2**stage for stage in range(3)], size.layers // 2 or 1
        self.stem = convolution(3, widths[0], 1)
        self.blocks = nn.Sequential()
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for i in range(blocks):
                self.blocks.append(Block(inputs, width, stride=2 if stage and not i else 1))
                inputs = width
        self.head = nn.Linear(inputs, size.classes)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(pixel_values)))
        return F.cross_entropy(self.head(x.mean((2, 3))), labels)


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        first = convolution(inputs, width, stride)
        self.body = nn.Sequential(first, nn.ReLU(), convolution(width, width, 1))
        same = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if same else convolution(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def convolution(inputs: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)
    )


class Attention(nn.Module):
    """Of each of the tokens to all, or to those before it."""

    def __init__(self, size: Size, causal: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(size.hidden, 3 * size.hidden)
        self.out = nn.Linear(size.hidden, size.hidden)
        self.heads, self.causal = size.heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, size: Size, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size.hidden), nn.LayerNorm(size.hidden)
        self.attention = Attention(size, causal)
        inner = 4 * size.hidden
        self.mlp = nn.Sequential(
            nn.Linear(size.hidden, inner), nn.GELU(), nn.Linear(inner, size.hidden)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Layers and a last norm, on tokens with learned positions."""

    def __init__(self, size: Size, tokens: int, causal: bool) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, size.hidden))
        self.layers = nn.Sequential(*[Layer(size, causal) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layers(x + self.positions[: x.shape[1]]))


class GPT(nn.Module):
    """Each token predicts the next one. The head is the embedding; 124 million parameters with 768
    features, 12 layers and 50257 words."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        words = min(50257, size.words)
        self.embedding = nn.Embedding(words, size.hidden)
        self.body = Transformer(size, size.tokens, causal=True)
        self.head = nn.Linear(size.hidden, words, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.body(self.embedding(input_ids)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class ViT(nn.Module):
    """Classes of images, in patches of 16x16. ViT-B, of 86 million parameters, with 768 features,
    12 layers and images of 224x224."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, size.hidden, 16, 16)
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, size.hidden))
        self.body = Transformer(size, (size.pixels // 16) ** 2 + 1, causal=False)
        self.head = nn.Linear(size.hidden, size.classes)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).mT
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        return F.cross_entropy(self.head(self.body(x)[:, 0]), labels)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden, size.inner, bias=False)
        self.up_proj = nn.Linear(size.hidden, size.inner, bias=False)
        self.down_proj = nn.Linear(size.inner, size.hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MLPs(nn.Module):
    """x + mlp(norm(x)), layer after layer, fitted to a target by the mean squared error."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(size.hidden) for _ in range(size.layers))
        self.mlps = nn.ModuleList(MLP(size) for _ in range(size.layers))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(norm(x))
        return F.mse_loss(x, target)


def causal(words: int) -> Callable[[Size, Generator], dict[str, Tensor]]:
    """Random words, each the label of the one before."""

    def batch(size: Size, chance: Generator) -> dict[str, Tensor]:
        shape = size.sequences, size.tokens
        x = torch.randint(min(words, size.words), shape, generator=chance)
        return {"input_ids": x, "labels": x}

    return batch


def masked(size: Size, chance: Generator) -> dict[str, Tensor]:
    """15 % of the words are to be found; the mask is word 103, as in BERT's vocabulary."""
    x = causal(30522)(size, chance)["input_ids"]
    hidden = torch.rand(x.shape, generator=chance) < 0.15
    hidden[:, 0] = True  # so that a small batch has one, too
    labels = x.masked_fill(~hidden, -100)
    return {"input_ids": x.masked_fill(hidden, min(103, size.words - 1)), "labels": labels}


def images(size: Size, chance: Generator, pixels: int = 32) -> dict[str, Tensor]:
    labels = torch.randint(size.classes, (size.images,), generator=chance)
    return {
        "pixel_values": torch.randn(size.images, 3, pixels, pixels, generator=chance),
        "labels": labels,
    }


def large_images(size: Size, chance: Generator) -> dict[str, Tensor]:
    return images(size, chance, size.pixels)


def vectors(size: Size, chance: Generator) -> dict[str, Tensor]:
    shape = size.sequences * size.tokens, size.hidden
    x, target = (torch.randn(shape, generator=chance) for _ in range(2))
    return {"x": x, "target": target}


def _tokens(size: Size) -> int:
    return size.sequences * size.tokens


def _images(size: Size) -> int:
    return size.images


NETWORKS = {
    "llama": Network("tokens", _tokens, llama, causal(32000), "transformers"),
    "gpt2": Network("tokens", _tokens, gpt2, causal(50257), "transformers"),
    "gpt": Network("tokens", _tokens, GPT, causal(50257)),
    "bert": Network("tokens", _tokens, bert, masked, "transformers"),
    "vit": Network("images", _images, vit, images, "transformers"),
    "vit-b": Network("images", _images, ViT, large_images),
    "resnet": Network("images", _images, ResNet, images),
    "swiglu-mlp": Network("vectors", _tokens, MLPs, vectors),
}
