"""A multilayer perceptron in NumPy, written from the equations of backpropagation alone: an oracle
that knows nothing of torch.

The samples are columns: a_0 is (inputs, samples), W_i is (outputs_i, inputs_i), b_i is (outputs_i,
1). For i = 1 ... L

    z_i = W_i a_{i-1} + b_i,    a_i = f_i(z_i),    loss = mean((a_L - y)²)

    delta_L = (∂loss/∂a_L) * f_L'(z_L),    delta_i = (W_{i+1}ᵀ delta_{i+1}) * f_i'(z_i)

    ∂loss/∂W_i = delta_i a_{i-1}ᵀ,    ∂loss/∂b_i = delta_i, summed over the samples

    W_i <- W_i - η ∂loss/∂W_i,    b_i <- b_i - η ∂loss/∂b_i
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


#: name -> (f, f')
ACTIVATIONS = {
    "sigmoid": (sigmoid, lambda z: sigmoid(z) * (1 - sigmoid(z))),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(z.dtype)),
}


class NumpyNetwork:
    """A network of ``len(activations)`` layers.

    Args:
        sizes: units a layer, the inputs first: one more than there are activations.
        activations: the f_i by name.
        seed: of the initial parameters, W_i ~ N(0, 1 / inputs_i) and b_i ~ N(0, 0.01).
    """

    def __init__(self, sizes: Sequence[int], activations: Sequence[str], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        layers = list(pairwise(sizes))
        self.weights = [rng.standard_normal((o, i)) / np.sqrt(i) for i, o in layers]
        self.biases = [0.1 * rng.standard_normal((o, 1)) for _, o in layers]
        self.functions = [ACTIVATIONS[name] for name in activations]

    def forward(self, x: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The z_1 ... z_L and the a_0 ... a_L."""
        zs, outputs = [], [x]
        for weight, bias, (f, _) in zip(self.weights, self.biases, self.functions, strict=True):
            zs.append(weight @ outputs[-1] + bias)
            outputs.append(f(zs[-1]))
        return zs, outputs

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean((self.forward(x)[1][-1] - y) ** 2))

    def gradients(self, x: np.ndarray, y: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """∂loss/∂W_i and ∂loss/∂b_i, from the first layer to the last."""
        zs, outputs = self.forward(x)
        by_weight, by_bias = [], []
        upstream = 2 * (outputs[-1] - y) / y.size  # ∂loss/∂a_i
        for i in reversed(range(len(zs))):
            delta = upstream * self.functions[i][1](zs[i])
            by_weight.insert(0, delta @ outputs[i].T)
            by_bias.insert(0, delta.sum(axis=1, keepdims=True))
            upstream = self.weights[i].T @ delta
        return by_weight, by_bias

    def update(self, x: np.ndarray, y: np.ndarray, rate: float) -> None:
        """One step of gradient descent."""
        for parameters, gradients in zip(
            (self.weights, self.biases), self.gradients(x, y), strict=True
        ):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * gradient
