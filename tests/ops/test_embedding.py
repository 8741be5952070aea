"""Embeddings beyond what the op database asks of every op."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

from custom_backprop import functional, nn, use_backend

INDICES = [[3, 1, 3, 0], [2, 3, 1, 5]]


def outcome(function, index, weight, **options):
    """y, dW and the weight afterwards."""
    leaf = weight.clone().requires_grad_()
    y = function(index, leaf, **options)
    (dw,) = torch.autograd.grad(y, leaf, torch.linspace(-1, 2, y.numel()).to(y).view(y.shape))
    return y.detach(), dw.to_dense() if dw.is_sparse else dw, leaf.detach()


def both(index, weight, **options):
    return [outcome(m.embedding, index, weight, **options) for m in (functional, F)]


@pytest.mark.parametrize(
    "options",
    [
        {"padding_idx": 3},
        {"padding_idx": -1},
        {"padding_idx": 0, "scale_grad_by_freq": True},
        {"max_norm": 1.2},
        {"max_norm": 1.2, "norm_type": 1.0, "padding_idx": 1},
        {"sparse": True},
        {"sparse": True, "padding_idx": 3},
    ],
    ids=str,
)
def test_the_options_are_stocks(options, backend):
    """torch's rules for padding and frequencies are no derivatives, and so no samples of gradcheck.
    With ``max_norm`` the weight itself is changed."""
    index = torch.tensor(INDICES, device=DEVICE)
    weight = torch.randn(6, 3, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(*both(index, weight, **options))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 65, 130])
@pytest.mark.parametrize("before", [0, 5, 32])
def test_runs_of_one_index(length, before):
    """Kernels sum chunks of 32 first; the sums of integers are exact."""
    index = torch.tensor([2] * before + [3] * length + [5] * 40, device=DEVICE)
    index = index[torch.randperm(len(index), device=DEVICE)]
    weight = torch.randn(7, 3, device=DEVICE, requires_grad=True)
    dy = torch.randint(-8, 9, (len(index), 3), device=DEVICE).float()
    for padding in (None, 3):
        found = []
        for module, backend in ((functional, "triton"), (F, None)):
            with use_backend(backend):
                y = module.embedding(index, weight, padding)
                found.append(torch.autograd.grad(y, weight, dy)[0])
        assert torch.equal(*found)


@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
def test_a_bfloat16_gradient_is_summed_in_float32(scale_grad_by_freq, backend):
    """In bfloat16 a sum of ones stops at 256."""
    weight = torch.ones(3, 2, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    index = torch.tensor([1] * 1000 + [2], device=DEVICE)
    y = functional.embedding(index, weight, 2, scale_grad_by_freq=scale_grad_by_freq)
    (dw,) = torch.autograd.grad(y.sum(), weight)
    assert dw.dtype == torch.bfloat16
    assert dw[:, 0].tolist() == [0, 1 if scale_grad_by_freq else 1000, 0]


@pytest.mark.parametrize("bad", [4, -1])
def test_an_index_out_of_range(bad, backend):
    """A kernel reads nothing outside the table: NaN, and no gradient."""
    index, weight = torch.tensor([0, bad, 1], device=DEVICE), torch.ones(4, 2, device=DEVICE)
    weight.requires_grad_()
    if backend == "triton":
        y = functional.embedding(index, weight)
        assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [False, True, False]
        (dw,) = torch.autograd.grad(y, weight, torch.ones_like(y))
        assert dw[:, 0].tolist() == [1, 1, 0, 0]
    elif DEVICE == "cpu":
        for module in (functional, F):
            with pytest.raises(IndexError):
                module.embedding(index, weight)


def test_max_norm_is_seen_by_the_version_counter(backend):
    """What saved the weight before it was changed in place must say so."""
    weight = torch.full((3, 2), 2.0, device=DEVICE, requires_grad=True)
    y = weight.square()
    functional.embedding(torch.tensor([1], device=DEVICE), weight, max_norm=1.0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


class TestSparse:
    def gradient(self, module, padding_idx=None, dy=None):
        weight = torch.ones(6, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
        y = module.embedding(torch.tensor(INDICES, device=DEVICE), weight, padding_idx, sparse=True)
        dy = torch.ones_like(y) if dy is None else dy
        return torch.autograd.grad(y, weight, dy, create_graph=dy.requires_grad)[0]

    def test_the_entries_are_stocks(self, backend):
        """None of the padding, or SparseAdam would move it."""
        for padding_idx in (None, 3):
            ours, stock = (self.gradient(m, padding_idx) for m in (functional, F))
            assert ours.layout == torch.sparse_coo
            assert torch.equal(ours._indices(), stock._indices())
            assert torch.equal(ours._values(), stock._values())

    def test_it_is_differentiated(self, backend):
        dy = torch.randn(2, 4, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
        first = self.gradient(functional, 3, dy)
        w = torch.randn(6, 2, dtype=torch.float64, device=DEVICE)
        (second,) = torch.autograd.grad((first.to_dense() * w).sum(), dy)
        expected = w[torch.tensor(INDICES, device=DEVICE)]
        expected[torch.tensor(INDICES, device=DEVICE) == 3] = 0
        torch.testing.assert_close(second, expected)

    def test_a_step_of_sparse_adam(self, backend):
        torch.manual_seed(1)
        ours = nn.Embedding(6, 3, sparse=True).to(DEVICE)
        stock = torch.nn.Embedding(6, 3, sparse=True).to(DEVICE)
        stock.load_state_dict(ours.state_dict())
        for module in (ours, stock):
            module(torch.tensor(INDICES, device=DEVICE)).square().sum().backward()
            torch.optim.SparseAdam(module.parameters()).step()
        torch.testing.assert_close(ours.weight, stock.weight)


def test_only_the_indices_are_saved():
    saved = []
    index = torch.tensor(INDICES, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functional.embedding(index, torch.randn(6, 2, device=DEVICE, requires_grad=True))
    assert [t.data_ptr() for t in saved] == [index.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_tables_of_other_dtypes_are_stocks(dtype, backend):
    index, weight = torch.tensor(INDICES, device=DEVICE), torch.ones(6, 2, device=DEVICE).to(dtype)
    assert torch.equal(functional.embedding(index, weight), F.embedding(index, weight))


def test_offsets_past_two_to_the_31():
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    far = far.as_strided((2, 4), (2**31 + 8, 1)).copy_(torch.randn(2, 4))
    with use_backend("triton"):
        assert torch.equal(
            functional.embedding(torch.tensor([1, 0], device=DEVICE), far), far[[1, 0]]
        )


T, W = torch.tensor([0, 1]), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        ((T.float(), W), {}, RuntimeError, "float32"),
        ((T, W[0]), {}, RuntimeError, r"2-D.*\(2,\)"),
        ((T, W), {"padding_idx": 3}, AssertionError, r"\(3, 2\)"),
        ((T, W), {"padding_idx": -4}, AssertionError, "padding_idx"),
        (([0], W), {}, TypeError, "list"),
    ],
)
def test_bad_calls_raise_what_stock_raises(args, options, error, match):
    with pytest.raises(error, match=match):
        functional.embedding(*args, **options)
    with pytest.raises(error):
        F.embedding(*args, **options)


def test_two_devices_are_named():
    with pytest.raises(RuntimeError, match="one device, got meta and cpu"):
        functional.embedding(T.to("meta"), W)


def test_a_sparse_gradient_by_frequency_is_refused_at_the_call():
    """Stock's backward refuses it."""
    with pytest.raises(RuntimeError, match="scale_grad_by_freq"):
        functional.embedding(T, W, sparse=True, scale_grad_by_freq=True)


def test_modules_made_from_a_table(backend):
    table = torch.randn(6, 3, device=DEVICE)
    module = nn.Embedding.from_pretrained(table, freeze=False, padding_idx=3)
    assert type(module) is nn.Embedding
    stock = copy.deepcopy(module)
    stock.__class__ = torch.nn.Embedding
    for m in (module, stock):
        m(torch.tensor(INDICES, device=DEVICE)).square().sum().backward()
    torch.testing.assert_close(module.weight.grad, stock.weight.grad)
