"""The blocks of Hugging Face models: which are swapped, and that results and gradients stay."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from twins import assert_equal_training, train

import custom_backprop
from custom_backprop.conversions import counterpart, probe
from custom_backprop.conversions.generated import made_of

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {**NO_DROPOUT, "image_size": 16, "patch_size": 8}
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

#: class of a model -> options of its config, and how many of its own modules are swapped
MODELS = {
    "LlamaForCausalLM": (GROUPED, {"RMSNorm": 5, "MLP": 2, "SiLUActivation": 2}),
    "MistralForCausalLM": (GROUPED, {"RMSNorm": 5, "MLP": 2, "SiLUActivation": 2}),
    "Qwen2ForCausalLM": (GROUPED, {"RMSNorm": 5, "MLP": 2, "SiLUActivation": 2}),
    "Qwen3ForCausalLM": (
        GROUPED | {"head_dim": 8},
        {"RMSNorm": 9, "MLP": 2, "SiLUActivation": 2},
    ),
    "GemmaForCausalLM": (GROUPED | {"head_dim": 8}, {"RMSNorm": 5, "MLP": 2, "GELUTanh": 2}),
    "Gemma2ForCausalLM": (GROUPED | {"head_dim": 8}, {"RMSNorm": 9, "MLP": 2, "GELUTanh": 2}),
    "Phi3ForCausalLM": (GROUPED, {"RMSNorm": 5, "MLP": 2, "SiLUActivation": 2}),
    "T5ForConditionalGeneration": (
        T5,
        {"LayerNorm": 12, "DenseGatedActDense": 4, "NewGELUActivation": 4},
    ),
    "GPT2LMHeadModel": (GPT2, {"Conv1D": 8, "NewGELUActivation": 2}),
    "BertForMaskedLM": (SIZES | NO_DROPOUT, {"GELUActivation": 3}),
    "ViTForImageClassification": (SIZES | IMAGE, {"GELUActivation": 2}),
}
LLAMA = "LlamaForCausalLM"


def small(name, **options):
    """The model in training, with weights far from 0 and 1."""
    kind = getattr(pytest.importorskip("transformers"), name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**MODELS[name][0] | options)).train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def batch(name):
    torch.manual_seed(1)
    if name.startswith("ViT"):
        return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    ids = torch.randint(3, 64, (2, 7))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("name", MODELS)
def test_results_gradients_and_counts(name):
    stock = small(name)
    ours = copy.deepcopy(stock)
    before = dict(ours.named_parameters())
    assert custom_backprop.convert(ours) is ours
    swapped = Counter(
        x.theirs.removeprefix(name.split("For")[0])
        for x in custom_backprop.conversion_report(ours).swapped
        if "." not in x.ours
    )
    assert swapped == MODELS[name][1]
    after = dict(ours.named_parameters())
    assert before.keys() == after.keys()
    assert all(p is after[n] for n, p in before.items())
    assert list(ours.state_dict()) == list(stock.state_dict())
    for a, b in zip(stock.modules(), ours.modules(), strict=True):
        assert isinstance(b, type(a))
        assert (type(b).__name__, b.training) == (type(a).__name__, a.training)
    assert repr(ours) == repr(stock)
    inputs = [batch(name)]
    assert_equal_training(train(ours, inputs), train(stock, inputs))

    kinds = [type(m) for m in ours.modules()]
    custom_backprop.convert(ours)
    assert [type(m) for m in ours.modules()] == kinds
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(m) for m in twin.modules()] == kinds
    custom_backprop.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    assert vars(ours).keys() == vars(stock).keys()


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma", "T5"])
def test_norms_in_half_precision_bit_for_bit(name, dtypes):
    """Llama rounds before the weight, Gemma after, T5 nowhere if its weight is float32."""
    full = next(n for n in MODELS if n.startswith(name))
    norm = [m for m in small(full).modules() if type(m).__name__.endswith(("Norm",))][-1]
    of_input, of_weight = dtypes
    norm, ours = norm.to(of_weight), copy.deepcopy(norm.to(of_weight))
    custom_backprop.convert(ours, functions=False)
    assert type(ours) is not type(norm)
    torch.manual_seed(2)
    x = torch.randn(64, norm.weight.numel()).to(of_input)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, found = norm(x), ours(x)
        assert found.dtype == expected.dtype
        assert (found != expected).float().mean() < 0.01


def of_input(x, weight):
    return x.dtype


def wider(x, weight):
    return torch.promote_types(x.dtype, weight.dtype)


def narrower(x, weight):
    return min(x.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)


def a_norm(bias=0.0, power=2, returned=of_input):
    class StrangeRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, x):
            x, dtype = x.float(), returned(x, self.weight)
            r = (x.abs().pow(power).mean(-1, keepdim=True) + self.eps).pow(-1 / power)
            return (self.weight * (x * r + bias)).to(dtype)

    return StrangeRMSNorm()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_probe_sees_what_a_name_does_not_say(device):
    state = torch.random.get_rng_state()
    found = [
        counterpart(m.to(device), type(m)) for m in (a_norm(), a_norm(bias=0.01), a_norm(power=1))
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert issubclass(found[0], torch.nn.Module)
    assert found[1:] == ["an RMSNorm by its name, but computes or rounds otherwise"] * 2


@pytest.mark.parametrize("returned", [of_input, wider, narrower])
def test_ours_runs_in_mixed_dtypes_if_theirs_returns_that_of_the_input(returned):
    norm = a_norm(returned=returned)
    ours = counterpart(norm, type(norm))
    assert made_of(ours)[1].mixed is (returned is of_input)


def test_a_probe_believes_nothing():
    x = torch.ones(2, 3)
    assert probe.agree(lambda: x * (1 + 1e-7), lambda: x)
    for found in (x.double(), x[:1], x * (1 + 1e-4), x * torch.nan, (x,), None):
        assert not probe.agree(lambda found=found: found, lambda: x)
    assert not probe.agree(lambda: x.no_such_method(), lambda: x)


def test_an_mlp_that_only_has_the_names():
    mlp = small(LLAMA).model.layers[0].mlp

    class Swapped(type(mlp)):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    mlp.__class__ = Swapped
    assert counterpart(mlp, Swapped) == "a gated MLP by its layers, but computes something else"
    mlp.act_fn = torch.nn.Tanh()
    assert counterpart(mlp, Swapped) == "no gate of ours has the activation Tanh"


def test_a_changed_block_computes_what_it_says():
    """A hook on a layer is called; a new activation, and a forward put on a layer, are used."""
    stock = small(LLAMA).model.layers[0].mlp
    ours, calls, x = custom_backprop.convert(copy.deepcopy(stock)), [], torch.randn(3, 32)
    handle = ours.up_proj.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(ours(x), stock(x))
    assert calls == [1]
    handle.remove()
    for mlp in (stock, ours):
        mlp.act_fn = torch.nn.ReLU()
    torch.testing.assert_close(ours(x), stock(x))
    for mlp in (stock, ours):
        mlp.act_fn = torch.nn.SiLU()
        mlp.up_proj.forward = lambda x, weight=mlp.up_proj.weight: 3 * x @ weight.t()
    torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_t5_is_where_it_was(training):
    model = small("T5ForConditionalGeneration", dropout_rate=0.5)
    mlp = model.encoder.block[0].layer[1].DenseReluDense.train(training)
    ours = custom_backprop.convert(copy.deepcopy(mlp), exclude="dropout", functions=False)
    x, found = torch.randn(3, 32), []
    for m in (mlp, ours):
        torch.manual_seed(4)
        found.append(m(x))
    torch.testing.assert_close(found[1], found[0])


def test_adapters_come_and_the_former_classes_return():
    peft = pytest.importorskip("peft")
    stock = small(LLAMA)
    ours = custom_backprop.convert(copy.deepcopy(stock))
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    twins = [peft.get_peft_model(m, config) for m in (stock, ours)]
    custom_backprop.revert(twins[1])
    assert [type(m) for m in twins[1].modules()] == [type(m) for m in twins[0].modules()]


def test_the_report_counts_what_is_saved():
    report = custom_backprop.conversion_report(
        custom_backprop.convert(small(LLAMA)), **batch(LLAMA)
    )
    rows = {x.name: x for x in report.layers}
    tokens, inner, width = 14, 48, 32
    mlp = [rows[n] for n in rows if n.startswith("model.layers.0.mlp")]
    assert sum(x.saved for x in mlp) == 4 * tokens * (2 * inner + width)
    assert sum(x.saved_before for x in mlp) == 4 * tokens * (4 * inner + width)
    norm = rows["model.norm"]
    assert (norm.saved, norm.saved_before) == (
        4 * tokens * (width + 1),
        4 * tokens * (2 * width + 1),
    )
    assert report.to_dict()["layers"][0]["name"] == "model.embed_tokens"
    assert "total" in str(report)
    assert str(report).count("LlamaRMSNorm") == 3
