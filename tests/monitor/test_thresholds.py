"""The figures that the docstring of GradientMonitor states: just below each there is no verdict."""

from __future__ import annotations

import pytest

from custom_backprop.monitor import Layer, Reading, judge

NORM = 1.0


def reading(norm=NORM, *, dead=0.0, update=None, norms=()):
    """Of one layer with outputs; or of layers with these norms."""
    each = [Layer(f"{i}", n, nonfinite=0.0) for i, n in enumerate(norms)]
    one = Layer("0", norm, nonfinite=0.0, dead=dead, activation_std=1.0, update=update)
    return Reading(0, norm, update, tuple(each or [one]))


def kinds(now, past=()):
    return [v.kind for v in judge(now, past)]


@pytest.mark.parametrize(("times", "verdicts"), [(99, []), (101, ["exploding"])])
def test_a_norm_is_compared_with_the_largest_of_the_older_half(times, verdicts):
    past = [reading(n) for n in (NORM / 10, NORM, 10 * NORM, 10 * NORM)]
    assert kinds(reading(times * NORM), past) == verdicts
    assert kinds(reading(times * NORM), past[:3]) == [], "there are too few readings"


@pytest.mark.parametrize(("update", "verdicts"), [(0.99, []), (1.01, ["exploding"])])
def test_an_update_is_compared_with_the_weights(update, verdicts):
    assert kinds(reading(update=update)) == verdicts


@pytest.mark.parametrize(("last", "found"), [(1.1e-4, False), (0.9e-4, True)])
def test_four_decades_through_the_network(last, found):
    norms = (1.0, 1e-1, 1e-2, 1e-3, last)
    assert ("exploding" in kinds(reading(norms=norms))) == found
    assert ("vanishing" in kinds(reading(norms=norms[::-1]))) == found


@pytest.mark.parametrize(("share", "verdicts"), [(1.1e-3, []), (0.9e-3, ["vanishing"])])
def test_a_share_is_compared_with_what_it_was(share, verdicts):
    past = [reading() for _ in range(4)]
    now = Reading(0, NORM, None, (Layer("0", share * NORM, nonfinite=0.0),))
    assert kinds(now, past) == verdicts


@pytest.mark.parametrize(
    ("dead", "past", "verdicts"),
    [
        (0.75, (), []),
        (0.76, (), ["dead units"]),
        (0.25, (0.5, 0.0, 0.5), []),
        (0.26, (0.5, 0.0, 0.5), ["dead units"]),
    ],
)
def test_dead_units_are_compared_with_their_fewest(dead, past, verdicts):
    assert kinds(reading(dead=dead), [reading(dead=d) for d in past]) == verdicts
