"""What a result was found with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, packages_distributions, version

import torch

from .. import __version__


def versions(*modules: str) -> dict[str, str]:
    """name -> version, of torch, triton, Python and this package; and of the packages that these
    modules belong to."""
    found = {"custom_backprop": __version__, "torch": torch.__version__}
    packages = {"triton"}
    owners = packages_distributions()
    for module in modules:
        packages.update(owners.get(module.partition(".")[0], ()))
    for package in sorted(packages):
        try:
            found.setdefault(package, version(package))
        except PackageNotFoundError:
            continue
    return {**found, "Python": platform.python_version()}


def device_name(device: str) -> str:
    """The machine in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU"
