"""Rotary embedding beyond what the op database asks of every op."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE

from custom_backprop import functional, nn, use_backend
from custom_backprop.backends import why_not

F = functional.rotary_embedding


def tensor(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def tables(positions, half, dtype=torch.float64):
    angle = tensor(positions, half)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [4, 3])
def test_as_onnx_defines_it(interleaved, half, backend):
    x, (cos, sin) = tensor(2, 3, 5, 8), tables(7, half)
    positions = torch.randint(7, (2, 5), device=DEVICE)
    expected = torch.onnx.ops.rotary_embedding(
        x, cos, sin, positions, interleaved=interleaved, rotary_embedding_dim=2 * half
    )
    torch.testing.assert_close(F(x, cos, sin, interleaved, positions=positions), expected)
    moved = F(x, cos, sin, interleaved, 2, (positions - 2).int())
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_product_depends_on_the_distance_alone(interleaved, backend):
    rope = nn.RotaryEmbedding(6, 20, interleaved=interleaved).to(DEVICE, torch.float64)
    q, k = tensor(1, 6), tensor(1, 6)
    products = [rope(q, 3 + s) @ rope(k, 9 + s).T for s in (0, 4, 10)]
    torch.testing.assert_close(products[1:], products[:1] * 2)
    assert not torch.allclose(rope(q, 3) @ rope(k, 8).T, products[0])


def test_one_token_at_a_time_is_the_whole_sequence(backend):
    rope = nn.RotaryEmbedding(4, 9).to(DEVICE, torch.float64)
    x = tensor(2, 3, 7, 4)
    steps = [rope(x[:, :, i : i + 1], i) for i in range(7)]
    torch.testing.assert_close(torch.cat(steps, 2), rope(x), rtol=0, atol=0)


@pytest.mark.parametrize("backend", [b for b in ("aten", "triton") if not why_not(b, DEVICE)])
def test_transposed_heads_are_not_copied(backend):
    """(batch, seq, heads, dim), as a projection makes it: the result and dx lie in memory as it
    does, so that a projection's backward need not copy dx."""
    x = tensor(2, 5, 3, 4).transpose(1, 2).requires_grad_()
    with use_backend(backend):
        y = F(x, *tables(5, 2))
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert y.stride() == x.stride()
    assert dx.stride() == x.stride()


def test_no_input_is_saved():
    saved = []
    x, cos_sin = tensor(3, 4).requires_grad_(), tables(3, 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F(x, *cos_sin)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in cos_sin]


@pytest.mark.parametrize("positions", [[0, 4, 2], [0, -1, 2]])
def test_positions_out_of_range(positions, backend):
    """A kernel reads nothing outside the tables, and the row is NaN."""
    x, (cos, sin) = tensor(3, 4), tables(4, 2)
    positions = torch.tensor(positions, device=DEVICE)
    if backend == "triton":
        bad = F(x, cos, sin, positions=positions).isnan()
        assert bad.all(1).tolist() == bad.any(1).tolist() == [False, True, False]
    elif DEVICE == "cpu":
        with pytest.raises(IndexError):
            F(x, cos, sin, positions=positions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_tables_are_rounded_once(dtype, backend):
    """Tables rounded to half precision would be off by 2**-9 already."""
    x, (cos, sin) = tensor(2, 5, 6).to(dtype), tables(5, 3, torch.float32)
    expected = F(x.double(), cos.double(), sin.double())
    y = F(x, cos, sin)
    assert y.dtype == dtype
    limit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(y.double(), expected, rtol=limit, atol=1e-6)


def test_offsets_past_two_to_the_31():
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    far = far.as_strided((2, 1, 4), (2**31 + 8, 4, 1)).copy_(torch.randn(2, 1, 4))
    table = tables(1, 2, torch.float32)
    with use_backend("triton"):
        assert torch.equal(F(far, *table), F(far.clone(), *table))


X, TABLE = torch.ones(2, 3, 4), torch.ones(5, 2)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: F(X, TABLE, 1.0), TypeError, "Tensors"),
        (lambda: F(X, TABLE, TABLE, offset=1.0), TypeError, "offset"),
        (lambda: F(X, TABLE, TABLE, offset=3), IndexError, "3 to 5"),
        (lambda: F(X, TABLE, TABLE, offset=-1), IndexError, "-1 to 1"),
        (lambda: F(X.long(), TABLE, TABLE), NotImplementedError, "int64"),
        (lambda: F(X[0, 0], TABLE, TABLE), RuntimeError, r"shape \(4,\)"),
        (lambda: F(X, torch.ones(5, 3), torch.ones(5, 3)), RuntimeError, r"\(5, 3\)"),
        (lambda: F(X, TABLE, TABLE[:4]), RuntimeError, r"\(4, 2\)"),
        (lambda: F(X, TABLE.double(), TABLE.double()), RuntimeError, "float64"),
        (lambda: F(X, TABLE.half(), TABLE.half()), RuntimeError, "float16"),
        (lambda: F(X, TABLE, TABLE.requires_grad_(True)), RuntimeError, "cos and sin"),
        (lambda: F(X, TABLE, TABLE, positions=torch.ones(3)), RuntimeError, "int32 or int64"),
        (lambda: F(X, TABLE, TABLE, positions=torch.arange(2)), RuntimeError, r"\(2,\)"),
        (lambda: F(X, TABLE, TABLE, positions=torch.ones(3, 3).long()), RuntimeError, r"\(3, 3\)"),
    ],
)
def test_bad_calls(call, error, match):
    TABLE.requires_grad_(False)
    with pytest.raises(error, match=match):
        call()
    TABLE.requires_grad_(False)


def test_a_tangent_of_the_tables_is_refused():
    with pytest.raises(RuntimeError, match="cos and sin"):
        torch.func.jvp(lambda t: F(X, t, TABLE), (TABLE,), (TABLE,))


class TestModule:
    def test_tables_are_exact_far_out(self):
        """Angles in float32 would be off by 2e-3 at this position."""
        rope = nn.RotaryEmbedding(4, 40_000, base=500_000.0)
        angle = torch.tensor([39_999.0, 39_999 / 500_000**0.5], dtype=torch.float64)
        torch.testing.assert_close(rope.cos[-1].double(), angle.cos(), rtol=0, atol=6e-8)
        torch.testing.assert_close(rope.sin[-1].double(), angle.sin(), rtol=0, atol=6e-8)

    def test_tables_survive_a_cast_and_the_meta_device(self):
        exact = nn.RotaryEmbedding(4, 300)
        for cast in (exact.bfloat16, exact.double, exact.half):
            table = cast().cos
            assert table.dtype == (torch.float64 if cast.__name__ == "double" else torch.float32)
            torch.testing.assert_close(table.float(), nn.RotaryEmbedding(4, 300).cos)
        with torch.device("meta"):
            empty = torch.nn.Sequential(nn.RotaryEmbedding(4, 300))
        assert empty[0].cos.is_meta
        torch.testing.assert_close(
            empty.to_empty(device="cpu")[0].cos, nn.RotaryEmbedding(4, 300).cos
        )

    def test_it_has_no_state(self):
        assert not nn.RotaryEmbedding(4, 3).state_dict()
        assert "4, max_positions=3" in repr(nn.RotaryEmbedding(4, 3))

    @pytest.mark.parametrize("arguments", [(3, 5), (0, 5), (4, 0), (4, 5, -1.0)])
    def test_bad_sizes(self, arguments):
        with pytest.raises(ValueError, match="RotaryEmbedding"):
            nn.RotaryEmbedding(*arguments)
