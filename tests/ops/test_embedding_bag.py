"""Bags of embeddings beyond what the op database asks of every op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

from custom_backprop import functional, nn

INDEX = [3, 1, 3, 0, 2, 3, 1, 5, 3]
OFFSETS = [0, 0, 4, 7, 9]


def integers(*given):
    return torch.tensor(given, device=DEVICE)


def tensor(*shape, dtype=torch.float64):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def both(index, weight, offsets=None, per_sample_weights=None, **options):
    """(y, the gradients, the weight afterwards) of ours and of stock."""
    found = []
    for module in (functional, F):
        w = weight.clone().requires_grad_()
        p = per_sample_weights
        leaves = [w] if p is None else [w, p.detach().clone().requires_grad_()]
        y = module.embedding_bag(
            index, w, offsets, per_sample_weights=leaves[1] if len(leaves) > 1 else None, **options
        )
        dy = torch.linspace(-1, 2, y.numel()).to(y).view(y.shape)
        grads = torch.autograd.grad(y, leaves, dy)
        found.append((y, [g.to_dense() if g.is_sparse else g for g in grads], w))
    return found


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": 3},
        {"padding_idx": -1},
        {"max_norm": 1.2, "norm_type": 1.0},
        {"include_last_offset": True},
        {"sparse": True},
        {"sparse": True, "padding_idx": 3},
    ],
    ids=str,
)
def test_the_options_are_stocks(mode, options, backend):
    """Empty bags, bags of padding alone, and an index twice in one bag among them."""
    if mode == "max" and "sparse" in options:
        return
    flat = integers(*INDEX), tensor(6, 3), integers(*OFFSETS)
    torch.testing.assert_close(*both(*flat, mode=mode, **options))
    torch.testing.assert_close(*both(flat[0].view(3, 3), flat[1], mode=mode, **options))
    torch.testing.assert_close(*both(integers(3, 3, 1), flat[1], integers(0, 2), mode=mode))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_by_frequency(mode, backend):
    """Each row's gradient is divided by how often that row was looked up. On a CPU torch 2.13
    divides by the frequency of another row (pytorch issue 190063)."""
    index, weight = integers(*INDEX), tensor(6, 3)
    options = {"mode": mode, "padding_idx": 5}
    (_, (plain,), _), _ = both(index, weight, integers(*OFFSETS), **options)
    ours, stock = both(index, weight, integers(*OFFSETS), scale_grad_by_freq=True, **options)
    expected = plain / index.bincount().clamp_min(1).unsqueeze(1)
    torch.testing.assert_close(ours[1][0], expected)
    if DEVICE == "cpu" and torch.__version__.startswith("2.13."):
        assert not torch.allclose(stock[1][0], expected), "stock is right: say so"


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"sparse": True}])
def test_per_sample_weights_are_stocks(options, backend):
    found = both(
        integers(*INDEX), tensor(6, 3), integers(*OFFSETS), tensor(9), mode="sum", **options
    )
    torch.testing.assert_close(*found)
    assert found[0][1][1].count_nonzero() == (5 if "padding_idx" in options else 9)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_entries_behind_the_last_bag_count_for_nothing(mode, backend):
    index, weight = integers(*INDEX), tensor(6, 3)
    ends = {"mode": mode, "include_last_offset": True}
    ours = both(index, weight, integers(0, 2, 5), **ends)[0]
    torch.testing.assert_close(ours, both(index[:5], weight, integers(0, 2), mode=mode)[1])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("length", [31, 32, 65, 130])
def test_runs_of_one_index(mode, length, backend):
    """Kernels sum chunks of 32 first. Of a maximum each bag counts an index once."""
    index = torch.tensor([2, *[3] * length, 4, *[3] * length, 1], device=DEVICE)
    torch.testing.assert_close(
        *both(index, tensor(6, 3), integers(0, 5, length + 9, length + 12), mode=mode)
    )


def test_a_bfloat16_gradient_is_summed_in_float32(backend):
    """In bfloat16 a sum of ones stops at 256."""
    weight = torch.ones(3, 2, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    y = functional.embedding_bag(torch.ones(1000, 1, device=DEVICE).long(), weight, mode="sum")
    (dw,) = torch.autograd.grad(y.sum(), weight)
    assert dw[:, 0].tolist() == [0, 1000, 0]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("bad", [4, -1])
def test_an_index_out_of_range(mode, bad, backend):
    """A kernel reads nothing outside the table: its bag is NaN, and it adds no gradient."""
    index, weight = integers(0, bad, 1), torch.ones(4, 2, device=DEVICE, requires_grad=True)
    offsets = integers(0, 2)
    if backend == "triton":
        y = functional.embedding_bag(index, weight, offsets, mode=mode)
        assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [True, False]
        (dw,) = torch.autograd.grad(y, weight, torch.ones_like(y))
        assert dw[1:, 0].tolist() == [1, 0, 0]
    elif DEVICE == "cpu":
        with pytest.raises((IndexError, RuntimeError)):
            functional.embedding_bag(index, weight, offsets, mode=mode)


def test_a_maximum_is_nan_where_one_is(backend):
    weight = torch.tensor([[float("nan"), 1.0], [2.0, 3.0]], device=DEVICE)
    y = functional.embedding_bag(integers(0, 1), weight, integers(0), mode="max")
    assert y.isnan().tolist() == [[True, False]]
    assert y[0, 1] == 3


def test_what_is_saved():
    """Of a sum without per-sample weights nothing of the table's size; a frozen factor's partner
    is not saved."""

    def saved(weight, p, mode="sum"):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            functional.embedding_bag(index, weight, mode=mode, per_sample_weights=p)
        return {t.data_ptr() for t in found}

    index, weight, p = integers(*INDEX).view(3, 3), tensor(6, 2), tensor(3, 3)
    assert weight.data_ptr() not in saved(weight.requires_grad_(), None, "mean")
    kept = saved(weight, p)
    assert p.data_ptr() in kept
    assert weight.data_ptr() not in kept
    assert weight.data_ptr() in saved(weight.detach(), p.requires_grad_())


def test_the_old_order_of_arguments_is_stocks():
    index, weight = integers(*INDEX).view(3, 3), tensor(6, 2)
    with pytest.warns(UserWarning, match="deprecated"):
        y = functional.embedding_bag(weight, index)
    torch.testing.assert_close(y, functional.embedding_bag(index, weight))


T, W, P = torch.tensor([0, 1]), torch.ones(3, 2), torch.ones(2)


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        ((T, W), {}, ValueError, r"\(2,\) and None"),
        ((T.view(1, 2), W, T), {}, ValueError, "offsets"),
        ((T.view(1, 1, 2), W), {}, ValueError, r"\(1, 1, 2\)"),
        ((T, W, T.view(1, 2)), {}, ValueError, r"\(1, 2\)"),
        ((T, W, T), {"mode": "min"}, ValueError, "min"),
        ((T, W, T), {"mode": "max", "sparse": True}, ValueError, "max"),
        ((T, W, T), {"mode": "max", "scale_grad_by_freq": True}, ValueError, "max"),
        ((T, W, T), {"per_sample_weights": P}, NotImplementedError, "mean"),
        ((T, W, T), {"per_sample_weights": P[:1], "mode": "sum"}, ValueError, r"\(1,\)"),
        ((T, W, T), {"per_sample_weights": P.double(), "mode": "sum"}, RuntimeError, "float64"),
        ((T.float(), W, T), {}, RuntimeError, "float32"),
        ((T, W, T[1:]), {}, RuntimeError, None),
        ((T, W, T[:0]), {"include_last_offset": True}, RuntimeError, "last offset"),
        ((T, W, torch.tensor([0, 3])), {}, RuntimeError, None),
        ((T, W, T), {"padding_idx": 3}, RuntimeError, "padding_idx"),
    ],
)
def test_bad_calls_raise_what_stock_raises(args, options, error, match):
    with pytest.raises(error, match=match):
        functional.embedding_bag(*args, **options)
    with pytest.raises(error):
        F.embedding_bag(*args, **options)


def test_a_module_takes_offsets_and_per_sample_weights(backend):
    table, p = tensor(6, 3), tensor(9)
    ours, stock = (m.EmbeddingBag.from_pretrained(table, mode="sum") for m in (nn, torch.nn))
    assert type(ours) is nn.EmbeddingBag
    args = integers(*INDEX), integers(*OFFSETS), p
    torch.testing.assert_close(ours(*args), stock(*args))
