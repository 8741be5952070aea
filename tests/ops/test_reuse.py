"""A gradient written over dy or over the saved output: when it is, and that whoever still holds
either never sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch._dynamo

import custom_backprop.functional as F
from custom_backprop import nn
from custom_backprop.ops import reuse
from custom_backprop.ops.reuse import LEAST

ROWS, COLUMNS = 129, LEAST // 128

#: name -> op(x)
OPS = {
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.1, -0.3),
    "linear and silu": lambda x: F.linear_activation(x, WEIGHT, None, "silu"),
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.7),
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
    "softmax": lambda x: F.softmax(x, 1),
    "softmax of columns": lambda x: F.softmax(x, 0),
    "softmin": lambda x: F.softmin(x, 1),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    **{
        f"linear and {f}": lambda x, f=f: F.linear_activation(x, WEIGHT, None, f)
        for f in ("relu", "relu6", "hardtanh", "sigmoid", "tanh")
    },
}
WEIGHT = torch.eye(COLUMNS)


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


@pytest.fixture
def x():
    return torch.randn(ROWS, COLUMNS, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "stride 0"])
def test_same_bits_in_the_place_of_the_output(op, dtype, layout, monkeypatch):
    x = torch.randn(ROWS, COLUMNS, dtype=dtype, requires_grad=True)
    monkeypatch.setitem(globals(), "WEIGHT", torch.eye(COLUMNS, dtype=dtype))
    made = {"contiguous": (ROWS, COLUMNS), "transposed": (COLUMNS, ROWS), "stride 0": (ROWS, 1)}[
        layout
    ]
    dy = torch.randn(made, dtype=dtype)
    dy = dy.t() if layout == "transposed" else dy.expand(ROWS, COLUMNS)
    before = dy.clone()
    y = op(x)
    (expected,) = torch.autograd.grad(y, x, dy)  # y is held here
    (dx,) = torch.autograd.grad(op(x), x, dy)
    assert torch.equal(dx, expected)
    assert dx.stride() == expected.stride()
    assert torch.equal(dy, before)


@pytest.mark.parametrize("name", ["relu", "sigmoid", "softmax", "log_softmax"])
def test_the_gradient_takes_the_place_of_an_output_nobody_holds(name, x):
    y = OPS[name](x)
    place = y.data_ptr()
    loss = y.sum()
    del y
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.data_ptr() == place


def test_a_small_output_is_left_alone():
    x = torch.randn(LEAST - 1, requires_grad=True)
    y = F.relu(x)
    place = y.data_ptr()
    loss = y.sum()
    del y
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.data_ptr() != place


#: how somebody may still hold the memory of an output: what is kept of y, and how to look at it
#: again
HOLDERS = {
    "itself": (lambda y: y, lambda y: y),
    "a view": (lambda y: y[1:], lambda v: v),
    "detached": (lambda y: y.detach(), lambda d: d),
    "numpy": (lambda y: y.detach().numpy(), torch.from_numpy),
    "a storage": (
        lambda y: y.untyped_storage(),
        lambda s: torch.empty(0).set_(s, 0, (ROWS, COLUMNS)),
    ),
    "dlpack": (lambda y: torch.from_dlpack(y.detach()), lambda d: d),
    "a saved tensor": (lambda y: y.grad_fn.saved_tensors, lambda s: s[-1]),
    "another graph": (lambda y: y**3, lambda z: z.grad_fn._saved_self),
}


#: a dy that dx may be written over, and one of stride 0, so that only the output is left
LOSSES = {
    "dy alone": lambda y: (y * torch.randn(ROWS, COLUMNS)).sum(),
    "dy of stride 0": lambda y: 3 * y.sum(),
}


@pytest.fixture(params=LOSSES)
def loss_of(request):
    return LOSSES[request.param]


@pytest.mark.parametrize("holder", HOLDERS)
def test_an_output_that_is_held_keeps_its_values(op, x, holder, loss_of):
    keep, look = HOLDERS[holder]
    y = op(x)
    kept = keep(y)
    values = look(kept).detach().clone()
    loss = loss_of(y)
    del y
    loss.backward()
    assert torch.equal(look(kept).detach(), values)


def test_a_hook_that_keeps_saved_tensors_keeps_their_values(op, x, loss_of):
    stash = []

    def pack(t):
        stash.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(op(x))
    values = [t.clone() for t in stash]
    loss.backward()
    assert all(map(torch.equal, stash, values))


def test_a_graph_that_is_kept_gives_the_same_again(op, x, loss_of):
    loss = loss_of(op(x))
    grads = [torch.autograd.grad(loss, x, retain_graph=keep)[0] for keep in (True, True, False)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_a_chain_of_layers_keeps_what_the_next_one_needs():
    """dW of the second layer reads the output of the first, whose own backward comes after."""
    w = torch.randn(COLUMNS, COLUMNS, dtype=torch.float64).div_(16).requires_grad_()
    x = torch.randn(ROWS, COLUMNS, dtype=torch.float64, requires_grad=True)

    def run(layer):
        loss = layer(layer(layer(x))).square().sum()
        return torch.autograd.grad(loss, (x, w))

    ours = run(lambda t: F.linear_activation(t, w, None, "tanh"))
    stock = run(lambda t: torch.tanh(torch.nn.functional.linear(t, w)))
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in OPS if not name.startswith("linear")])
def test_the_gradient_takes_the_place_of_a_dy_that_nobody_holds(name, x):
    w = torch.randn(ROWS, COLUMNS)
    y = OPS[name](x)
    (expected,) = torch.autograd.grad(y, x, w, retain_graph=True)
    places = []
    y.register_hook(lambda dy: places.append(dy.data_ptr()))
    (dx,) = torch.autograd.grad((y * w).sum(), x)
    assert places == [dx.data_ptr()]
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_call_costs_other_references_while_dynamo_evaluates_frames(compiled_first, x):
    """CPython then holds the arguments of a Python call twice. What was observed in one state must
    hold in the other."""
    states = [lambda f: f(), lambda f: torch._dynamo.run(f)()]
    w = torch.randn(ROWS, COLUMNS)
    reuse._alone.cache_clear()
    for state in reversed(states) if compiled_first else states:
        y = F.silu(x)
        places = []
        y.register_hook(lambda dy, places=places: places.append(dy.data_ptr()))
        loss = (y * w).sum()
        (dx,) = state(lambda loss=loss: torch.autograd.grad(loss, x))
        assert places == [dx.data_ptr()]
        stash = []
        loss = Kept.apply(F.silu(x), lambda made: made, stash).mul(w).sum()
        state(lambda loss=loss: torch.autograd.grad(loss, x))
        assert torch.equal(stash[0], 2 * w)


def test_channels_last_stays_so():
    x = torch.randn(2, 16, 32, 33).to(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(2, 16, 32, 33).to(memory_format=torch.channels_last)
    y = F.silu(x)
    (expected,) = torch.autograd.grad(y, x, w, retain_graph=True)
    (dx,) = torch.autograd.grad((y * w).sum(), x)
    assert torch.equal(dx, expected)
    assert dx.stride() == x.stride()


class Kept(torch.autograd.Function):
    """y, whose backward makes a gradient and keeps something of it."""

    @staticmethod
    def forward(ctx, y, keep, stash):
        ctx.keep, ctx.stash = keep, stash
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        made = dy * 2
        ctx.stash.append(ctx.keep(made))
        return made, None, None


@pytest.mark.parametrize("holder", ["itself", "a view", "detached", "numpy", "a storage", "dlpack"])
def test_a_dy_that_the_next_layer_keeps_keeps_its_values(op, x, holder):
    keep, look = HOLDERS[holder]
    stash, w = [], torch.randn(ROWS, COLUMNS)
    Kept.apply(op(x), keep, stash).mul(w).sum().backward()
    assert torch.equal(look(stash[0]), 2 * w if holder != "a view" else 2 * w[1:])


def test_a_dy_in_shared_memory_keeps_its_values(op, x):
    """Another process may read it, whom no count here knows of."""
    stash, w = [], torch.randn(ROWS, COLUMNS)

    def handle(made):
        return torch.multiprocessing.reductions.reduce_tensor(made.share_memory_())

    Kept.apply(op(x), handle, stash).mul(w).sum().backward()
    rebuild, args = stash[0]
    assert torch.equal(rebuild(*args), 2 * w)


def by_hook(y, w):
    seen = []
    y.register_hook(seen.append)
    (y * w).sum().backward()
    return seen[0]


def by_node(y, w):
    seen = []
    y.grad_fn.register_hook(lambda grad_inputs, grad_outputs: seen.append(grad_outputs[0].clone()))
    (y * w).sum().backward()
    return seen[0]


def by_node_before(y, w):
    seen = []
    y.grad_fn.register_prehook(lambda grad_outputs: seen.append(grad_outputs[0]))
    (y * w).sum().backward()
    return seen[0]


def retained(y, w):
    y.retain_grad()
    (y * w).sum().backward()
    return y.grad


def captured(y, w):
    return torch.autograd.grad((y * w).sum(), [y], materialize_grads=True)[0]


def captured_with_input(y, w):
    return torch.autograd.grad((y * w).sum(), [y, y.grad_fn.next_functions[0][0].variable])[0]


def given(y, w):
    dy = w.clone()
    y.backward(dy)
    return dy


@pytest.mark.parametrize(
    "way",
    [by_hook, by_node, by_node_before, retained, captured, captured_with_input, given],
    ids=lambda f: f.__name__,
)
def test_a_dy_that_somebody_sees_keeps_its_values(op, x, way):
    w = torch.randn(ROWS, COLUMNS)
    assert torch.equal(way(op(x), w), w)


def test_a_dy_of_two_branches_reaches_both(op, x):
    """The backward of a sum gives one tensor to both terms."""
    w = torch.randn(ROWS, COLUMNS)
    z = torch.randn(ROWS, COLUMNS, requires_grad=True)
    y = op(x)
    (expected,) = torch.autograd.grad(y, x, w, retain_graph=True)
    for total in (y + z, z + y):
        dx, dz = torch.autograd.grad((total * w).sum(), (x, z), retain_graph=True)
        assert torch.equal(dz, w)
        assert torch.equal(dx, expected)


def test_a_module_hook_keeps_the_gradients_it_was_given(x):
    seen = []
    module = nn.SiLU()
    module.register_full_backward_hook(
        lambda module, grad_input, grad_output: seen.append((*grad_input, *grad_output))
    )
    w = torch.randn(ROWS, COLUMNS)
    (module(x) * w).sum().backward()
    dx, dy = seen[0]
    assert torch.equal(dy, w)
    assert torch.equal(dx, x.grad)


def test_memory_of_numpy_is_not_written():
    """Its owners are counted by NumPy, where nobody looks."""
    owner = np.ones((256, 256), dtype=np.float32)
    y = F.gelu(torch.randn(256, 256, requires_grad=True))
    y.register_hook(lambda dy: torch.from_numpy(owner))
    y.sum().backward()
    assert (owner == 1).all()


def test_owners_are_not_counted_under_hooks():
    """Which keep what the counting backward saves."""
    seen = []
    reuse._alone.cache_clear()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append(t.detach()) or t, lambda t: t
    ):
        F.sigmoid(torch.randn(256, 256, requires_grad=True)).sum().backward()
    y = F.sigmoid(torch.randn(256, 256, requires_grad=True))
    kept, loss = y.detach(), y.sum()
    del y
    before = kept.clone()
    loss.backward()
    assert torch.equal(kept, before)
