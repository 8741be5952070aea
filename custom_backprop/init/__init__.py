"""Initialisation that preserves the variance: one call for a network and its activation, based on
``torch.nn.init``.

A layer z' = W f(z) with independent weights of mean 0 has E z'² = fan_in · Var w · E f(z)². If z
has unit variance, z' has it too exactly if

    Var w = g² / fan_in,    g = E[f(z)²]^(-1/2),  z ~ N(0, 1)

which is what :func:`gain` computes from the activation's own formula. Backward, δ = f'(z) Wᵀ δ' has
E δ² = fan_out · Var w · E f'(z)² · E δ'² (the fans of a convolution are the channels of one group
times the size of the kernel). With this gain and fan_in = fan_out, each layer multiplies a gradient
by b = g E[f'(z)²]^(1/2). And a variance q close to 1 becomes 1 + s (q - 1), s = ½ g² E[f(z)² (z² -
1)] (from the derivative by q of the density of variance q): it returns to 1 if s < 1, stays if s =
1, and drifts away if s > 1.

================  ======  ======  ======
activation         g       b       s
================  ======  ======  ======
linear            1.0000  1.0000  1.0000
relu              1.4142  1.0000  1.0000
relu6             1.4142  1.0000  1.0000
leaky_relu        1.4141  1.0000  1.0000
elu               1.2452  1.0178  0.8910
selu              1.0000  1.0352  0.7826
celu              1.2452  1.0178  0.8910
gelu              1.5335  1.0354  1.1441
gelu_tanh         1.5336  1.0354  1.1443
silu              1.6765  1.0328  1.1726
mish              1.4868  1.0291  1.0763
sigmoid           1.8462  0.3909  0.1063
logsigmoid        1.0419  0.5643  0.4921
hardsigmoid       1.8978  0.3159  0.0971
hardswish         1.7367  1.0399  1.2239
hardtanh          1.3920  1.1502  0.3851
tanh              1.5925  1.0853  0.4611
tanhshrink        2.3384  1.1762  1.8262
softplus          1.0419  0.5643  0.4921
softsign          2.3375  1.1154  0.4767
softshrink        1.5444  1.2131  1.4718
hardshrink        1.0158  0.7979  1.0454
relu_squared      0.8165  1.1547  2.0000
================  ======  ======  ======

If b is 1, a gradient has the same length in all layers. If b is smaller, it shrinks by b in each
layer, whatever the initialisation: by b²⁰ in 20 layers of sigmoid. The first layer's input is data
and not the output of f: with inputs of unit variance its gain is 1.
"""

from __future__ import annotations

from .draw import DRIFT, init_for
from .propagation import Propagation, gain, propagation

__all__ = ["DRIFT", "Propagation", "gain", "init_for", "propagation"]
