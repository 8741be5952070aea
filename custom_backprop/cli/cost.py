"""Counts the cost of one forward and one backward of a model, layer by layer, with torch's layers
and with ours."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..cost import cost
from ..cost.report import LEGEND
from .work import check_device, check_file, count, refuse

RETURNS = "(model, inputs), (model, inputs, loss) or (model, inputs, loss, *targets)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    parser.description = f"{__doc__} {LEGEND}."
    what = f"a callable that returns {RETURNS}"
    parser.add_argument(
        "model", metavar="MODEL", help=f"{', '.join(EXAMPLES)}, or package.module:callable, {what}"
    )
    parser.add_argument(
        "--batch",
        type=count,
        metavar="N",
        help="passed to the callable as batch=N; default: its own",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="meta: without computing; default: %(default)s",
    )
    parser.add_argument("--json", metavar="F", help="also write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Returns 0."""
    check_file(args.json)
    check_device(args.device)
    build = EXAMPLES[args.model] if args.model in EXAMPLES else _found(args.model)
    arguments = {"batch": args.batch} if args.batch else {}
    try:
        inspect.signature(build).bind(**arguments)
    except (TypeError, ValueError) as error:  # ValueError: a builtin has no signature
        refuse(f"cannot call {args.model}: {error}")
    with torch.device(args.device):  # created there: on meta, even a model larger than the memory
        built = build(**arguments)
    if not (isinstance(built, tuple) and len(built) >= 2 and isinstance(built[0], nn.Module)):
        refuse(f"{args.model} must return {RETURNS}")
    model, inputs, loss, *targets = (*built, None)[: max(3, len(built))]
    for module in (model, loss):
        if isinstance(module, nn.Module):
            module.to(args.device)
    inputs, targets = tree_map_only(Tensor, lambda t: t.to(args.device), (inputs, targets))
    inputs = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    try:
        report = cost(model, *inputs, loss=loss, targets=targets, name=args.model)
    except ValueError as error:
        refuse(f"{args.model}: {error}")
    print(report)
    if args.json:
        Path(args.json).write_text(report.to_json(indent=1) + "\n")
        print(f"wrote {args.json}")
    return 0


def _found(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        refuse(
            f"no example {name!r}; there are {', '.join(EXAMPLES)}, or give package.module:callable"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        refuse(f"cannot import {module}: {error}")
    except AttributeError:
        refuse(f"{module} has no {attribute!r}")
    if not callable(found):
        refuse(f"{name} is not callable")
    return found


def digits(batch: int = 32) -> tuple[Any, ...]:
    """The network of examples/digits.py, with 256 and 128 units."""
    layers = (nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    return (
        nn.Sequential(*layers),
        torch.rand(batch, 64),
        nn.CrossEntropyLoss(),
        torch.randint(10, (batch,)),
    )


def linear_regression(batch: int = 100) -> tuple[Any, ...]:
    """The model of examples/linear_regression.py."""
    return nn.Linear(1, 1), torch.rand(batch, 1), nn.MSELoss(), torch.rand(batch, 1)


def autoencoder(batch: int = 64) -> tuple[Any, ...]:
    """The nonlinear autoencoder of examples/autoencoder.py, with a code of 2 numbers."""
    inner, outer = (
        (nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)),
        (nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64)),
    )
    return nn.Sequential(*inner, *outer), (x := torch.rand(batch, 64)), nn.MSELoss(), x


def vanishing_gradients(batch: int = 64) -> tuple[Any, ...]:
    """The twenty sigmoid layers of examples/vanishing_gradients.py."""
    layers = [layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.Sigmoid())]
    return (
        nn.Sequential(*layers, nn.Linear(64, 10)),
        torch.rand(batch, 64),
        nn.CrossEntropyLoss(),
        torch.randint(10, (batch,)),
    )


def transformer(batch: int = 8) -> tuple[Any, ...]:
    """An encoder layer: sequences of 128 tokens, 64 features, 4 heads."""
    return nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True), torch.rand(
        batch, 128, 64
    )


EXAMPLES: dict[str, Callable[..., tuple[Any, ...]]] = {
    f.__name__: f
    for f in (digits, linear_regression, autoencoder, vanishing_gradients, transformer)
}
