"""Dropout: its mask, which is found again in what it returns, and who decides which mask it is."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from torch.utils.checkpoint import checkpoint

from custom_backprop import functional, nn, use_backend
from custom_backprop.backends.dropout import CHUNK
from custom_backprop.formulas import dropout as formula

SHAPES = {
    "dropout": (64, 128),
    "alpha_dropout": (64, 128),
    "feature_alpha_dropout": (32, 64, 3),
    "dropout1d": (32, 64, 3),
    "dropout2d": (32, 64, 3, 1),
    "dropout3d": (32, 64, 3, 1, 1),
}
each = pytest.mark.parametrize("name", SHAPES)
P = 0.3


def of(name, x, p=P, training=True, **options):
    return getattr(functional, name)(x, p, training, **options)


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)


def found_mask(name, x, y):
    """Which elements of y were kept."""
    scale, add, instead = formula.coefficients(P, "alpha" in name)
    kept = torch.isclose(y, x * scale + add)
    assert torch.equal(~kept, torch.isclose(y, torch.full_like(y, instead)))
    return kept


def words_of(seed, counter):
    """Philox 4x32-7 as it is published, on Python's integers."""
    c, k = list(counter), list(seed)
    for _ in range(7):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second % 2**32, first >> 32 ^ c[3] ^ k[1], first % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_words_are_philoxs():
    """The known answers of Random123 hold for the words above, and those are ours."""
    assert words_of((0, 0), (0, 0, 0, 0)) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    answer = [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]
    assert words_of((0xA4093822, 0x299F31D0), pi) == answer
    for seed in (0, 7, 2**63 - 25, -3):
        counter = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**61 + 12345])
        ours = torch.stack(formula.philox(torch.tensor(seed), counter), 1)
        key = seed % 2**32, (seed >> 32) % 2**32
        assert ours.tolist() == [
            words_of(key, (c % 2**32, c >> 32, 0, 0)) for c in counter.tolist()
        ]


@pytest.mark.parametrize("seed", [None, 12345])
@each
def test_statistics(name, seed, backend):
    """The share that is kept, mean and variance; no mask follows that of a neighbour, of the next
    row or of another call. The bounds are five standard deviations."""
    x = leaf(*SHAPES[name]).detach()
    seeds = [None if seed is None else torch.tensor(seed + i, device=DEVICE) for i in (0, 1)]
    ys = [of(name, x, seed=s) for s in seeds]
    masks = [found_mask(name, x, y) for y in ys]
    if x.dim() > 2:
        assert all(torch.equal(m, m[:, :, :1].expand_as(m)) for m in masks)
    one, two = (m.flatten(2)[..., 0] if m.dim() > 2 else m for m in masks)
    kept, other = ((m.double() - (1 - P)) / (P * (1 - P)) ** 0.5 for m in (one, two))
    bound = 5 / one.numel() ** 0.5
    assert abs(kept.mean()) < bound
    for a, b in (
        (kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]), (kept[:, 4:], kept[:, :-4]),
        (kept, other),
    ):  # fmt: skip
        assert abs((a * b).mean()) < 1.1 * bound
    assert abs(ys[0].mean() - x.mean()) < 10 * bound
    variance = 1 if "alpha" in name else 1 / (1 - P)
    assert abs(ys[0].var() - variance) < 15 * bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each
def test_every_gradient_has_the_mask_of_the_output(name, dtype, backend):
    """Also one that is differentiated, or batched, or computed by another backend; twice bit for
    bit."""
    shape = (3, *SHAPES[name][1:])
    x = (torch.rand(shape, dtype=dtype, device=DEVICE) + 0.1).requires_grad_()
    y, dy = of(name, x), torch.randn(shape, device=DEVICE, dtype=dtype)
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (again,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    assert torch.equal(dx, again)
    scale, _, instead = formula.coefficients(P, "alpha" in name)
    kept = y > instead + 0.05
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dx, (dy.double() * kept * scale).to(dtype))
    (graph,) = torch.autograd.grad(y, x, dy, retain_graph=True, create_graph=True)
    torch.testing.assert_close(graph, dx)
    stacked = torch.stack([dy, 2 * dy])
    (batch,) = torch.autograd.grad(y, x, stacked, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(batch, torch.stack([dx, 2 * dx]))
    for other in ("formula", "triton", "aten") if DEVICE == "cpu" else ("formula", "triton"):
        with use_backend(other):
            (elsewhere,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        torch.testing.assert_close(elsewhere, dx)


@pytest.mark.skipif(DEVICE != "cpu", reason="a CPU's chunks")
@pytest.mark.parametrize("name", ["dropout", "alpha_dropout"])
def test_words_that_are_drawn_in_chunks(name):
    """Are those that are drawn at once, which a gradient that is differentiated takes."""
    x = leaf(2 * CHUNK + 3)
    y = of(name, x)
    (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (at_once,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.equal(dx, at_once)
    assert torch.equal(found_mask(name, x, y), dx != 0)
    assert not torch.equal(dx[:CHUNK], dx[CHUNK : 2 * CHUNK])


@pytest.mark.parametrize("philox", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 5), (0, 4)])
def test_an_operator_has_one_result(shape, philox, backend):
    """On every backend, called by its name, with arguments that no function combines."""
    x, r = torch.randn(2, *shape, device=DEVICE)
    seed = torch.tensor(9, device=DEVICE)
    for residual, alpha, features in itertools.product((None, r), (False, True), (False, True)):
        args = x, residual, seed, P, alpha, features, philox or DEVICE != "cpu"
        y = torch.ops.custom_backprop.dropout_forward(*args)
        torch.testing.assert_close(y, formula.dropout(*args))


def test_a_second_derivative_by_dy(backend):
    x, dy = leaf(5, 7), leaf(5, 7)
    y = functional.dropout(x, P)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    v = torch.randn_like(dx)
    torch.testing.assert_close(torch.autograd.grad(dx, dy, v)[0], v * (y / x).detach())


@each
def test_only_the_seed_is_saved(name, backend):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = of(name, leaf(*SHAPES[name][:2], *SHAPES[name][2:]))
    assert y.requires_grad
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.int64, 1)]


@each
def test_no_value_is_read_on_a_gpu(name):
    """It would wait, and a CUDA graph would repeat one mask. A meta tensor has none to read, and
    counts as one of a GPU."""
    x = torch.randn(SHAPES[name], device="meta", requires_grad=True)
    y = of(name, x)
    assert torch.autograd.grad(y.sum(), x)[0].is_meta


def test_a_mask_is_that_of_torchs_generator(backend):
    x = leaf(9, 31)
    torch.manual_seed(3)
    first, second = functional.dropout(x), functional.dropout(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    with torch.random.fork_rng():
        assert torch.equal(functional.dropout(x), first)
    assert torch.equal(functional.dropout(x), first)
    assert torch.equal(functional.dropout(x), second)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_computes_the_same_mask_again(reentrant, backend):
    x = leaf(9, 31)
    met = []

    def layers(t):
        y = functional.dropout(t.sin(), P)
        met.append(y.detach() / t.detach().sin())
        return y * y

    y = checkpoint(layers, x, use_reentrant=reentrant)
    torch.rand(5, device=DEVICE)  # moves the generator on
    (dx,) = torch.autograd.grad(y.sum(), x) if not reentrant else (y.sum().backward(), x.grad)[1:]
    assert torch.equal(met[0], met[1])
    torch.testing.assert_close(dx, met[0] ** 2 * 2 * x.detach().sin() * x.detach().cos())


@pytest.mark.parametrize("gradient", [False, True])
def test_randomness_of_vmap(gradient, backend):
    x = torch.ones(4, 200, dtype=torch.float64, device=DEVICE)

    def f(t):
        return functional.dropout(t, P)

    if gradient:
        f = torch.func.grad(lambda t: functional.dropout(t, P).sum())
    same = torch.vmap(f, randomness="same")(x)
    assert (same == same[0]).all()
    different = torch.vmap(f, randomness="different")(x)
    assert all(not torch.equal(different[0], row) for row in different[1:])
    for y in (same, different):
        assert set(y.unique().tolist()) == {0, 1 / (1 - P)}
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(f)(x)
    seeds = torch.arange(4, device=DEVICE)
    given = torch.vmap(lambda t, s: functional.dropout(t, P, seed=s))(x, seeds)
    rows = [functional.dropout(t, P, seed=s) for t, s in zip(x, seeds, strict=True)]
    assert torch.equal(given, torch.stack(rows))


def test_compiled(backend):
    """Another mask at each call, which backward has too."""
    compiled = torch.compile(functional.dropout, fullgraph=True, backend="aot_eager")
    x = leaf(9, 31)
    ys = [compiled(x, P), compiled(x, P)]
    assert not torch.equal(*ys)
    for y in ys:
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, (y / x).detach())
        assert set(dx.unique().tolist()) == {0, 1 / (1 - P)}


@each
def test_nothing_to_drop(name):
    """Eval mode, p = 0 and no elements give the input itself, and draw nothing. p = 1 drops all;
    what is no number stays none, as in torch."""
    x = leaf(*SHAPES[name])
    before = torch.random.get_rng_state()
    assert of(name, x, training=False) is x
    assert of(name, x, p=0) is x
    assert of(name, x[:0]).numel() == 0
    assert torch.equal(torch.random.get_rng_state(), before)
    y = of(name, x, p=1)
    assert not y.count_nonzero()
    assert not torch.autograd.grad(y.sum(), x)[0].count_nonzero()
    odd = torch.full(SHAPES[name], float("inf"), device=DEVICE)
    for p in (P, 1):
        ours = of(name, odd, p)
        assert set(ours.flatten().nan_to_num(7.0).tolist()) <= {7.0, torch.finfo(ours.dtype).max}
        assert ours.isnan().any()
        assert getattr(F, name)(odd, p, True).isnan().any()


@each
def test_in_place(name, backend):
    x = leaf(*SHAPES[name])
    seed = torch.tensor(3, device=DEVICE)
    given = x * 1
    y = of(name, given, inplace=True, seed=seed)
    assert y is given
    out = of(name, x, seed=seed)
    assert torch.equal(y, out)
    dy = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(out, x, dy)[0])
    with pytest.raises(RuntimeError, match="leaf"):
        of(name, x, inplace=True)


def test_strides_are_those_of_the_input(backend):
    x = torch.randn(2, 3, 4, 5, device=DEVICE).to(memory_format=torch.channels_last)
    seed = torch.tensor(3, device=DEVICE)
    for name in ("dropout", "alpha_dropout", "dropout2d"):
        y = of(name, x.requires_grad_(), seed=seed)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(x))
        assert y.is_contiguous(memory_format=torch.channels_last), name
        assert dx.is_contiguous(memory_format=torch.channels_last), name
        assert torch.equal(y, of(name, x.contiguous(), seed=seed))


def test_unbatched_channels(backend):
    seed = torch.tensor(3, device=DEVICE)
    for name, shape in (("dropout1d", (6, 5)), ("dropout3d", (6, 2, 2, 2))):
        x = leaf(*shape)
        y = of(name, x, seed=seed)
        assert torch.equal(y, of(name, x[None], seed=seed)[0])
        assert 0 < (y.flatten(1) != 0).all(1).sum() < 6


def test_dropout_add(backend):
    """The dtype of the sum, and the gradients of both in theirs."""
    x, r = leaf(5, 9, dtype=torch.bfloat16), leaf(5, 9, dtype=torch.float32)
    y = functional.dropout_add(x, r, P)
    assert y.dtype == torch.float32
    kept = (y != r).detach()
    torch.testing.assert_close(y, r + kept * x.float() / (1 - P))
    dy = torch.randn_like(y)
    dx, dr = torch.autograd.grad(y, (x, r), dy)
    assert torch.equal(dr, dy)
    torch.testing.assert_close(dx, (dy * kept / (1 - P)).bfloat16())
    for given in ((x, r, P, False), (x, r, 0.0)):
        assert torch.equal(functional.dropout_add(*given), r + x)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", [*SHAPES, "dropout_add"])
def test_p_is_a_probability(name, p):
    x = leaf(*SHAPES.get(name, (2, 3)))
    given = (x, x) if name == "dropout_add" else (x,)
    with pytest.raises(ValueError, match="between 0 and 1"):
        getattr(functional, name)(*given, p)
    if name == "dropout_add" and p == p:
        with pytest.raises(ValueError, match="between 0 and 1"):
            nn.DropoutAdd(p)


def test_bad_arguments():
    x = leaf(2, 3)
    for seed in (torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor(1, device="meta")):
        with pytest.raises(RuntimeError, match=r"the seed must be one number of torch\.int64"):
            functional.dropout(x, P, seed=seed)
    for call, error in (
        (lambda f: f.dropout1d(leaf(3)), RuntimeError),
        (lambda f: f.dropout([1.0]), TypeError),
        (lambda f: f.feature_alpha_dropout(leaf(3), P, True), RuntimeError),
    ):
        for functions in (F, functional):
            with pytest.raises(error):
                call(functions)
    with pytest.raises(RuntimeError, match=r"one shape, got \(2, 3\) and \(3,\)"):
        functional.dropout_add(x, leaf(3))
    with pytest.raises(TypeError):
        functional.dropout_add(x, 1.0)


@pytest.mark.parametrize(("name", "shape"), [("dropout2d", (2, 3, 4)), ("dropout3d", (2, 3))])
def test_dimensions_that_torch_warns_of(name, shape):
    for functions in (F, functional):
        with pytest.warns(UserWarning, match=f"{name}: "):
            y = getattr(functions, name)(leaf(*shape), P)
        assert y.shape == shape


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_left_to_stock():
    x = torch.nested.nested_tensor([torch.ones(40), torch.ones(60)], device=DEVICE)
    y = functional.dropout(x, P)
    assert y.is_nested
    assert 0 < y.values().count_nonzero() < 100
    for dtype in (torch.complex64, torch.int64):
        x = torch.ones(5, dtype=dtype)
        for functions in (F, functional):
            with pytest.raises((RuntimeError, NotImplementedError), match=r"not implemented|cast"):
                functions.dropout(x, P)


@pytest.mark.parametrize("name", ["dropout", "alpha_dropout"])
def test_shapes_dtypes_and_strides_are_stocks(name, backend):
    x = torch.randn(4, 6, device=DEVICE)
    given = [x, x[0, 0], x[0], x.T, x[:, ::2], x[:1].expand(4, 6), x.half(), x[:, :0]]
    for t in given:
        for p in (0, P, 1):
            ours, stock = (getattr(f, name)(t, p, True) for f in (functional, F))
            assert (ours.shape, ours.dtype, ours.stride()) == (t.shape, t.dtype, stock.stride())
