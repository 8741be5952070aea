"""Multi-head attention and the transformer's layers are stock's: every option, with equal
weights."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from helpers import DEVICE
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint

import custom_backprop
from custom_backprop import nn

stock = torch.nn
BATCH, L, S, E, HEADS = 2, 3, 4, 8, 2
SEPARATE = {"kdim": 5, "vdim": 3}


def tensor(*shape):
    return torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)


def twins(name, *args, **options):
    """Ours and stock's, with the same weights."""
    made = [getattr(m, name)(*args, **options).to(DEVICE, torch.float64) for m in (nn, stock)]
    with torch.no_grad():
        for p in made[1].parameters():
            p.normal_(std=0.5)
    made[0].load_state_dict(made[1].state_dict())
    return made


def outcome(module, *args, **options):
    """The results, and the gradients of the arguments and the parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stock's, of masks of two dtypes
        results = module(*args, **options)
    results = (
        [results] if isinstance(results, torch.Tensor) else [r for r in results if r is not None]
    )
    torch.manual_seed(5)
    loss = sum((r * torch.randn(r.shape, dtype=r.dtype).to(r.device)).sum() for r in results)
    given = [*args, *options.values(), *module.parameters()]
    wanted = list({id(t): t for t in given if torch.is_tensor(t) and t.requires_grad}.values())
    return [*results, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def assert_the_same(ours, theirs, *args, **options):
    torch.testing.assert_close(outcome(ours, *args, **options), outcome(theirs, *args, **options))


def calls(heads, keys):
    """Every keyword of a call."""
    padding = torch.zeros(BATCH, keys, dtype=torch.bool, device=DEVICE)
    padding[:, -1] = True
    causal = torch.ones(L, keys, dtype=torch.bool, device=DEVICE).triu(1)
    by_head = torch.rand(BATCH * heads, L, keys, device=DEVICE) < 0.3
    by_head[..., 0] = False
    yield {}
    yield {"need_weights": False}
    yield {"attn_mask": causal, "is_causal": True, "need_weights": False}
    yield {"attn_mask": causal, "is_causal": True, "average_attn_weights": False}
    for need_weights in (True, False):
        yield {"key_padding_mask": padding, "need_weights": need_weights}
        yield {"attn_mask": by_head, "need_weights": need_weights}
        yield {
            "key_padding_mask": padding, "attn_mask": causal, "is_causal": True,
            "need_weights": need_weights,
        }  # fmt: skip
        yield {
            "key_padding_mask": padding, "attn_mask": tensor(L, keys), "need_weights": need_weights,
        }  # fmt: skip
        yield {
            "key_padding_mask": tensor(BATCH, keys), "attn_mask": by_head,
            "need_weights": need_weights,
        }  # fmt: skip


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "add_zero_attn": True},
        {"add_bias_kv": True},
        SEPARATE,
        {**SEPARATE, "bias": False, "add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=str,
)
def test_attention(options, batch_first):
    ours, theirs = twins("MultiheadAttention", E, HEADS, batch_first=batch_first, **options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())

    def rows(n, features):
        return tensor(BATCH, n, features) if batch_first else tensor(n, BATCH, features)

    query, key = rows(L, E), rows(S, options.get("kdim", E))
    given = [(query, key, rows(S, options.get("vdim", E)))]
    if "kdim" not in options:
        given += [(query, key, key), (query, query, query)]
    for args in given:
        for call in calls(HEADS, args[1].shape[1 if batch_first else 0]):
            assert_the_same(ours, theirs, *args, **call)


def test_attention_without_a_batch():
    padding = torch.tensor([False, True, False, False], device=DEVICE)
    for batch_first, need_weights in itertools.product((False, True), (False, True)):
        ours, theirs = twins("MultiheadAttention", E, HEADS, batch_first=batch_first)
        key = tensor(S, E)
        options = {"key_padding_mask": padding, "need_weights": need_weights}
        assert_the_same(ours, theirs, tensor(L, E), key, key, **options)


def test_rows_without_a_key():
    """0 with ``need_weights=False``, else NaN, as in stock."""
    ours, theirs = twins("MultiheadAttention", E, HEADS)
    x, mask = tensor(L, BATCH, E), torch.ones(L, L, dtype=torch.bool, device=DEVICE)
    for need_weights in (True, False):
        found = [m(x, x, x, attn_mask=mask, need_weights=need_weights)[0] for m in (ours, theirs)]
        torch.testing.assert_close(*found, equal_nan=True)


def test_dropout_of_attention_is_that_of_training():
    ours, _ = twins("MultiheadAttention", E, HEADS, dropout=0.5)
    x = tensor(L, BATCH, E)
    for need_weights in (True, False):
        ours.train()
        some, others = (ours(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(some, others)
        ours.eval()
        some, others = (ours(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert torch.equal(some, others)


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_dropout_of_a_layer_is_that_of_torchs_generator(name):
    """In training, under ``manual_seed`` and in a checkpoint."""
    layer, _ = twins(name, E, HEADS, 2 * E, dropout=0.3)
    args = [tensor(L, BATCH, E) for _ in range(1 if "Encoder" in name else 2)]
    found = []
    for call in (layer, layer, lambda *args: checkpoint(layer, *args, use_reentrant=False)):
        torch.manual_seed(3)
        y = call(*args)
        torch.rand(5, device=DEVICE)  # moves the generator on
        found.append([y, *torch.autograd.grad(y.square().sum(), args)])
    for again in found[1:]:
        assert all(map(torch.equal, again, found[0]))
    assert not torch.equal(layer(*args), found[0][0])


def test_no_tensor_of_all_pairs_is_saved():
    """Nor are the zeros of dropout; nor is a boolean mask made one of numbers."""
    n = 256
    ours = nn.MultiheadAttention(E, HEADS, dropout=0.1, batch_first=True).to(DEVICE)
    x, saved = torch.randn(1, n, E, device=DEVICE), []
    padding = torch.zeros(1, n, dtype=torch.bool, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(x, x, x, key_padding_mask=padding, need_weights=False)
    assert max(t.untyped_storage().nbytes() for t in saved) < n * n


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m(x[0, 0], x, x),
        lambda m, x: m(x, x[..., :5], x[..., :5]),
        lambda m, x: m(x, x, x, attn_mask=torch.ones(2, 2, dtype=torch.bool)),
        lambda m, x: m(x, x, x, key_padding_mask=torch.ones(2, 7, dtype=torch.bool)),
        lambda m, x: m(x, x, x, is_causal=True),
        lambda m, x: m(x, x, x, attn_mask=torch.ones(L, L, dtype=torch.int64)),
    ],
)
def test_what_does_not_fit_is_refused_by_stock(call):
    ours, theirs = nn.MultiheadAttention(E, HEADS), stock.MultiheadAttention(E, HEADS)
    with pytest.raises(Exception) as expected:  # noqa: PT011 (whatever stock raises)
        call(theirs, torch.ones(L, BATCH, E))
    with pytest.raises(type(expected.value)) as found:
        call(ours, torch.ones(L, BATCH, E))
    assert str(found.value) == str(expected.value)


def silu(x):
    return torch.nn.functional.silu(x)


LAYERS = [
    {"norm_first": True, "batch_first": True, "activation": "gelu"},
    {"bias": False, "layer_norm_eps": 1e-2, "activation": gelu},
    {"norm_first": True, "activation": silu},
    {"batch_first": True, "activation": torch.nn.GELU("tanh")},
]


@pytest.mark.parametrize("options", LAYERS, ids=["gelu", "bias", "silu", "tanh"])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_layers(name, options):
    ours, theirs = twins(name, E, HEADS, 7, 0.0, **options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, memory = tensor(BATCH, L, E), tensor(BATCH, L, E)
    size = BATCH if options.get("batch_first") else L
    n = L if options.get("batch_first") else BATCH
    causal = torch.ones(n, n, dtype=torch.bool, device=DEVICE).triu(1)
    padding = torch.zeros(size, n, dtype=torch.bool, device=DEVICE)
    padding[:, -1] = True
    if "Encoder" in name:
        args, of_mask, of_padding = (x,), {"src_mask": causal}, {"src_key_padding_mask": padding}
        hint = {"is_causal": True}
    else:
        args, of_mask = (x, memory), {"tgt_mask": causal, "memory_mask": tensor(n, n)}
        of_padding = {"tgt_key_padding_mask": padding, "memory_key_padding_mask": padding}
        hint = {"tgt_is_causal": True}
    for masks in ({}, of_mask, of_padding, {**of_mask, **hint}, {**of_mask, **of_padding}):
        assert_the_same(ours, theirs, *args, **masks)


def test_parts_of_a_layer_are_ours():
    for name in ("TransformerEncoderLayer", "TransformerDecoderLayer"):
        parts = [type(m) for m in getattr(nn, name)(E, HEADS).children()]
        assert set(parts) == {nn.MultiheadAttention, nn.Linear, nn.Dropout, nn.LayerNorm}


def test_a_whole_transformer_is_converted_and_reverted():
    model = stock.Transformer(E, HEADS, 2, 2, 7, 0.0, batch_first=True).to(DEVICE, torch.float64)
    before = [type(m) for m in model.modules()]
    x, y = tensor(BATCH, S, E), tensor(BATCH, L, E)
    padding = torch.zeros(BATCH, S, dtype=torch.bool, device=DEVICE)
    padding[0, -1] = True
    expected = outcome(model, x, y, src_key_padding_mask=padding)
    custom_backprop.convert(model)
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.decoder.layers[1].multihead_attn) is nn.MultiheadAttention
    torch.testing.assert_close(outcome(model, x, y, src_key_padding_mask=padding), expected)
    encoder = model.eval().encoder
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors, which the encoder makes of the padding
        found = encoder(x, src_key_padding_mask=padding)
        custom_backprop.revert(model)
        torch.testing.assert_close(found, encoder(x, src_key_padding_mask=padding))
    assert [type(m) for m in model.modules()] == before


def test_second_derivative_compiler_and_autocast():
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True).to(DEVICE, torch.float64)
    x = tensor(1, 2, 4)
    assert torch.autograd.gradgradcheck(layer, (x,))
    expected = outcome(layer, x)
    torch.testing.assert_close(outcome(torch.compile(layer, backend="aot_eager"), x), expected)
    layer.float()
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        y = layer(x.float())
    torch.testing.assert_close(y.double(), expected[0], rtol=0.05, atol=0.05)
