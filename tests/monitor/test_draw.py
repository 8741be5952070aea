"""The picture of a backward pass: its data against autograd's own, and what drawing must not
change."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
import warnings
import xml.etree.ElementTree as ElementTree
from functools import partial

import pytest
import torch
from torch import nn
from torch._functorch import config
from torch.utils.checkpoint import checkpoint

import custom_backprop
from custom_backprop.cost import measure
from custom_backprop.monitor import draw
from custom_backprop.monitor.picture import flow
from custom_backprop.monitor.picture.boxes import fold
from custom_backprop.monitor.picture.flow import BINS, LOW, flow_of
from custom_backprop.monitor.picture.layout import arrange
from custom_backprop.testing import database
from custom_backprop.testing.spec import Make


def stock_mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 4))


def our_mlp():
    return nn.Sequential(
        custom_backprop.nn.LinearActivation(8, 16, activation="gelu"),
        custom_backprop.nn.RMSNorm(16),
        custom_backprop.nn.Linear(16, 4),
    )


def loss_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 8, generator=generator)
    return nn.functional.cross_entropy(model(x), torch.randint(4, (5,), generator=generator))


def node_of(picture, op, which=0):
    return [n for n in picture.nodes if n.op == op][which]


def shown(picture):
    """The op of each node."""
    return [n.op for n in picture.nodes]


@pytest.mark.parametrize("make", [stock_mlp, our_mlp])
def test_norms_are_those_of_autograd(make):
    """At each leaf, and at each module's output."""
    model, outputs = make(), {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda m, x, y, name=name: outputs.update({f"y{name}": y}))
    loss = loss_of(model)
    picture = draw(loss, model, outputs)
    places = {**dict(model.named_parameters()), **outputs}
    expected = torch.autograd.grad(loss, list(places.values()))
    for (name, _), gradient in zip(places.items(), expected, strict=True):
        (node,) = [n for n in picture.nodes if n.label == name]
        assert node.norm == pytest.approx(gradient.norm().item(), rel=1e-5), name
        assert node.flow.mean == pytest.approx(gradient.mean().item(), rel=1e-4, abs=1e-8), name
        std = gradient.std(correction=0).item()
        assert node.flow.std == pytest.approx(std, rel=1e-4), name
        assert node.shapes == (tuple(gradient.shape),)
        assert sum(node.flow.histogram) == torch.count_nonzero(gradient)
        for other in picture.nodes:  # one node sends all of it
            assert all(
                e.norm == pytest.approx(node.norm) for e in other.edges if e.to == node.index
            )


def test_statistics():
    found = flow_of([torch.tensor([3.0, 0.0, -0.5e-3]), None, torch.tensor([[4.0]])])
    assert found.norm == pytest.approx(5)
    assert found.zeros == 0.25
    assert found.mean == pytest.approx((7 - 0.5e-3) / 4)
    counted = {i: n for i, n in enumerate(found.histogram) if n}
    assert counted == {-LOW * BINS: 1, -LOW * BINS + 1: 1, (-4 - LOW) * BINS + 1: 1}
    bad = flow_of([torch.tensor([math.nan, 1.0])])
    assert math.isnan(bad.norm)
    assert bad.nonfinite == 0.5
    half = flow_of([torch.full((3,), 1e-30), torch.tensor([1e30])])
    assert half.histogram[0] == 3, "what is beyond the ends is in the last bins"
    assert half.histogram[-1] == 1
    assert flow_of([None]) is None


def test_edges_add_up_to_what_a_node_gets():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = x.exp()
    picture = draw((y * 2 + y * 3).sum())
    y = node_of(picture, "Exp")
    sent = [e.norm for n in picture.nodes for e in n.edges if e.to == y.index]
    assert sorted(sent) == pytest.approx([2 * math.sqrt(2), 3 * math.sqrt(2)])
    assert y.norm == pytest.approx(5 * math.sqrt(2))


@pytest.mark.parametrize("make", [stock_mlp, our_mlp])
def test_bytes_are_those_of_cost(make):
    model = make()
    x, target = torch.randn(5, 8), torch.randint(4, (5,))
    counted = measure(model, x, loss=nn.CrossEntropyLoss(), targets=[target])
    picture = draw(nn.CrossEntropyLoss()(model(x), target), model)
    assert picture.saved_bytes == counted.total.saved_bytes
    assert picture.saved_bytes == draw(nn.CrossEntropyLoss()(model(x), target)).saved_bytes


def test_a_storage_is_counted_once_and_shared_ones_are_named():
    x = torch.randn(100, requires_grad=True)
    y = x.sigmoid()
    picture = draw((y * y[:50].sum()).tanh().sum())
    sigmoid, product = node_of(picture, "Sigmoid"), node_of(picture, "Mul")
    assert sigmoid.bytes == 400
    (of_y,) = [s for s in product.saved if s.shape == (100,)]
    assert (of_y.bytes, of_y.shared) == (0, sigmoid.index)
    assert picture.saved_bytes == 400 + 4 + 400


def test_drawing_changes_nothing():
    """The same bits with and without it, in training with dropout, with hooks and twice."""

    def run(drawn):
        torch.manual_seed(0)
        model = nn.Sequential(our_mlp(), nn.Dropout(0.5), nn.Linear(4, 4))
        seen = []
        model[2].weight.register_hook(lambda g: seen.append(g.clone()))
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        loss = loss_of(model)
        if drawn:
            before = torch.random.get_rng_state()
            assert draw(loss, model).to_dict() == draw(loss, model).to_dict()
            assert torch.equal(torch.random.get_rng_state(), before)
            assert all(p.grad is None for p in model.parameters())
            assert len(seen) == 2, "a tensor's own hook runs as in any backward, others do not"
            seen.clear()
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad for p in model.parameters()], seen

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_hooks_are_removed(monkeypatch):
    """Also when backward fails."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            raise ArithmeticError("on purpose")

    y = torch.ones(2, requires_grad=True).exp()
    loss = Fails.apply(y).sum()
    with pytest.raises(ArithmeticError, match="on purpose"):
        draw(loss)
    draw(y.sum())
    monkeypatch.setattr(flow, "flow_of", lambda gradients: pytest.fail("a hook is left"))
    y.sum().backward(retain_graph=True)
    picture = draw(loss, gradients=False)
    assert node_of(picture, "Fails").flow is None
    assert node_of(picture, "Fails").kind == "function"
    assert "–" in picture.svg


def test_every_op_of_ours_shows_its_formula():
    """That of its definition, on a node that counts as ours."""
    warnings.simplefilter("ignore")  # kl_div warns of its reduction, as torch's does
    for spec in database().values():
        sample = next(iter(spec.samples(Make())))
        y = spec.function(*sample.args, **sample.kwargs)
        y = y[0] if isinstance(y, tuple) else y
        ours = [n for n in draw(y.sum(), gradients=False).nodes if n.kind == "ours"]
        assert ours, spec.name
        for node in ours:
            assert "=" in node.formula, (spec.name, node.formula)
            assert ";" in node.formula or "," in node.formula, (spec.name, node.formula)
    x = torch.randn(3, requires_grad=True)
    in_place = draw(custom_backprop.functional.relu(x.clone(), inplace=True).sum())
    assert node_of(in_place, "relu_").formula == "y = max(x, 0); dx = dy [y > 0]"


def test_a_formula_of_ones_own():
    class Cube(torch.autograd.Function):
        """y = x³;  dx = 3 x² dy.

        More."""

        @staticmethod
        def forward(ctx, x):
            ctx.x = x
            return x**3

        @staticmethod
        def backward(ctx, dy):
            return 3 * ctx.x**2 * dy

    node = node_of(draw(Cube.apply(torch.ones(4, requires_grad=True).exp()).sum()), "Cube")
    assert node.formula == "y = x³; dx = 3 x² dy"
    assert [(s.name, s.note) for s in node.saved] == [("ctx.x", "on ctx")]


def test_names_and_modules():
    model = stock_mlp()
    x = torch.randn(5, 8, requires_grad=True)
    y = model(x)
    picture = draw(y.sum(), model, {"input": x, "output": y})
    labels = {n.label for n in picture.nodes if n.kind == "leaf"}
    assert labels == {*dict(model.named_parameters()), "input"}
    assert node_of(picture, "Addmm").label == "output"
    assert [box.module for box in fold(picture.nodes)] == [""], "a chain is one box"
    unnamed = {n.label for n in draw(model(x).sum()).nodes if n.kind == "leaf"}
    assert unnamed == {"parameter", "leaf"}


def test_nodes_are_in_the_order_of_the_engine():
    x = torch.randn(3, requires_grad=True)
    y = x.exp()
    loss = (y.sin() * (y.cos() + x.tanh()).sigmoid()).sum()
    ran, stack = [], [loss.grad_fn]
    while stack:
        node = stack.pop()
        if not hasattr(node, "variable"):
            node.register_hook(partial(lambda name, *_: ran.append(name), node.name()))
            stack += [after for after, _ in node.next_functions]
    picture = draw(loss)
    assert [n.name for n in picture.nodes if n.kind != "leaf"] == list(dict.fromkeys(ran))


def test_a_box_ends_where_the_graph_branches():
    w = torch.randn(3, 3, requires_grad=True)
    turned = w.t()
    y = (torch.ones(2, 3) @ turned).exp()
    boxes = fold(draw(((y.sin() + y.cos()) @ turned).sum()).nodes)
    found = [["+".join(n.op for n in row.nodes) for row in box.rows] for box in boxes]
    assert found == [["Sum", "Mm", "Add"], ["Cos"], ["Sin"], ["Exp", "Mm"]]
    assert [box.to for box in boxes] == [[2, 1], [3], [3], []]
    (weight,) = boxes[0].rows[1].leaves
    assert [weight[0].op, weight[1][0].op] == ["leaf", "T"], "shared, and shown at each use"


def test_parameters_are_named_within_their_row():
    mlp = custom_backprop.nn.SwiGLUMLP(4, 8)
    model = nn.Sequential(nn.LayerNorm(4), mlp)
    picture = draw(model(torch.ones(2, 4)).sum(), model)
    names = dict(mlp.named_parameters())
    assert len(names) > 1
    for name in names:
        assert f"↳ {name} " in picture.svg


def test_vanishing_and_exploding():
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(16, 4))
    x, target = torch.randn(5, 16), torch.randint(4, (5,))
    picture = draw(nn.functional.cross_entropy(model(x), target), model)
    assert [v.kind for v in picture.verdicts] == ["vanishing"]
    assert picture.verdicts[0].layer == "0"
    marks = {n.label: n.mark for n in picture.nodes if n.kind == "leaf"}
    assert marks["0.weight"] == "vanishing"
    assert marks["24.weight"] == ""
    assert "vanishing" in str(picture)

    large = torch.ones(1, 4, requires_grad=True)
    for factor in (10, 1, 1, 10, 10, 10, 10):
        large = large * factor
    picture = draw(large.mean())
    assert [n.mark for n in picture.nodes] == [""] * 5 + ["exploding"] * 4
    assert {e.mark for n in picture.nodes for e in n.edges} == {"", "exploding"}


def test_zero_and_non_finite_gradients():
    x = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert node_of(draw(x.relu().sum()), "leaf").mark == "zero"
    x = torch.zeros(2, requires_grad=True)
    picture = draw(x.sqrt().sum())
    assert node_of(picture, "leaf").mark == "non-finite"
    assert [v.kind for v in picture.verdicts] == ["non-finite"]
    json.loads(re.search(r'id="data">(.*?)</script>', picture.html, re.S)[1])


def views():
    x = torch.randn(4, 6, requires_grad=True)
    y = x.clone()
    y[:, 2:4].mul_(2)
    return y.t()[1:].reshape(-1).unfold(0, 3, 1).sum()


def second_derivatives():
    x = torch.randn(3, requires_grad=True)
    (g,) = torch.autograd.grad(custom_backprop.functional.silu(x).sum(), x, create_graph=True)
    return g.square().sum()


def shared():
    w = torch.randn(4, 4, requires_grad=True)
    h = torch.ones(2, 4)
    for _ in range(20):
        h = torch.tanh(h @ w)
    return (h * h).sum()


def several_outputs():
    x = torch.randn(6, requires_grad=True)
    a, _, c = x.split(2)
    values, _ = torch.cat([a, c]).max(0)
    return values


def sparse():
    table = torch.randn(10, 3, requires_grad=True)
    return nn.functional.embedding(torch.tensor([1, 2, 2]), table, sparse=True).sum()


def leaf():
    return torch.tensor(2.0, requires_grad=True)


def complex_numbers():
    return torch.fft.fft(torch.randn(8, requires_grad=True)).abs().sum()


def one_element():
    return torch.randn(1, 1, requires_grad=True) * 2


def empty():
    return torch.randn(0, 3, requires_grad=True).sum()


def checkpointed():
    x = torch.randn(4, requires_grad=True)
    return checkpoint(lambda x: x.exp().sin() * x, x, use_reentrant=False).sum()


@pytest.mark.parametrize(
    "make",
    [views, second_derivatives, shared, several_outputs, sparse, leaf, complex_numbers,
     one_element, empty, checkpointed],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_exotic_graphs(make):
    loss = make()
    picture = draw(loss)
    ElementTree.fromstring(picture.svg)
    assert f'"index": {len(picture.nodes) - 1}' in picture.html
    for node in picture.nodes:
        assert node.flow is not None, node
        assert all(edge.to > node.index for edge in node.edges), "senders come first"
    places = [i for box in fold(picture.nodes) for row in box.rows for i in indices(row)]
    assert set(places) == set(range(len(picture.nodes))), "each node has a place"
    loss.backward()


def indices(row):
    yield from (node.index for node in row.nodes)
    for leaf, between, _ in row.leaves:
        yield from (leaf.index, *(node.index for node in between))


def test_a_checkpoint_is_not_run_to_count_what_it_holds():
    runs = []

    def f(x):
        runs.append(x)
        return (x.exp() + torch.rand(4)).sin()

    x = torch.ones(4, requires_grad=True)
    loss = checkpoint(f, x, use_reentrant=False, preserve_rng_state=False).sum()
    picture = draw(loss, gradients=False)
    assert len(runs) == 1
    before = torch.random.get_rng_state()
    draw(loss)
    assert len(runs) == 2
    assert torch.equal(torch.random.get_rng_state(), before), "random numbers are put back"
    assert [s.note for s in node_of(picture, "Sin").saved] == ["packed"]
    assert picture.saved_bytes == 0


def test_a_compiled_region_is_one_node():
    model = stock_mlp()
    compiled = torch.compile(model, backend="aot_eager")
    with config.patch(donated_buffer=False):
        picture = draw(compiled(torch.randn(5, 8)).sum(), model)
    assert shown(picture).count("CompiledFunction") == 1
    assert node_of(picture, "CompiledFunction").kind == "compiled"
    assert {n.label for n in picture.nodes if n.kind == "leaf"} == {*dict(model.named_parameters())}


def freed():
    loss = torch.ones(2, requires_grad=True).exp().sum()
    loss.backward()
    return loss


def reentrant():
    return checkpoint(torch.exp, torch.ones(2, requires_grad=True), use_reentrant=True).sum()


def donated():
    """What a compiled region says, of which the compiler reuses a saved tensor in backward."""

    def refuse(gradient):
        raise RuntimeError("compiled with non-empty donated buffers")

    x = torch.ones(2, requires_grad=True).exp()
    x.register_hook(refuse)
    return x.sum()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.ones(2, requires_grad=True) * 2, ValueError, r"got shape \(2,\): draw\("),
        (lambda: torch.tensor(1.0), ValueError, "does not require grad"),
        (freed, RuntimeError, r"before loss\.backward\(\)"),
        (reentrant, RuntimeError, "use_reentrant=False"),
        (donated, RuntimeError, "donated_buffer = False before torch.compile"),
    ],
)
def test_what_cannot_be_drawn(make, error, message):
    with pytest.raises(error, match=message):
        draw(make())


def test_files(tmp_path):
    model = stock_mlp()
    picture = draw(loss_of(model), names={"</script>": model[0].weight}, title="A <title>")
    assert picture.html.count("</script>") == 2, "a name does not end the data"
    for name in ("graph.html", "graph.svg"):
        picture.save(tmp_path / name)
        assert "A &lt;title&gt;" in (tmp_path / name).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"\.html or \.svg"):
        picture.save(tmp_path / "graph.png")
    for text in (picture.html, picture.svg):
        links = set(re.findall(r"https?://[^\"' )]+", text))
        assert links <= {"http://www.w3.org/2000/svg"}, "no network"
    assert picture.to_dict()["nodes"][0]["op"] == "NllLoss"
    assert picture._repr_html_().startswith("<iframe")


def test_deep_graphs_stay_quick():
    """Five hundred steps through one layer: the shared weight has no edges across all of them."""
    x = h = torch.randn(2, 4, requires_grad=True)
    w = torch.eye(4, requires_grad=True)
    for _ in range(500):
        h = torch.tanh(h @ w + x)
    start = time.perf_counter()
    picture = draw(h.sum())
    assert len(picture.svg) < 2_000_000
    assert time.perf_counter() - start < 20
    assert picture._drawing.width < 3000


def test_boxes_do_not_overlap():
    generator = torch.Generator().manual_seed(0)
    count = 60
    edges = {(int(torch.randint(b, (), generator=generator)), b) for b in range(1, count)}
    edges |= {(int(torch.randint(b, (), generator=generator)), b) for b in range(1, count)}
    sizes = [(100.0 + 7 * (i % 5), 30.0 + i % 9) for i in range(count)]
    layout = arrange(sizes, sorted(edges))
    for a, b in edges:
        assert layout.y[a] + sizes[a][1] < layout.y[b]
    for i in range(count):
        assert layout.x[i] - sizes[i][0] / 2 >= 0
        assert layout.x[i] + sizes[i][0] / 2 <= layout.width
        for j in range(i):
            if layout.y[i] == layout.y[j]:
                assert abs(layout.x[i] - layout.x[j]) >= (sizes[i][0] + sizes[j][0]) / 2


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_the_page_runs_in_a_browser(tmp_path):
    draw(loss_of(stock_mlp())).save(tmp_path / "page.html")
    browser = partial(subprocess.run, capture_output=True, text=True, check=True, timeout=120)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'p'}"]
    done = browser(["chromium", *options, "--dump-dom", (tmp_path / "page.html").as_uri()])
    assert "<h2>NllLoss</h2>" in done.stdout, "the panel is empty: the script failed"
    assert 'class="tile' in done.stdout
