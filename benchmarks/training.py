"""One training step of a digits-sized network: 64 -> 256 -> 128 -> 10, batch 128, cross-entropy, SGD."""

from __future__ import annotations

from collections.abc import Callable

import torch

from custom_backprop import nn, optim


def training_step(ours: bool, device: str = "cpu") -> Callable[[], None]:
    """Forward, loss, backward and update, with our layers, loss and optimizer or stock's, from one seed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(128, 64, generator=generator).to(device)
    target = torch.randint(0, 10, (128,), generator=generator).to(device)
    torch.manual_seed(0)
    if ours:
        model = torch.nn.Sequential(nn.LinearActivation(64, 256), nn.LinearActivation(256, 128), nn.Linear(128, 10)).to(device)
        loss_function: torch.nn.Module = nn.CrossEntropyLoss()
    else:
        stock = torch.nn
        layers = (stock.Linear(64, 256), stock.ReLU(), stock.Linear(256, 128), stock.ReLU(), stock.Linear(128, 10))
        model, loss_function = stock.Sequential(*layers).to(device), stock.CrossEntropyLoss()
    optimizer = (optim.SGD if ours else torch.optim.SGD)(model.parameters(), lr=0.05, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        loss_function(model(x), target).backward()
        optimizer.step()

    return step
