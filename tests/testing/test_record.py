"""What a model calls, recorded."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from custom_backprop.testing import Inputs, Recording, record, validate


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, eps, mode=None):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy, None, None, None


twice = Twice.apply  # as many write it


@torch.library.custom_op("record_test::plus", mutates_args=())
def plus(x: torch.Tensor, by: float) -> torch.Tensor:
    return x + by


class Layer(nn.Module):
    def forward(self, x, *, index):
        x = twice(x.t(), index, 1e-5, "a")
        return torch.ops.record_test.plus(x.detach(), 0.5) + x


def recorded(data=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4))
    layer = Layer()
    with record(nn.ModuleList([model, layer]), data=data) as seen:
        for rows in (5, 5, 6):
            x = torch.randn(rows, 3)
            layer(model(x), index=torch.tensor([1, 6])).sum().backward()
    return seen


FUNCTION = f"{__name__}:Twice"


def test_each_kind_of_inputs_is_recorded_once():
    seen = recorded()
    assert list(seen.calls[FUNCTION]) == [
        "f32[4,5] requires_grad strides(1,4), i64[2] < 7, 1e-05, 'a'",
        "f32[4,6] requires_grad strides(1,4), i64[2] < 7, 1e-05, 'a', seed 1",
    ]
    for name, text in {
        f"{__name__}:Layer": "f32[5,4] requires_grad, index=i64[2] < 7",
        "torch.ops.record_test.plus": "f32[4,5] strides(1,4), 0.5",
        "torch.nn.modules.linear:Linear": "f32[5,3]",
    }.items():
        assert text in seen.calls[name]
    assert not seen.left_out


def test_what_was_recorded_is_validated(tmp_path):
    recorded().save(tmp_path / "calls.json")
    seen = Recording.load(tmp_path / "calls.json")
    for of in (Twice, Twice.apply, FUNCTION):
        samples = seen.samples(of)
        assert [s.args[0].shape for s in samples] == [(4, 5), (4, 6)]
    checks = ["forward", "gradient"]
    validate(twice, samples, lambda x, *_: 2 * x, checks=checks).raise_if_failed()
    assert validate(twice, samples, lambda x, *_: 3 * x, checks=checks).verdict == "wrong"
    (sample,) = {s.args[1] for s in seen.samples(torch.ops.record_test.plus)}
    assert sample == 0.5
    with pytest.raises(KeyError, match=r"no call of other:Fn was recorded; there are torch.nn"):
        seen.samples("other:Fn")


def test_the_data_is_kept_only_if_asked_for(tmp_path):
    recorded().save(tmp_path / "without.json")
    assert set(
        map(str, json.loads((tmp_path / "without.json").read_text())["calls"][FUNCTION].values())
    ) == {"[]"}
    x = torch.randn(2, 3).t()
    with record(twice, data=True) as seen:
        twice(x, torch.tensor([5]), 0.0)
        twice(x[:1].expand(4, 2), torch.tensor([]), 0.0)
    seen.save(tmp_path / "with.json")
    first, second = Recording.load(tmp_path / "with.json").samples(Twice)
    assert torch.equal(first.args[0], x)
    assert first.args[0].stride() == x.stride()
    assert first.args[1].tolist() == [5]
    assert torch.equal(second.args[0], x[:1].expand(4, 2))


def test_what_cannot_be_described_is_left_out_with_its_reason():
    with record(twice) as seen:
        twice(torch.ones(2), object(), 1.0)
    assert seen.left_out == {FUNCTION: ["an argument of type object cannot be described"]}


def test_another_file_or_version_is_refused(tmp_path):
    path = tmp_path / "calls.json"
    for text in ("{}", "[]", "no"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a recording of"):
            Recording.load(path)
    recorded().save(path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match=r"version 2 of .*; this one reads 1"):
        Recording.load(path)


def test_a_recorded_text_is_one_of_inputs():
    for texts in recorded().calls.values():
        for text in texts:
            assert str(Inputs.parse(text)) == text
