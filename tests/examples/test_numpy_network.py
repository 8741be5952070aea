"""Our layers against a network in NumPy that was written from the equations and knows nothing of
torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy_network import NumpyNetwork

from custom_backprop import nn

SIZES = (5, 7, 6, 4, 3)
ACTIVATIONS = ("relu", "sigmoid", "relu", "sigmoid")
SAMPLES, RATE = 11, 0.5
#: every update on PyTorch's operators; in Triton's interpreter an update costs about a hundred
#: programs, so it makes fewer
UPDATES = {"aten": 100, "formula": 100, "triton": 100 if torch.cuda.is_available() else 10}
TOLERANCE = {"rtol": 0, "atol": 1e-10}


def problem():
    rng = np.random.default_rng(1)
    network = NumpyNetwork(SIZES, ACTIVATIONS)
    return network, rng.standard_normal((SIZES[0], SAMPLES)), rng.random((SIZES[-1], SAMPLES))


def fused(inputs, outputs, activation):
    return [nn.LinearActivation(inputs, outputs, activation=activation)]


def separate(inputs, outputs, activation):
    return [nn.Linear(inputs, outputs), {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}[activation]()]


def copy_of(network, layer, device):
    """Our network with the oracle's parameters, in float64."""
    layers = [layer(i, o, f) for i, o, f in zip(SIZES[:-1], SIZES[1:], ACTIVATIONS, strict=True)]
    model = torch.nn.Sequential(*(module for modules in layers for module in modules)).double()
    with torch.no_grad():
        for ours, theirs in zip(
            model.parameters(), parameters(network.weights, network.biases), strict=True
        ):
            ours.copy_(torch.from_numpy(theirs))
    return model.to(device)


def parameters(weights, biases):
    """W_1, b_1, W_2, b_2, ..., shaped as torch's."""
    return [array for w, b in zip(weights, biases, strict=True) for array in (w, b[:, 0])]


def assert_close(ours, expected):
    for tensor, array in zip(ours, expected, strict=True):
        np.testing.assert_allclose(tensor.detach().cpu().numpy(), array, **TOLERANCE)


@pytest.mark.parametrize("layer", [fused, separate])
def test_gradients_and_updates_are_the_oracles(layer, backend, device):
    network, x, y = problem()
    model, loss_function = copy_of(network, layer, device), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    ours_x, ours_y = (torch.from_numpy(a.T.copy()).to(device) for a in (x, y))
    before = network.loss(x, y)
    for _ in range(UPDATES[backend]):
        optimizer.zero_grad()
        loss = loss_function(model(ours_x), ours_y)
        loss.backward()
        assert abs(loss.item() - network.loss(x, y)) < TOLERANCE["atol"]
        gradients = parameters(*network.gradients(x, y))
        assert min(np.abs(g).max() for g in gradients) > 1e-5, (
            "a gradient that vanishes proves nothing"
        )
        assert_close([p.grad for p in model.parameters()], gradients)
        optimizer.step()
        network.update(x, y, RATE)
    assert_close(model.parameters(), parameters(network.weights, network.biases))
    assert network.loss(x, y) < before


def test_the_oracle_itself_by_central_differences():
    network, x, y = problem()
    gradients = parameters(*network.gradients(x, y))
    h = 1e-6
    for parameter, gradient in zip(
        parameters(network.weights, network.biases), gradients, strict=True
    ):
        for index in np.ndindex(
            parameter.shape
        ):  # parameters() gives views: what is written here is the network's own
            value, losses = parameter[index], []
            for shifted in (value + h, value - h):
                parameter[index] = shifted
                losses.append(network.loss(x, y))
            parameter[index] = value
            assert abs((losses[0] - losses[1]) / (2 * h) - gradient[index]) < 1e-9
