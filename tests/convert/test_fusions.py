"""Neighbours run as one op: the results stay, and so does everything else that can be told."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from torch.nn.utils import parametrizations
from twins import assert_equal_training, batches, gradients, small

import custom_backprop
from custom_backprop import functional as F
from custom_backprop import nn
from custom_backprop.conversions import blocks, fusions, joined

OPS = ("add_layer_norm", "add_rms_norm", "dropout_add", "linear_activation")
KINDS = {
    "bert": {"linear_activation": 2, "add_layer_norm": 4},
    "vit": {"linear_activation": 2, "add_layer_norm": 2},
    "llama": {"add_rms_norm": 2},
    "Qwen3ForCausalLM": {"add_rms_norm": 2},
}


@pytest.fixture
def calls(monkeypatch):
    """How often each op is called. None is left because of the device."""
    count: Counter[str] = Counter()

    def counting(name, op):
        def call(*args, **kwargs):
            count[name] += 1
            return op(*args, **kwargs)

        return call

    for name in OPS:
        monkeypatch.setattr(F, name, counting(name, getattr(F, name)))
    for module in (fusions, joined):
        monkeypatch.setattr(module, "takes", lambda op, device: True)
    return count


def stack(*, dropout=0.0):
    torch.manual_seed(0)
    t = torch.nn
    layers = [t.Linear(4, 5), t.GELU("tanh"), t.Linear(5, 6), t.Softplus(2.0, 1.0)]
    layers += [t.Dropout(dropout), t.Linear(6, 3, bias=False), t.LeakyReLU(0.2, inplace=True)]
    return t.Sequential(*layers, t.Linear(3, 3)).double()


def run(model, name=None):
    """The loss, and all gradients."""
    model.zero_grad()
    torch.manual_seed(3)
    if name is None:
        x = torch.linspace(-2, 2, 12, dtype=torch.float64).view(3, 4)
        loss = model(x).square().sum()
    else:
        batch = {k: v.to(model.dtype) if v.is_floating_point() else v
                 for k, v in batches(name, 1)[0].items()}  # fmt: skip
        loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_twins(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-13, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        bound = 1e-12 * max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=bound, msg=name)


def reasons(model):
    """(name, parts) -> why each fusion does nothing."""
    return {(f.block, f.parts): f.reason for f in custom_backprop.conversion_report(model).fusions}


def test_sequential(calls):
    stock = stack()
    ours = custom_backprop.convert(copy.deepcopy(stock))
    assert_twins(run(ours), run(stock))
    assert calls == {"linear_activation": 3}
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert str(ours) == str(stock)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is type(ours)
        assert_twins(run(again), run(stock))
    assert calls == {"linear_activation": 9}
    custom_backprop.revert(ours)
    assert {type(m) for m in ours.modules()} == {type(m) for m in stock.modules()}


def test_a_sequential_that_was_changed(calls):
    ours = custom_backprop.convert(stack(), functions=False)
    ours[1] = torch.nn.Linear(5, 5).double()
    del ours[6:]
    expected = custom_backprop.revert(copy.deepcopy(ours))
    assert_twins(run(ours), run(expected))
    assert calls == {"linear_activation": 1}
    assert len(ours[:3]) == 3


@pytest.mark.parametrize("name", KINDS)
def test_blocks(calls, name):
    stock = small(name).double()
    ours = custom_backprop.convert(copy.deepcopy(stock), functions=False)
    apart = custom_backprop.convert(copy.deepcopy(stock), functions=False, fusions=False)
    expected = run(apart, name)
    assert not calls
    assert_twins(run(ours, name), expected)
    assert calls == KINDS[name]
    if "add_rms_norm" in calls:  # theirs has passed float32
        assert_equal_training(run(ours, name), run(stock, name), rtol=1e-6)
    else:
        assert_twins(run(ours, name), run(stock, name))
    calls.clear()
    again = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert_twins(run(again, name), expected)
    assert_twins(run(ours, name), expected)
    assert calls == {op: 2 * n for op, n in KINDS[name].items()}
    custom_backprop.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize(("name", "count"), [("bert", 4), ("vit", 4)])
def test_a_dropout_that_is_ours_draws_the_same_mask(calls, name, count):
    stock = small(name, dropout=0.3).double()
    apart = custom_backprop.convert(copy.deepcopy(stock), functions=False, fusions=False)
    ours = custom_backprop.convert(copy.deepcopy(stock), functions=False, fusions="dropout_add")
    assert_twins(run(ours, name), run(apart, name))
    assert calls == {"dropout_add": count}
    for module in ours.modules():
        if type(module) is nn.Dropout:  # put there by somebody
            module.__class__ = torch.nn.Dropout
    run(ours, name)
    assert calls == {"dropout_add": count}
    torchs = custom_backprop.convert(
        copy.deepcopy(stock), functions=False, exclude=torch.nn.Dropout
    )
    calls.clear()
    assert_twins(run(torchs, name), run(stock, name))
    assert "dropout_add" not in calls
    left = {why for (_, parts), why in reasons(torchs).items() if parts == ("dropout",)}
    assert left == {"the dropout is not ours, and draws another mask"}


def test_attention_is_called_as_before():
    model = small("llama")
    layer, seen = model.model.layers[0], []
    layer.self_attn.register_forward_pre_hook(
        lambda _, args, named: seen.append((args, named)), with_kwargs=True
    )
    x = torch.randn(1, 3, 32)
    angles = model.model.rotary_emb(x, torch.arange(3)[None])
    for _ in range(2):
        layer(x, None, position_embeddings=angles, output_attentions=False)
        custom_backprop.convert(model)
    with pytest.raises(TypeError, match="positional"):
        layer(x, *[None] * 9)
    (before, before_named), (now, now_named) = seen
    assert before == now == ()
    assert before_named.keys() == now_named.keys()
    assert [before_named[n] is now_named[n] for n in before_named if n != "hidden_states"] == [
        True
    ] * (len(now_named) - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_llama_rounds_as_apart(calls, dtype):
    fused = small("llama").to(dtype)
    for module in fused.modules():
        if "RMSNorm" in type(module).__name__:
            module.weight.data.uniform_(0.5, 1.5)
    apart = custom_backprop.convert(copy.deepcopy(fused), functions=False, fusions=())
    custom_backprop.convert(fused, functions=False)
    assert torch.equal(run(fused, "llama")[0], run(apart, "llama")[0])
    assert calls == {"add_rms_norm": 2}


@pytest.mark.parametrize("where", ["forward", "backward", "global"])
def test_a_hook_is_heard(calls, where):
    ours = custom_backprop.convert(stack(), functions=False)
    expected = run(ours)
    calls.clear()
    heard = []
    if where == "forward":
        handle = ours[0].register_forward_hook(lambda *_: heard.append(1))
    elif where == "backward":
        handle = ours[3].register_full_backward_hook(lambda *_: heard.append(1))
    else:
        register = torch.nn.modules.module.register_module_forward_hook
        handle = register(lambda m, *_: heard.append(1) if m is ours[1] else None)
    try:
        assert_twins(run(ours), expected)
        assert heard == [1]
        assert calls["linear_activation"] == (0 if where == "global" else 2)
        if where != "global":
            parts, part = (("0", "1"), "0") if where == "forward" else (("2", "3"), "3")
            assert reasons(ours)["", parts] == f"somebody hears of {part}"
    finally:
        handle.remove()
    run(ours)
    assert calls["linear_activation"] == (3 if where == "global" else 5)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("bert", "bert.encoder.layer.0.output.LayerNorm"),
        ("bert", "bert.encoder.layer.0.intermediate.intermediate_act_fn"),
        ("llama", "model.layers.0.post_attention_layernorm"),
    ],
)
def test_a_hook_inside_a_block_is_heard(calls, name, part):
    ours = custom_backprop.convert(small(name).double(), functions=False)
    expected = run(ours, name)
    before, heard = calls.copy(), []
    ours.get_submodule(part).register_forward_hook(lambda *_: heard.append(1))
    assert_twins(run(ours, name), expected)
    assert heard == [1]
    assert calls.total() == 2 * before.total() - 1


def test_a_weight_that_is_computed_is_not_looked_at(calls):
    ours = custom_backprop.convert(stack(), functions=False)
    parametrizations.weight_norm(ours[0])
    stock = custom_backprop.revert(copy.deepcopy(ours))
    assert_twins(run(ours), run(stock))
    assert calls == {"linear_activation": 2}


def test_switched_off(calls):
    everything = {"linear_activation", "add_norm", "dropout_add"}
    for off in sorted(everything):
        model = small("bert", dropout=0.1)
        custom_backprop.convert(model, functions=False, fusions=everything - {off})
        found = custom_backprop.conversion_report(model).fusions
        assert {f.name for f in found if f.reason == "switched off"} == {off}
        assert {f.name for f in found if f.made} == everything - {off}
        run(model, "bert")
        custom_backprop.convert(model, functions=False, fusions=False)  # the last choice counts
        calls.clear()
        run(model, "bert")
        assert not calls
    with pytest.raises(ValueError, match="no fusion 'add'"):
        custom_backprop.convert(model, fusions=["add"])
    with pytest.raises(TypeError, match="int"):
        custom_backprop.convert(model, fusions=3)


def test_excluded_parts_and_blocks(calls):
    ours = custom_backprop.convert(stack(), functions=False, exclude=["0", "3"])
    assert reasons(ours)["", ("0", "1")] == "0: excluded"
    assert reasons(ours)["", ("2", "3")] == "3: excluded"
    run(ours)
    assert calls == {"linear_activation": 1}
    ours = custom_backprop.convert(stack(), functions=False, exclude=torch.nn.Sequential)
    assert set(reasons(ours).values()) == {"excluded"}
    ours = custom_backprop.convert(stack(), functions=False)
    ours.forward = ours.forward
    assert set(reasons(ours).values()) == {"its forward was replaced"}
    ours = custom_backprop.convert(small("bert"), exclude="*.output.LayerNorm")
    assert reasons(ours)["bert.encoder.layer.0.output", ("LayerNorm",)] == "LayerNorm: excluded"


def test_report(capsys):
    model = small("bert", dropout=0.1)
    custom_backprop.convert(model, dry_run=True)
    planned = capsys.readouterr().out
    assert str(custom_backprop.conversion_report(model)) == planned.rstrip("\n")
    done = str(custom_backprop.conversion_report(custom_backprop.convert(model)))
    assert done == planned.rstrip("\n")
    lines = [line.split(maxsplit=2) for line in done.splitlines()]
    output = [line[2] for line in lines if line[1:2] == ["bert.encoder.layer.*.output"]]
    cpu = "left: gains nothing on this device (cpu)"
    assert [" ".join(line.split()) for line in output] == [
        "dropout -> dropout_add",
        f"LayerNorm {cpu}",
    ]
    no_dropout = reasons(small("bert"))
    assert no_dropout["bert.encoder.layer.0.output", ("dropout",)] == "it drops nothing: p = 0"


def test_on_a_cpu_only_what_gains_there(calls, monkeypatch):
    monkeypatch.undo()
    assert not joined.takes("linear_activation", "cpu")
    assert joined.takes("linear_activation", "cuda")
    ours = custom_backprop.convert(stack(), functions=False)
    monkeypatch.setattr(F, "linear_activation", lambda *_, **__: pytest.fail("not left"))
    run(ours)


def test_a_forward_that_is_not_known():
    model = small("llama")
    layers = model.model.layers
    kind = type(layers[0])

    class Inherits(kind):
        pass

    class Doubles(kind):
        def forward(self, hidden_states, **kwargs):
            return 2 * super().forward(hidden_states, **kwargs)

    for layer, other in zip(layers, (Inherits, Doubles), strict=True):
        layer.__class__ = other
    custom_backprop.convert(model)
    found = [f for f in custom_backprop.conversion_report(model).fusions if "layers" in f.block]
    assert {f.reason for f in found} == {"its forward is not one that is known here"}
    assert [type(x) for x in layers] == [Inherits, Doubles]


SAMPLE = """
def deprecate_kwarg(function):
    return function


unheard_of = deprecate_kwarg


class Block:
    @deprecate_kwarg
    {}
"""


@pytest.mark.parametrize("kind", blocks.KNOWN)
def test_a_forward_is_known_by_what_it_says(kind, tmp_path, monkeypatch):
    known = blocks.KNOWN[kind]
    source = re.sub(r"\bx\b", "hidden_states", known.source)
    source = source.replace("mask", "attention_mask").replace("residual)", "input_tensor)")
    source = source.replace(" + residual)", " + input_tensor)")
    if kind == "decoder":  # it hands on what it gets
        source = source.replace("(self, hidden_states, **", "(self, hidden_states, mask=1, **")
        source = source.replace("=hidden_states, **", "=hidden_states, mask=mask, **")
    source = SAMPLE.format(source.replace("\n    ", "\n"))
    changed = {
        "same": source,
        "commented": source.replace("return", "# nothing else\n        return"),
        "decorated": source.replace("    @deprecate_kwarg", "    @unheard_of"),
        "reads": source.replace("return hidden_states", "return self.dense(hidden_states)"),
        "defaults": re.sub(r"(self, hidden_states(, input_tensor)?)", r"\1=1", source, count=1),
        "more": source.replace("(self, hidden_states", "(self, hidden_states, more", 1),
        "renamed": source.replace("hidden_states", "states"),
        "other": source.replace(" + ", " - ")
        if "+" in source
        else source.replace("self.", "-self."),
        "kept": source.replace("mask=mask", "mask=None") if kind == "decoder" else "",
    }
    for name, text in changed.items():
        if text:
            path = tmp_path / f"{kind}_{name}.py"
            path.write_text(text)
            module = module_from_spec(spec_from_file_location(path.stem, path))
            module.__spec__.loader.exec_module(module)
            monkeypatch.setitem(sys.modules, path.stem, module)
            is_known = blocks.is_known(module.Block, kind)
            assert is_known == (name in ("same", "commented")), (name, text)


def test_compiled():
    ours = custom_backprop.convert(stack(), functions=False)
    expected = run(ours)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_twins((run(compiled)[0], gradients(ours)), expected)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_blocks_compiled(calls, name, monkeypatch):
    monkeypatch.undo()
    ours = custom_backprop.convert(small(name).double(), functions=False)
    expected = run(ours, name)
    torch._dynamo.reset()
    ours.compile(backend="aot_eager", fullgraph=True)
    assert_twins(run(ours, name), expected)
