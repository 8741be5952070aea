"""Each kernel family one below, at and one above its blocks, on two axes at once, against torch in
float64; offsets that 32 bits do not hold; results that are no views."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

from custom_backprop import functional, optim, use_backend
from custom_backprop.backends import why_not
from custom_backprop.backends.kernels import kernels

if why_not("triton", DEVICE) is not None:
    pytest.skip("kernels do not run here", allow_module_level=True)

launch, rows, linear, matmul = map(kernels, ("launch", "rows", "linear", "matmul"))
DOUBLE = torch.float64
NONE, MEAN = kernels("loss").NONE, kernels("loss").MEAN


def tensor(*shape, dtype=DOUBLE):
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def same(ours, theirs, tolerance=1e-11):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def around(block):
    return block - 1, block, block + 1


#: how far a result may be from float64's of the same inputs; in half precision a gradient has been
#: rounded twice
TOLERANCE = {DOUBLE: 1e-11, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HALF = (torch.float16, torch.bfloat16)


def pairs(sizes, others, dtype):
    """Each with each; in half precision, whose kernels are those of float32, one with one."""
    return [*(product(sizes, others) if dtype == DOUBLE else zip(sizes, others, strict=True))]


#: (rows, columns) around 32 x 32 and the inner size around 16, and more tiles than a group has
TILES = [
    *product(around(32), around(32), around(16)),
    (2 * 32 + 1, 2 * 32 + 1, 33),
    (9 * 32, 33, 3),
]


@pytest.mark.parametrize(("m", "n", "k"), TILES)
def test_products(m, n, k):
    config = matmul.matmul_config(m, n, DOUBLE)
    assert config[:3] == (32, 32, 16), "sizes of this test"
    x, y, bias = tensor(k, m).t(), tensor(k, n), tensor(n)
    out, z = matmul.product(x, y, bias, "tanh", (), True)
    same(z, x @ y + bias)
    same(out, torch.tanh(z))


#: around 16 rows by 64 columns, and around the rows from which several programs share a column
COLUMNS = [
    *product(around(16), around(64)),
    *product(around(linear.ALONE), (3, 65)),
    (1000, 4), (1000, 300), (1, 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("m", "n", "dtype"),
    [
        *((*shape, DOUBLE) for shape in COLUMNS),
        *((*shape, d) for d in HALF for shape in pairs(around(16), around(128), d)),
    ],
)
def test_columns(m, n, dtype):
    """Each row counts once, whatever range of rows it falls in: rows of the next range, which the
    last block of this one reaches, are not its own."""
    dy, y = tensor(m, n, dtype=dtype), torch.tanh(tensor(m, n, dtype=dtype))
    expected = dy.double() * (1 - y.double() ** 2)
    for activation, dz in (("tanh", expected), (None, dy.double())):
        ours = [
            t.double() for t in linear.columns(dy, y if activation else None, activation, (), True)
        ]
        same(ours, [dz, dz.sum(0)], TOLERANCE[dtype])


@pytest.mark.parametrize(("parts", "n"), [*product(around(128), around(32)), (5, 1), (1, 70)])
@pytest.mark.parametrize("sums", [1, 2])
def test_the_second_stage_of_column_sums(parts, n, sums):
    partial, outs = tensor(sums, parts, n), [tensor(n), tensor(n)]
    rows.column_sum(partial, outs[0], outs[1] if sums == 2 else None)
    same(torch.stack(outs[:sums]), partial.sum(1))


@pytest.mark.parametrize("parts", [1, 2, *around(64), *around(8192), 20000])
def test_the_second_stage_of_a_sum(parts):
    partial, weight, out, total = tensor(parts), tensor(parts).abs(), tensor(), tensor()
    rows.total(partial, out)
    same(out, partial.sum())
    rows.total(partial, out, 7)
    same(out, partial.sum() / 7)
    rows.total(partial, out, None, weight, total)
    same((out, total), (partial.sum() / weight.sum(), weight.sum()))


@pytest.mark.parametrize(("dtype", "block"), [(DOUBLE, 512), (torch.float32, 1024)])
def test_activations(dtype, block):
    module = kernels("activation")
    for n in (1, *around(block), *around(2 * block)):
        x, dy = tensor(n, dtype=dtype), tensor(n, dtype=dtype)
        y = module.forward("tanh", x)
        tolerance = 1e-11 if dtype == DOUBLE else 1e-6
        same(y, torch.tanh(x), tolerance)
        same(module.backward("tanh", dy, y), dy * (1 - y * y), tolerance)
        module.forward_("tanh", x)
        same(x, y, 0)


@pytest.mark.parametrize("n", [1, *around(512), *around(1024), 4 * 4 * 1024 * 4 + 1])
@pytest.mark.parametrize("reduction", [NONE, MEAN])
def test_losses(n, reduction):
    """Up to more blocks than programs, which then have several."""
    loss, x, t = kernels("loss"), tensor(n), tensor(n)
    expected = F.mse_loss(x, t, reduction="none" if reduction == NONE else "mean")
    y, dx = loss.forward("mse_loss", x, t, None, None, reduction, reduction == MEAN)
    same(y, expected)
    dy = tensor(n) if reduction == NONE else tensor()
    scaled = dy * 2 * (x - t) / (1 if reduction == NONE else n)
    same(
        loss.backward("mse_loss", dy, x, t, None, None, reduction, [True] + 3 * [False])[0], scaled
    )
    if reduction == MEAN:
        same(kernels("scale").scale(dx, dy), scaled)


@pytest.mark.parametrize(
    "shape", [*product(around(4), around(8), around(32)), (3, 130, 1), (1, 1, 1)]
)
def test_prelu(shape):
    prelu, x, weight, dy = kernels("prelu"), tensor(*shape), tensor(shape[1]), tensor(*shape)
    leaves = x.requires_grad_(), weight.requires_grad_()
    expected = F.prelu(*leaves)
    with torch.no_grad():
        same(prelu.forward(x, weight), expected)
        ours = prelu.backward(dy, x, weight, True, True)
    same(ours, torch.autograd.grad(expected, leaves, dy))


@pytest.mark.parametrize(
    ("m", "d", "dtype"),
    [
        *((*shape, DOUBLE) for shape in product((1, *around(32)), around(16))),
        *((*shape, d) for d in HALF for shape in pairs(around(32), around(16), d)),
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce(m, d, dtype, symmetric):
    q, k = tensor(m, d, dtype=dtype).double().requires_grad_(), tensor(m, d, dtype=dtype).double()
    s = q @ k.t() / 0.5
    losses = [F.cross_entropy(v, torch.arange(m, device=DEVICE)) for v in (s, s.t())]
    expected = sum(losses) / 2 if symmetric else losses[0]
    with torch.no_grad():
        given = q.to(dtype), k.to(dtype), None, 0.5, symmetric, MEAN, True
        loss, G = kernels("contrastive").info_nce(*given)
    same(loss.double(), expected, TOLERANCE[dtype])
    same(G.double() @ k / m, torch.autograd.grad(expected, q)[0], TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("m", "n"), [*product(around(4), around(512)), (3, 1), (2, 2049), (1, 9000)]
)
def test_rows(m, n):
    """Rows by the tile, and in a loop, of softmax, the norm of vectors and the triplet loss."""
    x, dy = tensor(m, n).requires_grad_(), tensor(m, n)
    softmax, contrastive = kernels("softmax"), kernels("contrastive")
    normalize = kernels("normalize")
    for y, forward, backward in (
        (
            torch.softmax(x, 1),
            lambda: softmax.forward("softmax", x, 1, None),
            lambda y: softmax.backward("softmax", dy, y, 1, DOUBLE),
        ),
        (
            F.normalize(x),
            lambda: normalize.forward(x, 1e-12)[0],
            lambda _: normalize.backward(dy, x, normalize.forward(x, 1e-12)[1], 1e-12),
        ),
    ):
        (dx,) = torch.autograd.grad(y, x, dy)
        with torch.no_grad():
            same(forward(), y)
            same(backward(y), dx)
    p, other = tensor(m, n), tensor(m, n)
    expected = F.triplet_margin_loss(x, p, other, margin=3.0, swap=True, reduction="none")
    given = 3.0, 2.0, 1e-6, True, NONE
    with torch.no_grad():
        loss, d = contrastive.triplet_forward(x, p, other, *given)
        same(loss, expected)
        dy = tensor(m)
        ours = contrastive.triplet_backward(dy, x, p, other, d, *given, (True, False, False))[0]
    same(ours, torch.autograd.grad(expected, x, dy)[0])


def agree(function, dtype, *shapes):
    """A value and its gradients under a random dy: by our kernels, and by torch in float64."""
    inputs, dy, found = [tensor(*shape).to(dtype) for shape in shapes], None, []
    for face, cast in ((functional, dtype), (F, DOUBLE)):
        leaves = [x.to(cast, copy=True).requires_grad_() for x in inputs]
        with use_backend("triton"):
            y = function(face, *leaves)
            dy = tensor(*y.shape).to(dtype) if dy is None else dy
            grads = torch.autograd.grad(y, leaves, dy.to(cast), materialize_grads=True)
        found.append([t.double() for t in (y, *grads)])
    same(*found, TOLERANCE[dtype])


def classes(x):
    """Every class of x (N, C, ...) in its turn, the last one first."""
    shape = x.shape[:1] + x.shape[2:]
    return (~torch.arange(shape.numel(), device=DEVICE) % x.shape[1]).view(shape)


def weights(x):
    return torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype, device=DEVICE)


def forget_plans(monkeypatch, *families):
    """Launches are planned anew while a test runs, with the sizes that it has set."""
    for module in map(kernels, families):
        for name, function in list(vars(module).items()):
            if name.startswith("plan") and hasattr(function, "__wrapped__"):
                monkeypatch.setattr(module, name, function.__wrapped__)


#: of one or two tensors of rows, by torch.nn.functional or by ours
OF_ROWS = {
    "softmax": lambda F, x, t: F.softmax(x, 1),
    "nll_loss": lambda F, x, t: F.nll_loss(x, classes(x), reduction="none"),
    "mean nll_loss": lambda F, x, t: F.nll_loss(x, classes(x), weights(x), ignore_index=1),
    "cross_entropy": lambda F, x, t: F.cross_entropy(
        x, classes(x), reduction="none", label_smoothing=0.1
    ),
    "mean cross_entropy": lambda F, x, t: F.cross_entropy(
        x, classes(x), weights(x), ignore_index=1
    ),
    "of probabilities": lambda F, x, t: F.cross_entropy(x, t, weights(x)),
    "normalize": lambda F, x, t: F.normalize(x, dim=-1),
    "triplet": lambda F, x, t: F.triplet_margin_loss(x, t, t.flip(0), 3.0, swap=True),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tile", [(4, 8), (1, 8)])
@pytest.mark.parametrize("name", OF_ROWS)
def test_small_tiles(name, tile, dtype, monkeypatch):
    """Around the rows and columns of a tile, side by side too; and of tiles of one long row, around
    the four programs that walk them."""
    monkeypatch.setattr(rows, "row_config", lambda *_: rows.RowConfig(*tile, 1))
    monkeypatch.setattr(rows, "RESIDENT", 1)
    monkeypatch.setattr(kernels("nll"), "PICKED", 8)
    monkeypatch.setattr(kernels("cross_entropy"), "FEW", 8)
    forget_plans(monkeypatch, "softmax", "nll", "cross_entropy", "normalize", "contrastive")
    few = [(5, 9)] if tile[0] == 1 else [*pairs(around(4), around(8), dtype), (2, 17, 5)]
    more = [(3, 9), (4, 9)] if tile[0] == 1 else [(1, 7, 3), (1, 8, 4)]
    for shape in few + more if dtype == DOUBLE else few:
        agree(OF_ROWS[name], dtype, shape, shape)


#: of rows and of some vectors along them
NORMS = {
    "layer_norm": (lambda F, x, w, b: F.layer_norm(x, w.shape, w, b), 2),
    "bare layer_norm": (lambda F, x: F.layer_norm(x, x.shape[1:]), 0),
    "rms_norm": (lambda F, x, w: F.rms_norm(x, w.shape, w, 1e-5), 1),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", NORMS)
def test_norms(name, dtype):
    """Around powers of two, whatever the blocks are; of many rows; of rows longer than a block."""
    shapes = [*pairs((1, 2, 5), around(4), dtype), *zip((1, 2, 5), around(64), strict=True)]
    shapes += [(1, 1), (300, 5)] + [(1, 1025), (17, 2049)] * (dtype == DOUBLE)
    function, vectors = NORMS[name]
    for m, n in shapes:
        agree(function, dtype, (m, n), *vectors * [(n,)])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gates(dtype, monkeypatch):
    """Around the rows and columns of a tile, of one long row too, and of rows in several tiles."""
    monkeypatch.setattr(kernels("pointwise"), "BLOCK", 8 * dtype.itemsize)  # blocks of 32
    forget_plans(monkeypatch, "gating")
    for m, n in [*pairs(around(4), around(8), dtype), (1, 1), (3, 33)]:
        agree(lambda F, x: F.glu(x), dtype, (m, 2 * n))
        agree(lambda F, x: F.glu(x, 0), dtype, (2 * m, n))


#: what no other test here calls in half precision, and shapes around its blocks there
IN_HALF = {
    "silu": (lambda F, x: F.silu(x), [[(n,)] for n in (*around(2048), 4097)]),
    "mse_loss": (
        lambda F, x, t: F.mse_loss(x, t, reduction="none"),
        [2 * [(n,)] for n in (*around(2048), 4097)],
    ),
    "mean mse_loss": (lambda F, x, t: F.mse_loss(x, t), [2 * [(2049,)]]),
    "prelu": (
        lambda F, x, w: F.prelu(x, w),
        [[shape, shape[1:2]] for shape in zip(around(4), around(8), around(32), strict=True)],
    ),
    "linear": (
        lambda F, x, w, b: F.linear(x, w, b),
        [
            [(m, k), (n, k), (n,)]
            for m, n, k in (
                *zip(around(32), around(32), around(64), strict=True),
                (129, 130, 65), (300, 3, 1),
            )
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", IN_HALF)
def test_in_half_precision(name, dtype):
    function, samples = IN_HALF[name]
    for shapes in samples:
        agree(function, dtype, *shapes)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("in_place", [False, True])
def test_scale(in_place, dtype, monkeypatch):
    """Around a block, and around as many blocks as there are programs, which then have two."""
    scale = kernels("scale")
    monkeypatch.setattr(scale, "PROGRAMS", 1)
    forget_plans(monkeypatch, "scale")
    for n in (1, *around(1024), *around(4 * 1024)):
        for dy in (1.0, 2.5):
            grad = tensor(n).to(dtype)
            expected, dy = grad.double() * dy, grad.new_tensor(dy)
            ours = scale.scale_(grad, dy) if in_place else scale.scale(grad, dy)
            same((grad if in_place else ours).double(), expected, TOLERANCE[dtype])


OPTIMIZERS = {
    "SGD": {"momentum": 0.9}, "Adagrad": {}, "RMSprop": {"centered": True, "momentum": 0.5},
    "Adam": {"amsgrad": True}, "AdamW": {}, "Lion": {},
}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, dtype, monkeypatch):
    """Tensors around a block, and around the blocks of a program, with one number between two of
    them that nobody writes."""
    monkeypatch.setattr(kernels("optim"), "BLOCK", 8)
    monkeypatch.setattr(kernels("optim"), "ROUNDS", 2)
    sizes = (1, *around(8), *around(16), 33)
    home = tensor(sum(sizes) + len(sizes)).to(dtype)
    parts = home.split([n for size in sizes for n in (size, 1)])
    ours, gaps = [p.requires_grad_() for p in parts[::2]], torch.cat(parts[1::2])
    theirs = [p.detach().to(DOUBLE, copy=True).requires_grad_() for p in ours]
    options, cls = {"lr": 0.1, "weight_decay": 0.1, **OPTIMIZERS[name]}, getattr(optim, name)
    steppers = [(ours, cls(ours, **options)), (theirs, cls._torch(theirs, **options))]
    for _ in range(2):
        grads = [tensor(n).to(dtype) for n in sizes]
        for params, optimizer in steppers:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(p.dtype)
            with use_backend("triton"):
                optimizer.step()
    same([p.double() for p in ours], theirs, TOLERANCE[dtype])
    same(torch.cat(parts[1::2]), gaps, 0)


def far_apart(width):
    """Three rows of float16 whose stride 32 bits hold, but not twice of it. What lies between takes
    no memory, as nobody touches it."""
    stride = 2**30 + 3
    buffer = torch.empty(2 * stride + width, dtype=torch.float16, device=DEVICE)
    x = buffer.as_strided((3, width), (stride, 1))
    return x.copy_(torch.randn(3, width))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's memory is not given page by page")
def test_offsets_beyond_32_bits():
    x = far_apart(37)
    near = x.contiguous()
    for dim in range(2):
        same(
            kernels("softmax").forward("softmax", x, dim, None),
            torch.softmax(near.float(), dim).half(),
            1e-3,
        )
    unit = kernels("normalize").forward
    same(unit(x, 1e-12)[0], unit(near, 1e-12)[0], 0)
    y = torch.randn(37, 5).half()
    same(matmul.product(x, y)[0], matmul.product(near, y)[0], 0)
    dy = torch.randn(5, 3).half()
    same(matmul.product(dy, x)[0], matmul.product(dy, near)[0], 0)
    anchors = [v.expand(3, 37) for v in torch.randn(2, 37).half()]
    given = 1.0, 2.0, 1e-6, False, NONE
    triplet = kernels("contrastive").triplet_forward
    same(triplet(x, *anchors, *given)[0], triplet(near, *anchors, *given)[0], 0)


def test_results_are_no_views():
    """Users write ``loss /= 4`` and ``linear(x).relu_()``."""
    x, weight, bias, saved = tensor(2, 3, 5), tensor(4, 5), tensor(4), tensor(2, 3, 4)
    contrastive, softmax = kernels("contrastive"), kernels("softmax")
    normalize = kernels("normalize")
    found = []
    for ours in (False, True):
        found += (
            linear.forward(x, weight, bias, ours=ours),
            linear.forward(x, weight, None, ours=ours),
        )
        for name in ("tanh", "gelu"):
            found += linear.activation_forward(x, weight, bias, name, (), ours=ours)
        needs = True, True, True
        found += linear.backward(saved, x, weight, *needs, ours=ours)
        found += linear.activation_backward(saved, x, weight, saved, "tanh", (), *needs, ours=ours)
    for dim in range(3):
        y = softmax.forward("softmax", x, dim, None)
        found += y, softmax.backward("softmax", x, y, dim, DOUBLE)
    for reduction in (NONE, MEAN):
        found += kernels("loss").forward("mse_loss", x, x, None, None, reduction, True)
        found += contrastive.triplet_forward(x, x, x, 1.0, 2.0, 1e-6, True, reduction)
        for symmetric in (False, True):
            given = x[0], x[1], None, 1.0, symmetric, reduction, True
            found += contrastive.info_nce(*given)
    found += normalize.forward(x, 1e-12)
    found += (
        kernels("prelu").forward(x, tensor(3)),
        *kernels("prelu").backward(x, x, tensor(3), True, True),
    )
    assert not any(t._is_view() for t in found if t is not None)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_decay_an_infinite_parameter_stays_infinite(name):
    """0 · ∞ is NaN."""
    p = torch.tensor([float("inf"), 1.0], dtype=DOUBLE, device=DEVICE, requires_grad=True)
    p.grad = torch.ones_like(p)
    with use_backend("triton"):
        getattr(optim, name)([p], lr=0.1, weight_decay=0.0).step()
    assert p[0] == float("inf")
    assert p[1] < 1
