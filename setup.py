"""Packaging. Everything but the package list stands in pyproject.toml.

The folder `triton_kernels/` stands at the top level of the repository, but is installed as
`custom_backprop.triton_kernels`: the import name `triton_kernels` belongs to another project, and
two owners of one top-level name break each other.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["custom_backprop", "custom_backprop.*"]),
        "custom_backprop.triton_kernels",
    ],
    package_dir={"custom_backprop.triton_kernels": "triton_kernels"},
)
