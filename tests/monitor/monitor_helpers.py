"""Networks, and short runs of training, for the tests of ``custom_backprop.monitor``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from custom_backprop.monitor import GradientMonitor


def network(activation=nn.ReLU, depth=3, width=16, normalise=None):
    layers = []
    for _ in range(depth):
        layers += [
            nn.Linear(width, width),
            *([normalise(width)] if normalise else []),
            activation(),
        ]
    return nn.Sequential(*layers, nn.Linear(width, 5))


def batch(n=33, width=16):
    return torch.randn(n, width), torch.randint(0, 5, (n,))


def train(model, monitor=None, steps=3, rate=0.05, loss=None, optimizer=None):
    """Takes some steps on one batch. Returns the readings."""
    x, y = batch()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), rate)
    readings = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(x)
        (loss(output) if loss else cross_entropy(output, y)).backward()
        if monitor is not None:
            readings.append(monitor.step())
        optimizer.step()
    return readings


def watched(model, steps=3, **options):
    with GradientMonitor(model, every=1) as monitor:
        return train(model, monitor, steps, **options)[-1]


def hooks_of(model):
    return [
        h
        for m in model.modules()
        for h in (*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks)
    ]


def kinds(verdicts):
    return [(v.kind, v.layer) for v in verdicts]
