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
import torch

ROOT = Path(__file__).parents[2]
PARTS = ("custom_backprop", "triton_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")

USES_A_KERNEL = """
import sys
import torch, custom_backprop
from custom_backprop.backends.kernels import kernels
assert "custom_backprop.triton_kernels" not in sys.modules, "imported before the first use"
with custom_backprop.use_backend("triton"):
    y = custom_backprop.functional.relu(torch.tensor([-1.0, 2.0]))
assert y.tolist() == [0.0, 2.0]
assert "triton_kernels" not in sys.modules
print(kernels("launch").__file__)
"""


#: what ``pip install`` runs, with and without ``-e``, by this environment's setuptools: no network
BUILDS = "import sys, setuptools.build_meta as s; getattr(s, sys.argv[1])(sys.argv[2])"


def output_of(command, **options) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy, since a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("source")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)
    return folder


def built(hook: str, source: Path, out: Path) -> Path:
    output_of([sys.executable, "-c", BUILDS, hook, out], cwd=source)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return built("build_wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def editable(source, tmp_path_factory) -> Path:
    """The interpreter of a fresh environment with an editable install and nothing else."""
    wheel = built("build_editable", source, tmp_path_factory.mktemp("editable"))
    folder = tmp_path_factory.mktemp("environment")
    output_of([sys.executable, "-m", "venv", "--without-pip", folder])
    (site,) = folder.glob("lib/*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    return folder / "bin" / "python"


@pytest.fixture
def stranger(tmp_path) -> Path:
    """A folder with a package of the other project's name, which must never be imported."""
    package = tmp_path / "stranger" / "triton_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the wrong triton_kernels')")
    return package.parent


def kernel_file(stranger: Path, root: Path, python: Path | str = sys.executable) -> Path:
    """The file that the kernels are imported from in a fresh interpreter. Its path has ``root``,
    after a package of the other project's name."""
    path = os.pathsep.join([str(stranger), str(root)])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    command = [python, "-W", "error", "-c", USES_A_KERNEL]
    return Path(output_of(command, env=environment, cwd=stranger).strip())


def test_wheel_has_one_top_level_module(wheel):
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


def test_an_editable_install_finds_its_own_kernels(editable, source, stranger):
    torchs = Path(torch.__file__).parents[1]
    assert kernel_file(stranger, torchs, editable) == source / "triton_kernels" / "launch.py"


def test_an_editable_install_is_one_plain_path(editable, source):
    """Type checkers and editors do not run import hooks. They only read lines that are paths."""
    (file,) = editable.parents[1].glob("lib/*/site-packages/*.pth")
    assert file.read_text().split("\n") == [str(source), ""]
    assert (source / "custom_backprop" / "py.typed").exists()


def test_mypy_sees_the_types_of_an_editable_install(editable, tmp_path):
    pytest.importorskip("mypy", reason="mypy is in the extra 'dev'")
    code = "import custom_backprop; reveal_type(custom_backprop.convert)"
    command = [sys.executable, "-m", "mypy", "--python-executable", editable, "-c", code]
    out = output_of([*command, "--cache-dir", tmp_path / "cache"], cwd=tmp_path)
    assert 'Revealed type is "def [Model' in out


def test_import_needs_no_triton():
    blocked = (
        "import sys; sys.modules['triton'] = None; import torch, custom_backprop; "
        "print(custom_backprop.functional.relu(torch.ones(1)).item())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT)
    }
    assert output_of([sys.executable, "-W", "error", "-c", blocked], env=environment) == "1.0\n"
