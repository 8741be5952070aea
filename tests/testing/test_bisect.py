"""``bisect`` names the module with a planted mistake, and nothing where there is none."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import custom_backprop
from custom_backprop.conversions.patch import is_active, patch
from custom_backprop.testing import bisect

SLIGHTLY = 1 + 1e-11


class Tanh(torch.autograd.Function):
    """tanh, whose results and gradients can be wrong by a factor."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        ctx.factor = backward
        return y * forward

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return dy * (1 - y * y) * ctx.factor, None, None


class Act(nn.Module):
    def __init__(self, forward=1.0, backward=1.0):
        super().__init__()
        self.factors = forward, backward

    def forward(self, x):
        return Tanh.apply(x, *self.factors)


class Block(nn.Module):
    def __init__(self, act=None, factor=1.0):
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(6), nn.Linear(6, 6), act or Act()
        self.factor = factor

    def forward(self, x):
        return x + self.factor * self.act(self.up(self.norm(x)))


def stack(*blocks):
    torch.manual_seed(0)
    return nn.Sequential(*(b() for b in blocks))


def four(**planted):
    """Four blocks. ``two=f`` puts f() in place of the third."""
    return stack(*(planted.get(n, Block) for n in ("zero", "one", "two", "three")))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def wrong(found):
    return {x.name for x in found.layers if max(x.forward, x.backward or 0.0) > found.tolerance}


def test_a_wrong_backward_is_named_and_does_not_spread():
    found = bisect(four(two=lambda: Block(Act(backward=SLIGHTLY))), four(), X)
    assert not found.ok
    assert found.first_forward is None
    assert found.first_backward.name == "2.act"
    assert found.first_backward.worst_gradient == "input"
    # the backward of 0 and of 1 ran after that of 2
    assert wrong(found) == {"2.act", "2", ""}
    assert found.verdict() == (
        "first wrong: 2.act (Act): backward, gradient of input, "
        f"{found.first_backward.backward:.1e} ulps"
    )
    assert max(x.forward for x in found.layers) == 0
    # eps of float64 is 2.2e-16; the largest element is not always the one with the largest error
    assert 1e3 < found.first_backward.backward <= 1.01e-11 / 2.2e-16


def test_a_wrong_forward_is_named_and_does_not_spread():
    planted = four(
        one=lambda: Block(Act(forward=SLIGHTLY)), two=lambda: Block(Act(backward=SLIGHTLY))
    )
    found = bisect(planted, four(), X)
    assert (found.first_forward.name, found.first_forward.worst_result) == ("1.act", "output")
    assert found.first_backward.name == "2.act"
    assert wrong(found) == {"1.act", "1", "2.act", "2", ""}
    assert found.verdict().count("first wrong:") == 2


def test_the_first_of_several():
    """In the order of execution for forward, in that of backward for backward."""
    planted = [lambda: Block(Act(forward=SLIGHTLY))] * 2 + [
        lambda: Block(Act(backward=SLIGHTLY))
    ] * 2
    found = bisect(stack(*planted), four(), X)
    assert (found.first_forward.name, found.first_backward.name) == ("0.act", "3.act")


def test_a_mistake_in_the_code_of_a_block_names_the_block():
    found = bisect(four(one=lambda: Block(factor=SLIGHTLY)), four(), X)
    assert (found.first_forward.name, found.first_forward.kind) == ("1", "Block")
    assert wrong(found) == {"1", ""}


class WrongWeight(nn.Linear):
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(x, weight)
            return F.linear(x, weight, bias)

        @staticmethod
        def backward(ctx, dy):
            x, weight = ctx.saved_tensors
            rows = dy.flatten(0, -2)
            dw = rows.T @ x.flatten(0, -2) * SLIGHTLY
            return dy @ weight, dw, rows.sum(0) if ctx.needs_input_grad[2] else None

    def forward(self, x):
        return self.Product.apply(x, self.weight, self.bias)


def test_a_wrong_gradient_of_a_parameter_alone():
    model, twin = four(), four()
    model[2].up.__class__ = WrongWeight
    first = bisect(model, twin, X).first_backward
    assert (first.name, first.kind, first.worst_gradient) == ("2.up", "WrongWeight", "weight")


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


def test_a_gradient_that_does_not_arrive():
    model, twin = four(), four()
    model[3].up.__class__ = Detached
    first = bisect(model, twin, X).first_backward
    assert (first.name, first.backward) == ("3.up", torch.inf)


class Reshaped(nn.Linear):
    def forward(self, x):
        return super().forward(x)[None]


def test_an_output_of_another_shape():
    model, twin = four(), four()
    model[3].up.__class__ = Reshaped
    first = bisect(model, twin, X).first_forward
    assert (first.name, first.forward) == ("3.up", torch.inf)


class NotANumber(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return torch.where(y == y.max(), torch.nan, y)


def test_nan():
    model, twin = four(), four()
    model[1].up.__class__ = NotANumber
    assert bisect(model, twin, X).first_forward.name == "1.up"
    twin[1].up.__class__ = NotANumber
    assert bisect(model, twin, X).ok


class WrongVariance(nn.BatchNorm1d):
    def forward(self, x):
        y = super().forward(x)
        self.running_var.data *= SLIGHTLY
        return y


def test_a_wrong_buffer():
    twin = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    model = copy.deepcopy(twin)
    model[1].__class__ = WrongVariance
    first = bisect(model, twin, X).first_forward
    assert (first.name, first.worst_result) == ("1", "buffer running_var")


def test_a_right_model():
    twin = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)
    )
    model = custom_backprop.convert(copy.deepcopy(twin))
    with torch.no_grad():
        found = bisect(model, twin, torch.randn(3, 1, 4, 4))
    assert found.verdict() == "nothing is wrong"
    assert [x.name for x in found.layers] == ["0", "1", "2", "3", "4", ""]
    assert all(x.backward is not None for x in found.layers)
    assert {x.dtype for x in found.layers} == {"float64"}


def test_both_models_stay_as_they_are():
    model, twin = four(), four()
    for m in (model, twin):
        m.append(nn.BatchNorm1d(6))
        m.eval()
        m[0].train()
        m(X).sum().backward()
    states = [
        (
            {n: t.clone() for n, t in m.state_dict().items()},
            [p.grad.clone() for p in m.parameters()],
            [x.training for x in m.modules()],
        )
        for m in (model, twin)
    ]
    random, x = torch.get_rng_state(), X.clone().requires_grad_()
    bisect(model, twin, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert x.grad is None
    for m, (tensors, gradients, modes) in zip((model, twin), states, strict=True):
        torch.testing.assert_close(dict(m.state_dict()), tensors, rtol=0, atol=0)
        assert all(map(torch.equal, [p.grad for p in m.parameters()], gradients))
        assert [x.training for x in m.modules()] == modes
        assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.modules())


class Language(nn.Module):
    """The head is tied to the embedding. It returns what Hugging Face's models return."""

    def __init__(self, act=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block = nn.Embedding(11, 6), Block(act)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, labels=None):
        logits = self.head(self.block(self.embed(ids)))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


IDS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        ({"ids": IDS, "labels": IDS}, {}),
        ((IDS, IDS), {}),
        ([IDS], {}),
        (IDS, {"loss": lambda out: out["logits"].square().mean()}),
    ],
    ids=["dict", "tuple", "list", "tensor"],
)
def test_tied_weights_and_batches_of_every_kind(batch, options):
    assert bisect(Language(), Language(), batch, **options).ok
    found = bisect(Language(Act(backward=SLIGHTLY)), Language(), batch, **options)
    assert found.first_backward.name == "block.act"
    model = Language()
    model.head.__class__ = WrongWeight
    found = bisect(model, Language(), batch, **options)
    assert (found.first_backward.name, found.first_backward.worst_gradient) == ("head", "weight")
    assert found.layers[-1].worst_gradient == "embed.weight"


def test_the_loss_is_what_is_differentiated():
    """The gradient of the weight of a loss that does not use it is zero."""
    options = {"loss": lambda out: out["logits"][..., :0].sum()}
    found = bisect(Language(Act(backward=2.0)), Language(), IDS, **options)
    assert found.ok


class Several(nn.Module):
    """Two outputs in an object, one of which is not used further."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, x, *, by):
        return SimpleNamespace(a=x.sin() * by, unused=x.cos(), b=[by * self.factor, "text"])


class Uses(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), Several(factor)

    def forward(self, x):
        y = self.second(self.first(x), by=x.mean())
        return y.a, y.b[0] * y.a.mean()


def test_objects_and_keywords():
    assert bisect(Uses(), Uses(), X).ok
    first = bisect(Uses(SLIGHTLY), Uses(), X).first_forward
    assert (first.name, first.worst_result) == ("second", "output 2")


class Longer(Several):
    def forward(self, x, *, by):
        found = super().forward(x, by=by)
        found.b.append(by)
        return found


def test_an_output_more():
    model, twin = Uses(), Uses()
    model.second.__class__ = Longer
    for one, other in ((model, twin), (twin, model)):
        first = bisect(one, other, X).first_forward
        assert (first.name, first.worst_result, first.forward) == ("second", "output 3", torch.inf)


class Adds(nn.Module):
    def forward(self, x, y):
        return x + y


def test_a_module_gets_what_its_own_hooks_got():
    twin = nn.Sequential(nn.Linear(6, 6), Adds())

    def doubles(module, args):
        (x,) = args
        return x, 2 * x

    twin[1].register_forward_pre_hook(doubles)
    assert bisect(copy.deepcopy(twin), twin, X).ok


class Caches(nn.Module):
    """Changes an argument, as a layer does with the cache of its keys."""

    def forward(self, x, cache):
        cache.seen.append(2 * x)
        return torch.cat(cache.seen).sum(0) * x


class Twice(nn.Module):
    """The same layer twice, with a cache between."""

    def __init__(self):
        super().__init__()
        self.layer = Caches()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        cache = SimpleNamespace(seen=[])
        return self.layer(self.layer(self.scale * x, cache), cache)


class CachesWrongly(Caches):
    def forward(self, x, cache):
        return super().forward(x, cache) * (SLIGHTLY if len(cache.seen) == 2 else 1.0)


def test_a_second_call_with_a_cache():
    model, twin = Twice(), Twice()
    assert bisect(model, twin, X).ok
    model.layer.__class__ = CachesWrongly
    found = bisect(model, twin, X)
    assert found.first_forward.name == "layer"
    assert found.first_forward.forward > 1e3


class DropsOut(nn.Module):
    def __init__(self, forward=1.0, backward=1.0):
        super().__init__()
        self.drop, self.act = nn.Dropout(0.5), Act(forward, backward)

    def forward(self, x):
        return F.dropout(self.act(self.drop(x)), 0.3, self.training)


def drops_out(**factors):
    return stack(lambda: nn.Linear(6, 6), lambda: DropsOut(**factors))


def test_dropout_of_both_draws_the_same_numbers():
    found = bisect(drops_out(), drops_out(), X)
    assert max(max(x.forward, x.backward or 0.0) for x in found.layers) == 0
    found = bisect(drops_out(forward=SLIGHTLY), drops_out(), X)
    assert found.first_forward.name == "1.act"
    found = bisect(drops_out(backward=SLIGHTLY), drops_out(), X)
    assert found.first_backward.name == "1.act"


def test_other_random_numbers_are_not_called_wrong():
    model, twin = custom_backprop.convert(drops_out(backward=SLIGHTLY)), drops_out()
    found = bisect(model, twin, X)
    assert {x.name for x in found.layers if x.random} == {"1.drop", "1", ""}
    assert found.first_forward is None
    assert found.first_backward.name == "1.act"
    found = bisect(custom_backprop.convert(drops_out()), twin, X)
    assert found.verdict() == "nothing is wrong, as far as can be said: 3 random"
    assert "Set p=0, or call eval()" in str(found)
    assert bisect(model.eval(), twin.eval(), X).first_backward.name == "1.act"


class ByRows(nn.Module):
    """x minus its mean, summed: the gradient is zero but for rounding."""

    flip = False

    def forward(self, x):
        x = x.flip(0) if self.flip else x
        return ((x - x.mean(0)).exp().log()).sum(0)


def test_a_gradient_of_nothing_but_rounding_is_not_called_wrong():
    model = nn.Sequential(nn.Linear(6, 6), ByRows())
    twin = copy.deepcopy(model)
    model[1].flip = True
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = bisect(model, twin, torch.randn(50, 6), dtype=dtype)
        assert found.ok, str(found)
        assert dtype == torch.bfloat16 or found.layers[-1].backward > 0


class NormInFloat32(nn.LayerNorm):
    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), (6,), weight, bias).to(x.dtype)


def test_a_twin_that_computes_in_a_coarser_dtype():
    twin = four()
    twin[1].norm.__class__ = NormInFloat32
    found = bisect(four(), twin, X)
    assert found.ok, str(found)
    assert {x.name for x in found.layers if x.dtype == "float32"} == {"1.norm", "1", ""}
    assert max(x.forward for x in found.layers if x.dtype == "float32") > 0.05
    model = four(one=lambda: Block(factor=1 + 1e-4))
    assert bisect(model, twin, X).first_forward.name == "1"


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 1 + 1e-5), (torch.bfloat16, 1.2), (torch.float16, 1.02)],
    ids=str,
)
def test_other_dtypes(dtype, factor):
    assert bisect(custom_backprop.convert(four()), four(), X, dtype=dtype).ok
    found = bisect(four(two=lambda: Block(Act(backward=factor))), four(), X, dtype=dtype)
    assert found.first_backward.name == "2.act"
    assert {x.dtype for x in found.layers} == {str(dtype)[6:]}


def test_the_functions_of_a_patched_model_are_patched_in_its_modules():
    seen = []

    class Asks(nn.Module):
        def forward(self, x):
            seen.append(is_active())
            return x

    twin = nn.Sequential(nn.Linear(6, 6), Asks())
    bisect(patch(copy.deepcopy(twin)), twin, X)
    # the twin's whole run; its module alone; the two models
    assert seen == [False, True, False, False, True, False, False]


def test_the_report():
    model, twin = four(two=lambda: Block(Act(backward=SLIGHTLY))), four()
    twin[3].never = model[3].never = nn.Linear(6, 6)
    found = bisect(model, twin, X)
    assert found.not_called == ["3.never"]
    lines = str(found).splitlines()
    assert lines[0].split() == ["module", "kind", "ulps", "of", "forward", "backward"]
    assert [line.split()[0] for line in lines[1:5]] == ["0.norm", "0.up", "0.act", "0"]
    assert [line.split()[0] for line in lines if line.endswith("WRONG")] == ["2.act", "2", "(the"]
    assert lines[-2:] == ["never called: 3.never", found.verdict()]
    as_dict = json.loads(json.dumps(found.to_dict()))
    assert as_dict["ok"] is False
    assert as_dict["layers"][0]["name"] == "0.norm"


def test_two_models_that_are_no_twins():
    longer = stack(*[Block] * 5)
    with pytest.raises(ValueError, match="modules of model and twin differ: only '4' in the twin"):
        bisect(four(), longer, X)
    other, bare = four(), four()
    other[1].up.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"'1.up.weight' of model and twin.*\(6, 6\) and \(6, 6\)"):
        bisect(four(), other, X)
    bare[1].up.bias = None
    with pytest.raises(ValueError, match=r"parameters .* only '1.up.bias' in the model"):
        bisect(four(), bare, X)


def test_a_model_of_hugging_face():
    transformers = pytest.importorskip("transformers", reason="in the extra 'hf'")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    twin = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(0, 31, (2, 7))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    model = custom_backprop.convert(copy.deepcopy(twin))
    found = bisect(model, twin, batch)
    assert found.ok, str(found)

    mlp = model.model.layers[1].mlp
    right = type(mlp).forward
    wrong = {"forward": lambda self, x: right(self, x) * SLIGHTLY}
    mlp.__class__ = type("WrongMLP", (type(mlp),), wrong)
    first = bisect(model, twin, batch).first_forward
    assert (first.name, first.kind) == ("model.layers.1.mlp", "WrongMLP")
