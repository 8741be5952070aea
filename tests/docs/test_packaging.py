"""What is installed, and under which names: another project owns the import name
``triton_kernels``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("custom_backprop", "triton_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")

USES_A_KERNEL = """
import sys
import torch, custom_backprop
from custom_backprop.backends.kernels import kernels
assert "custom_backprop.triton_kernels" not in sys.modules, "the kernels are imported at the first use"
with custom_backprop.use_backend("triton"):
    y = custom_backprop.functional.relu(torch.tensor([-1.0, 2.0]))
assert y.tolist() == [0.0, 2.0]
assert "triton_kernels" not in sys.modules
print(kernels("launch").__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, source / part)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture
def stranger(tmp_path) -> Path:
    """A folder with a package of the other project's name, which must never be met."""
    package = tmp_path / "stranger" / "triton_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the wrong triton_kernels')")
    return package.parent


def kernel_file(stranger: Path, root: Path) -> Path:
    """Where the kernels come from in a fresh interpreter that has ``root`` on its path, behind a
    package of the other project's name."""
    path = os.pathsep.join([str(stranger), str(root)])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "error", "-c", USES_A_KERNEL]
    done = subprocess.run(
        command, env=environment, cwd=stranger, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def test_wheel_holds_one_top_level_module(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {n.split("/")[0] for n in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"custom_backprop"}
    kernels = {p.name for p in (ROOT / "triton_kernels").glob("*.py")}
    assert {f"custom_backprop/triton_kernels/{k}" for k in kernels} <= set(names)
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "custom_backprop").rglob("*.py")}
    assert modules <= set(names)
    assert "custom_backprop/py.typed" in names
    assert any(n.endswith("/LICENSE") for n in names)


def test_wheel_states_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    required = [
        line
        for line in archive.read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert sorted(line.split(": ")[1] for line in required) == [
        "numpy",
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
    ]


def test_the_wheel_finds_its_own_kernels(wheel, stranger, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert kernel_file(stranger, site) == site / "custom_backprop" / "triton_kernels" / "launch.py"


def test_a_bare_checkout_finds_its_own_kernels(stranger):
    assert kernel_file(stranger, ROOT) == ROOT / "triton_kernels" / "launch.py"


def test_import_needs_no_triton():
    blocked = (
        "import sys; sys.modules['triton'] = None; import torch, custom_backprop; "
        "print(custom_backprop.functional.relu(torch.ones(1)).item())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT)
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", blocked],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "1.0\n", done.stderr
