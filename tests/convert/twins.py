"""Small models of Hugging Face with random weights, and what compares the training of one with that
of its converted twin."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import custom_backprop

VOCABULARY, CLASSES = 96, 10
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2}
_SIZES |= {"hidden_size": 32, "intermediate_size": 48}
_IMAGES = {**_SIZES, "image_size": 16, "patch_size": 8, "num_labels": CLASSES}

#: the models of most tests: name -> class
MODELS = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",
    "vit": "ViTForImageClassification",
}
#: class -> options of its config, where these are not those of a text model with Llama's names
_OPTIONS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {**_TOKENS, "n_layer": 2, "n_head": 2, "n_embd": 32},
    "ViTForImageClassification": _IMAGES,
    "T5ForConditionalGeneration": {
        **_TOKENS, "num_layers": 2, "num_heads": 2, "d_model": 32, "d_kv": 16, "d_ff": 48,
        "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
    },
    "MixtralForCausalLM": {
        **_TOKENS, **_SIZES, "num_key_value_heads": 1, "num_local_experts": 2,
    },
}  # fmt: skip
_DROPOUTS = (
    "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "dropout_rate", "hidden_dropout", "embed_dropout",
)  # fmt: skip


def small(name: str, dropout: float = 0.0, **options: Any) -> Any:
    """The model of that name or class, with the same weights at each call. Twins have no dropout:
    our masks are not those that torch draws."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, MODELS.get(name, name))
    given = _OPTIONS.get(kind.__name__, {**_TOKENS, **_SIZES, "num_key_value_heads": 1})
    config = kind.config_class(**given | options)
    for rate in _DROPOUTS:
        if hasattr(config, rate):
            setattr(config, rate, dropout)
    torch.manual_seed(0)
    return kind(config).train()


def twins(name: str, **options: Any) -> tuple[Any, Any]:
    """A stock model and a converted one with equal weights."""
    stock = small(name, **options)
    return stock, custom_backprop.convert(copy.deepcopy(stock))


def batches(name: str, count: int, rows: int = 3, length: int = 11) -> list[dict[str, Tensor]]:
    """Inputs with labels. Some labels of texts are -100, and the last row is padded."""
    generator = torch.Generator().manual_seed(1)
    return [_batch(name, rows, length, generator) for _ in range(count)]


def _batch(name: str, rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    if name == "vit":
        pixels = torch.randn(rows, 3, 16, 16, generator=generator)
        return {
            "pixel_values": pixels,
            "labels": torch.randint(CLASSES, (rows,), generator=generator),
        }
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[-1, -2:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[0, :3] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients, by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def train(
    model: Any, inputs: list[dict[str, Tensor]], optimizer: torch.optim.Optimizer | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Trains on one batch a step.

    Returns:
        the loss of each step, and the gradients of the first.
    """
    optimizer = optimizer or torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 1e-2
    )
    losses, first = [], {}
    torch.manual_seed(2)  # of dropout
    for batch in inputs:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        first = first or gradients(model)
        optimizer.step()
        losses.append(loss.detach())
    return losses, first


def assert_equal_training(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Losses and first gradients, as :func:`train` returns them, to rounding. An element of a
    gradient may be wrong by that much of the largest in its tensor."""
    assert_close(found[0], expected[0], rtol=rtol, atol=0)
    assert found[1].keys() == expected[1].keys()
    assert expected[1]
    largest = max(g.abs().max() for g in expected[1].values())
    assert largest > 0
    for name, gradient in expected[1].items():
        bound = rtol * max(gradient.abs().max(), 1e-2 * largest)
        assert_close(found[1][name], gradient, rtol=0, atol=bound.item(), msg=name)
