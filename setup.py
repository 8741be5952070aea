"""Packaging. Everything but the list of packages stands in pyproject.toml.

The folder `triton_kernels/` stands at the top level of the repository. A wheel holds it as
`custom_backprop.triton_kernels`: the import name `triton_kernels` belongs to another project, and
two owners of one top-level name break each other.

An editable install moves nothing. It adds one plain path, the checkout, which type checkers and
editors read as well as the interpreter does; `custom_backprop/backends/kernels.py` finds the
kernels there.
"""

import sys

from setuptools import find_packages, setup

KERNELS = "custom_backprop.triton_kernels"

packages = find_packages(include=["custom_backprop", "custom_backprop.*"])
package_dir = {"": "."}  # alone, it makes setuptools write the path into a .pth file
if "editable_wheel" not in sys.argv:
    packages.append(KERNELS)
    package_dir[KERNELS] = "triton_kernels"

setup(packages=packages, package_dir=package_dir)
