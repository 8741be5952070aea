"""Inputs as text."""

from __future__ import annotations

import pytest
import torch

from custom_backprop.testing import Inputs, Sample, validate
from custom_backprop.testing.inputs import InputsError


@pytest.mark.parametrize(
    "text",
    [
        "f32[8,16] requires_grad, i64[8] < 16",
        "f64[], bf16[2,3] in 0..1, f16[3] in -0.5..1e-05",
        "i32[2] in -1..5, u8[3] < 200, bool[2], i16[1], i8[1]",
        "f32[2,3] strides(0,1), f32[4] strides(3) offset 2",
        "2, -1e-05, 'a, b', None, True, (3, 4), [1], torch.float32, inf",
        "f32[3], weight=f32[3] requires_grad, reduction='mean', seed 4",
    ],
)
def test_a_text_is_read_and_written(text):
    inputs = Inputs.parse(text)
    assert str(inputs) == text
    assert str(Inputs.of(inputs.make(), inputs.seed).make().name).count(",") == text.count(",")


def test_what_a_text_makes():
    sample = Inputs.parse(
        "f32[4,5] requires_grad, f64[2,3] transposed offset 3, f32[2,3] sliced, f32[2,3] expanded, "
        "i64[100] in 3..6, f16[100] in 0..1, eps=1e-5, mode='a, b'"
    ).make()
    x, transposed, sliced, expanded, integers, halves = sample.args
    assert (x.shape, x.dtype, x.requires_grad, x.is_leaf) == ((4, 5), torch.float32, True, True)
    assert (transposed.stride(), transposed.storage_offset()) == ((1, 2), 3)
    assert sliced.stride() == (6, 2)
    assert (expanded.stride(), expanded[0].tolist()) == ((0, 1), expanded[1].tolist())
    assert set(integers.tolist()) == {3, 4, 5}
    assert 0 <= halves.min() < 0.2 < 0.8 < halves.max() <= 1
    assert sample.kwargs == {"eps": 1e-5, "mode": "a, b"}
    again, other = (Inputs.parse(f"f32[4,5], seed {seed}").make().args[0] for seed in (0, 1))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)


@pytest.mark.parametrize(
    ("text", "message", "at"),
    [
        ("f32[8,x]", "expected a size, which is an integer", 6),
        ("i64[2], f33[8]", "no dtype f33; there are f64 f32", 8),
        ("f32[8] require_grad", "no word require_grad; there are requires_grad", 7),
        ("f32[8] < 3", "< bounds integers; for others write: in 0..1", 7),
        ("i64[3] requires_grad", "a tensor of i64 has no gradient", 7),
        ("i64[3] < 0", "no number is between 0 and 0", 7),
        ("f32[2] in 0", "expected .. between two bounds", 11),
        ("f32[2,3] strides(1)", "1 strides for 2 sizes", 9),
        ("a=1, f32[3]", "a positional argument after one by keyword", 5),
        ("x=1, x=2", "x is given twice", 5),
        ("f32[3],", "expected a tensor, such as f32[8,16], or a value of Python", 7),
        ("__import__('os')", "expected a tensor", 0),
        ("torch.load", "torch.load is not a dtype", 0),
        ("seed x", "expected a seed", 5),
        ("f32[3", "expected a comma or ]", 5),
    ],
)
def test_an_error_points_at_its_place(text, message, at):
    with pytest.raises(InputsError) as error:
        Inputs.parse(text)
    first, shown, pointer = str(error.value).split("\n")
    assert first.startswith(message)
    assert (shown, pointer) == (f"  {text}", f"  {' ' * at}^")


def test_what_no_text_describes():
    for argument in (object(), [torch.ones(2)], torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="cannot be described"):
            Inputs.of(Sample((argument,)))


def test_smaller_inputs_fit_together():
    inputs = Inputs.parse("f32[8,16] transposed, i64[8] < 16, 16, dim=(16, 8)")
    found = [str(smaller) for smaller in inputs.smaller()]
    assert "f32[8,1] strides(1,8), i64[8] < 1, 1, dim=(1, 8)" in found
    assert "f32[4,16] strides(1,4), i64[4] < 16, 16, dim=(16, 4)" in found
    assert "f32[8,16], i64[8] < 16, 16, dim=(16, 8)" in found


def test_validate_takes_texts_and_samples():
    def twice(x, scale=2.0):
        return x * scale

    one = Sample((torch.ones(2),), {"scale": 3.0}, "one")
    report = validate(twice, ["f64[3]", one], twice, checks=["forward", "gradient"])
    assert report.verdict == "right"
    report = validate(twice, {"x": torch.ones(2)}, twice, checks=["gradient"])
    assert report.verdict == "right"


def test_the_worst_of_several_samples_counts():
    def half_wrong(x):
        return x * (1 + (x.shape[0] > 2))

    report = validate(half_wrong, ["f64[2]", "f64[3]"], lambda x: x, checks=["forward"])
    assert report.status("forward") == "wrong"
