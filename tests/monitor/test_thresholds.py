"""Each threshold of a verdict, from both sides, and the two halves of the history."""

from __future__ import annotations

import pytest
from monitor_helpers import kinds

from custom_backprop.monitor import (
    Layer,
    Reading,
    falls,
    judge,
)


def reading(norm=1.0, norms=(0.5, 0.5), update=None, dead=None, std=1.0):
    """Layers "0", "1", ... with these gradients. ``dead`` and ``std`` are those of layer 0; all
    others have 0 and 1."""
    layers = [
        Layer(
            str(i),
            n,
            nonfinite=0.0,
            dead=0.0 if i else dead,
            activation_std=1.0 if i else std,
            update=update,
        )
        for i, n in enumerate(norms)
    ]
    return Reading(1, norm, update, tuple(layers))


def test_falls():
    assert falls([1.0, 0.1, 1e-3, 1e-3]) == pytest.approx([0, 1, 3, 3])
    assert falls([1.0, 1e-9, 1e-9]) == pytest.approx([0, 2, 2]), (
        "one step counts two decades at most"
    )
    assert falls([1e-9, 1.0, 0.0]) == pytest.approx([0, 0, 2])
    assert falls([0.0, 0.0]) == [0, 0]
    assert falls([]) == []


@pytest.mark.parametrize(("times", "said"), [(99, []), (101, [("exploding", "1")])])
def test_a_surge(times, said):
    assert kinds(judge(reading(times, (0.1, times)), [reading()] * 4)) == said


@pytest.mark.parametrize(("before", "said"), [(3, []), (4, [("exploding", "0")])])
def test_the_start_of_a_run_has_no_surge(before, said):
    assert kinds(judge(reading(200), [reading()] * before)) == said


@pytest.mark.parametrize("length", [4, 5, 6])
def test_a_surge_is_measured_against_the_maximum_of_the_older_half(length):
    """One past reading was as large. 200 is a surge unless that reading is in the older half."""
    for index in range(length):
        history = [reading(100.0 if i == index else 1.0) for i in range(length)]
        assert bool(judge(reading(200), history)) is (index >= length // 2), index


@pytest.mark.parametrize(("part", "said"), [(1.1e-3, []), (0.9e-3, [("vanishing", "0")])])
def test_a_lost_part(part, said):
    """The layer's own past share was 0.4. That the network's total fell, too, does not count."""
    history = [reading(10.0, (4.0, 9.0))] * 4
    assert kinds(judge(reading(1.0, (0.4 * part, 0.02), dead=0.0), history)) == said


@pytest.mark.parametrize("length", [5, 6, 7])
def test_a_lost_part_is_measured_against_the_median_of_the_older_half(length):
    half = length // 2
    old, new = [reading(norms=(0.5, 0.5))] * half, [reading(norms=(1e-4, 0.5))] * (length - half)
    now = reading(norms=(1.1e-4, 0.011))
    assert kinds(judge(now, old + new)) == [("vanishing", "0")]
    assert judge(now, new[:half] + [*old, *new][: length - half]) == []


def test_one_odd_reading_is_no_past():
    """One of three: most of the older half had almost no gradient."""
    history = [reading(norms=(n, 0.5)) for n in (1e-4, 0.5, 1e-4, 0.5, 0.5, 0.5)]
    assert judge(reading(norms=(1.1e-4, 0.011)), history) == []


def test_a_step_without_any_gradient_loses_nothing():
    assert judge(reading(0.0, (0.0, 0.0)), [reading()] * 6) == []
    assert judge(reading(norms=(5e-4, 0.05)), [reading(0.0, (0.0, 0.0))] * 6) == []


@pytest.mark.parametrize(("decades", "said"), [(3.9, False), (4.1, True)])
def test_a_fall_through_the_network(decades, said):
    norms = [10 ** (-decades * i / 4) for i in range(5)]
    assert kinds(judge(reading(norms=norms[::-1]), [])) == [("vanishing", "0")] * said
    assert kinds(judge(reading(norms=norms), [])) == [("exploding", "0")] * said


@pytest.mark.parametrize(("decades", "said"), [(3.9, False), (4.1, True)])
def test_a_fall_of_the_activations(decades, said):
    deviations = [10 ** (-decades * i / 4) for i in range(5)]

    def outputs(values):
        return Reading(
            1,
            1.0,
            None,
            tuple(
                Layer(str(i), 0.5, nonfinite=0.0, activation_std=s) for i, s in enumerate(values)
            ),
        )

    assert kinds(judge(outputs(deviations), [])) == [("vanishing", "4")] * said
    assert kinds(judge(outputs(deviations[::-1]), [])) == [("exploding", "4")] * said


@pytest.mark.parametrize(("update", "said"), [(0.99, []), (1.01, [("exploding", "0")])])
def test_an_update(update, said):
    assert kinds(judge(reading(update=update), [])) == said


@pytest.mark.parametrize(("dead", "said"), [(0.74, []), (0.76, [("dead units", "0")])])
def test_most_units_dead(dead, said):
    assert kinds(judge(reading(dead=dead), [])) == said
    assert kinds(judge(reading(dead=dead), [reading(dead=dead)] * 9)) == said


@pytest.mark.parametrize(("dead", "said"), [(0.34, []), (0.36, [("dead units", "0")])])
def test_units_that_died(dead, said):
    """A quarter more than at some earlier time, whenever that was. It does not matter that a layer
    was frozen before."""
    for index in range(5):
        history = [reading(dead=0.1 if i == index else 0.6) for i in range(5)]
        assert kinds(judge(reading(dead=dead), history)) == said
    assert judge(reading(dead=dead), [reading(dead=None)] * 5) == []


@pytest.mark.parametrize(("before", "said"), [(2, []), (3, [("dead units", "0")])])
def test_gradients_alone_must_show_it_four_times(before, said):
    def silent(dead=0.9):
        return reading(dead=dead, std=None)

    verdicts = judge(silent(), [silent()] * before)
    assert kinds(verdicts) == said
    assert all("4 times in a row" in v.evidence for v in verdicts)
    assert judge(silent(), [silent()] * 3 + [silent(0.0)] + [silent()] * 2) == []
    assert kinds(judge(silent(), [silent(0.0)] + [silent()] * 3)) == [("dead units", "0")]


def beneath(norm, rest, normalised, dead=0.9):
    """Layer 0, a module without parameters, layer 2, whose gradient is ``rest``."""
    layers = (
        Layer("0", norm, nonfinite=0.0, dead=dead),
        Layer("1"),
        Layer("2", rest, nonfinite=0.0),
        Layer("3", 1.0, nonfinite=0.0),
    )
    layers = tuple(Layer(**{**vars(layer), "activation_std": 1.0}) for layer in layers)
    return kinds(judge(Reading(1, 1.0, None, layers), [], normalised))


def test_rounding_errors_before_a_normalisation():
    assert beneath(0.9e-4, 1.0, {"1"}) == []
    assert beneath(1.1e-4, 1.0, {"1"}) == [("dead units", "0")]
    assert beneath(0.9e-4, 1.0, set()) == [("dead units", "0")]


def test_layers_before_a_rounded_gradient_are_rounding_too():
    assert beneath(0.9e-5, 1e-9, {"3"}) == []
    assert beneath(1.1e-5, 1e-9, {"3"}) == [("dead units", "0")]
