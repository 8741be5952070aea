"""One training step on the digits: 64 -> 1024 -> 512 -> 10 as in the example, or smaller, with a
batch of 128, cross-entropy and SGD."""

from __future__ import annotations

from collections.abc import Callable

import torch

from custom_backprop import nn, optim

#: units of the two inner layers: as in the example, and so few that the calls take as long as the
#: arithmetic
HIDDEN = ((1024, 512), (256, 128))


def training_step(
    ours: bool, device: str = "cpu", hidden: tuple[int, int] = HIDDEN[0]
) -> Callable[[], None]:
    """Forward, loss, backward and update, with our layers, loss and optimizer, or with stock's,
    from the same seed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(128, 64, generator=generator).to(device)
    target = torch.randint(0, 10, (128,), generator=generator).to(device)
    torch.manual_seed(0)
    first, second = hidden
    if ours:
        model = torch.nn.Sequential(
            nn.LinearActivation(64, first),
            nn.LinearActivation(first, second),
            nn.Linear(second, 10),
        ).to(device)
        loss_function: torch.nn.Module = nn.CrossEntropyLoss()
    else:
        stock = torch.nn
        layers = (
            stock.Linear(64, first),
            stock.ReLU(),
            stock.Linear(first, second),
            stock.ReLU(),
            stock.Linear(second, 10),
        )
        model, loss_function = stock.Sequential(*layers).to(device), stock.CrossEntropyLoss()
    optimizer = (optim.SGD if ours else torch.optim.SGD)(model.parameters(), lr=0.05, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        loss_function(model(x), target).backward()
        optimizer.step()

    return step
