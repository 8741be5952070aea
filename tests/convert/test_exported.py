"""A converted model is compiled, exported, saved and run as its unconverted twin."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from twins import MODELS, assert_equal_training, batches, small, train, twins

import custom_backprop

pytestmark = pytest.mark.usefixtures("fused")


def test_compiled_with_dynamic_shapes():
    """Two lengths, in as many graphs as torch's own model."""
    inputs = [*batches("llama", 2, length=11), *batches("llama", 2, length=17)]
    for batch in inputs:
        for t in batch.values():
            torch._dynamo.mark_dynamic(t, 1)

    def trained(model):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        return train(torch.compile(model, backend=counter), inputs), counter.frame_count

    stock, ours = twins("llama", num_hidden_layers=1)
    expected, fewest = trained(stock)
    found, graphs = trained(ours)
    assert_equal_training(found, expected)
    assert graphs == fewest


class Logits(torch.nn.Module):
    """Export wants tensors for results."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


TOKENS = torch.arange(3, 25).view(2, 11)
LONGER = torch.arange(3, 41).view(2, 19)
#: the length may vary
DYNAMIC = {"input_ids": {1: torch.export.Dim("length", max=32)}}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def exported(request):
    """A stock model, and the program exported from its converted twin."""
    stock, ours = (Logits(m).eval() for m in twins(request.param))
    return stock, torch.export.export(ours, (TOKENS,), dynamic_shapes=DYNAMIC)


def test_exported(exported):
    stock, program = exported
    operators = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not any("custom_backprop" in name for name in operators)
    assert_close(program.module()(TOKENS), stock(TOKENS))
    assert_close(program.module()(LONGER), stock(LONGER))


def test_unflattened(exported):
    stock, program = exported
    assert_close(torch.export.unflatten(program)(TOKENS), stock(TOKENS))


@pytest.mark.filterwarnings("ignore")  # of the exporter about its own parts
def test_as_onnx():
    """With operators of ONNX alone, and right for other lengths too."""
    from onnx.reference import ReferenceEvaluator

    stock, ours = (Logits(m).eval() for m in twins("gpt2"))
    program = torch.onnx.export(ours, (TOKENS,), dynamo=True, verbose=False, dynamic_shapes=DYNAMIC)
    assert {node.domain for node in program.model.graph} == {""}
    assert not program.model.functions
    run = ReferenceEvaluator(program.model_proto).run
    for tokens in (TOKENS, LONGER):
        (logits,) = run(None, {"input_ids": tokens.numpy()})
        assert_close(torch.from_numpy(logits.copy()), stock(tokens), rtol=1e-4, atol=1e-4)


def trained_one_step(name):
    """A stock model and its converted twin, no longer as they started."""
    pair = twins(name)
    for model in pair:
        train(model, batches(name, 1))
    return pair


def logits(model, name):
    (batch,) = batches(name, 1)
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_saved_and_loaded(name, tmp_path):
    """A converted model saves what a stock one saves, to the name of its class, and a stock one
    loads it."""
    stock, ours = trained_one_step(name)
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    found, expected = (
        {f.name: f.read_text() for f in (tmp_path / folder).glob("*.json")}
        for folder in ("ours", "stock")
    )
    assert found == expected
    loaded = type(stock).from_pretrained(tmp_path / "ours")
    assert type(loaded) is type(stock)
    for a, b in zip(loaded.state_dict().items(), ours.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])
    stock.load_state_dict(ours.state_dict())
    assert_close(logits(stock, name), logits(ours, name))


def copies(model, folder):
    """The copies that Python and torch make."""
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    torch.save(model, folder / "model.pt")
    yield torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_copies(name, tmp_path):
    """A copy is a converted model of its own: trained further, it leaves the first alone."""
    _, ours = trained_one_step(name)
    classes = [type(m) for m in ours.modules()]
    before, inputs = copy.deepcopy(ours.state_dict()), batches(name, 2)
    found = [train(c, inputs) for c in copies(ours, tmp_path)]
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in before.items())
    expected = train(ours, inputs)
    for result, c in zip(found, copies(ours, tmp_path), strict=True):
        assert_equal_training(result, expected, 0)
        assert [type(m) for m in c.modules()] == classes
        stock = small(name)
        assert [type(m) for m in custom_backprop.revert(c).modules()] == [
            type(m) for m in stock.modules()
        ]


@pytest.mark.filterwarnings("ignore")  # of torch: quantization moves to another package
def test_quantized_after_revert():
    ours = custom_backprop.convert(small("bert"))
    train(ours, batches("bert", 1))
    stock = small("bert")
    stock.load_state_dict(ours.state_dict())
    found, expected = (
        torch.ao.quantization.quantize_dynamic(m.eval(), {torch.nn.Linear}, torch.qint8)
        for m in (custom_backprop.revert(ours), stock)
    )
    layer = "bert.encoder.layer.0.output.dense"
    assert type(found.get_submodule(layer)) is type(expected.get_submodule(layer))
    assert type(found.get_submodule(layer)) is not torch.nn.Linear
    assert torch.equal(logits(found, "bert"), logits(expected, "bert"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generated(name):
    """The same tokens, from a cache of keys and values and without; and beams."""
    stock, ours = (m.eval() for m in trained_one_step(name))
    ours.load_state_dict(stock.state_dict())
    tokens = TOKENS[:, :5]
    mask = torch.ones_like(tokens)
    for options in ({"use_cache": True}, {"use_cache": False}, {"num_beams": 2}):
        options |= {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        found, expected = (
            m.generate(tokens, attention_mask=mask, **options) for m in (ours, stock)
        )
        assert found.shape == (2, 13)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluated(name, mode):
    """Loss and logits of one call: whoever asks for both gets both."""
    (batch,) = batches(name, 1)
    stock, ours = (m.eval() for m in twins(name))
    with mode():
        found, expected = ours(**batch), stock(**batch)
    assert_close(found.loss, expected.loss)
    assert not found.loss.requires_grad
    assert_close(found.logits.argmax(-1), expected.logits.argmax(-1))
    assert_close(torch.stack(list(found.logits)), expected.logits, rtol=1e-5, atol=1e-6)
