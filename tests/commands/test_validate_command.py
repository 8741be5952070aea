"""``custom-backprop validate``, as the author of some other project sees it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import custom_backprop
from custom_backprop.__main__ import main
from custom_backprop.cli import validate as command
from custom_backprop.testing import record

ROOT = str(Path(custom_backprop.__file__).parents[1])

CODE = '''
import os
import torch


class Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return dy * s * (1 + x * (1 - s))


class WrongInWideRows(Silu):
    @staticmethod
    def backward(ctx, dy):
        return Silu.backward(ctx, dy) * (1.01 if dy.shape[-1] > 2 else 1)


class WrongAtAHalf(Silu):
    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return Silu.backward(ctx, dy) * torch.where(x == 0.5, 1.01, 1.0)


def centred(x):
    return x - x.mean(0)


class Dies(Silu):
    @staticmethod
    def backward(ctx, dy):
        os._exit(9)


class Scale(torch.nn.Module):
    def __init__(self, size, by=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((size,), by))

    def forward(self, x):
        return Silu.apply(x) * self.weight


class Own(torch.autograd.Function):
    """Its forward is no plain torch: autograd sees nothing."""

    forward = staticmethod(lambda ctx, x: torch.from_numpy(x.detach().numpy() * 2))
    backward = staticmethod(lambda ctx, dy: dy * 2)


def scale():
    return Scale(4)


def samples():
    yield (torch.tensor([0.25, 1.5]),)
    yield (torch.tensor([0.5, 1.0]),)


def samples_by_name():
    return [{"x": x} for x, in samples()]


def by_name(x):
    return WrongAtAHalf.apply(x)


def nothing(x):
    raise ValueError("only on Sundays")


silu, number = Silu.apply, 3
'''
SILU = "torch.nn.functional.silu"


@pytest.fixture(autouse=True)
def project(tmp_path_factory, monkeypatch):
    """The working directory: a project with a module named ``mine``."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "mine.py").write_text(CODE)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return folder


@pytest.fixture
def here(monkeypatch):
    """Works in this process."""

    def serial(function, items, jobs, unit):
        return {item: function(*item) for item in items}

    monkeypatch.setattr(command, "in_processes", serial)


def printed_by(script: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(script, "script", "exec"), {})
    return out.getvalue()


def validate(*arguments, checks=("forward", "gradient")):
    named = [word for check in checks for word in ("--check", check)]
    return main(["validate", *arguments, *named])


@pytest.mark.parametrize(
    "target",
    [
        "mine:Silu",
        "mine:silu",
        "mine:Silu.apply",
        "torch.nn.functional.silu",
        "torch.ops.aten.silu",
    ],
)
def test_a_target_that_is_right(target, here, capsys):
    assert validate(target, "--inputs", "f32[2,3]", "--reference", SILU) == 0
    out = capsys.readouterr().out
    assert f"### `{target}`: right" in out
    assert "| right | forward, gradient |" in out
    assert f"torch {torch.__version__}" in out
    assert f"custom-backprop validate {target} --inputs 'f32[2,3]'" in out


@pytest.mark.parametrize("target", [["mine:scale"], ["mine:Scale", "--init", "4, by=2."]])
def test_a_module_is_made(target, here):
    assert validate(*target, "--inputs", "f32[2,4] requires_grad", "--reference", "own") == 0


def test_rows_are_a_batch(here, capsys):
    given = ["--inputs", "f32[5,3]", "--rows", "0"]
    assert validate("torch.sin", *given, checks=["batch_invariance"]) == 0
    assert validate("mine:centred", *given, checks=["batch_invariance"]) == 1
    assert "rows=(0,)" in capsys.readouterr().out


def test_what_is_not_offered_is_wrong_only_if_required(here, capsys):
    given = ["mine:Silu", "--inputs", "f32[2]", "--reference", "own"]
    checks = ("forward_mode", "gradgradcheck")
    assert validate(*given, checks=checks) == 0
    assert "| not offered | forward_mode |" in capsys.readouterr().out
    assert validate(*given, "--require", "gradgradcheck", checks=checks) == 0
    for wanted in ("forward_mode", "all"):
        assert validate(*given, "--require", wanted, checks=checks) == 1
    assert "required: forward_mode is not offered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "reference", "example"),
    [
        (["mine:WrongInWideRows", "--inputs", "f64[4,16] transposed offset 3"], SILU, "f64[1,3]"),
        (["mine:WrongAtAHalf", "--samples", "mine:samples"], SILU, ""),
        (["mine:by_name", "--samples", "mine:samples_by_name"], "own", ""),
    ],
)
def test_the_script_shows_what_is_wrong(given, reference, example, here, capsys):
    assert validate(*given, "--reference", reference, "--json", "found.json") == 1
    report = json.loads(Path("found.json").read_text())
    assert report["verdict"] == "wrong"
    forward, gradient = report["results"]
    assert (forward["status"], gradient["status"]) == ("right", "wrong")
    assert gradient["example"] == example
    assert len(gradient["script"].splitlines()) <= 10
    assert gradient["script"] in capsys.readouterr().out
    printed = printed_by(gradient["script"])
    assert "WRONG (1 wrong)" in printed
    assert "gradients differ" in printed


def test_the_reports_in_files(here):
    given = ["mine:WrongInWideRows", "--inputs", "f32[3]", "--elementwise", "--reference", SILU]
    assert validate(*given, "--html", "found.html", "--junit", "found.xml") == 1
    page = Path("found.html").read_text()
    assert "Same gradients as autograd gives for the reference" in page
    assert "derivative in bfloat16" in page
    assert page.count("<polyline") >= 12  # value and derivative in three dtypes, ours and theirs
    assert "http" not in page
    suite = ElementTree.parse("found.xml").getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert "gradients differ" in suite.find("testcase/failure").text


def test_recorded_calls(here):
    import mine

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), mine.Scale(4))
    with record(model) as seen:
        model(torch.randn(2, 3))
    seen.save("calls.json")
    assert validate("mine:Silu", "--recorded", "calls.json", "--reference", SILU) == 0
    with pytest.raises(SystemExit):
        validate("mine:Own", "--recorded", "calls.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine:Silu"], "what is it called with? Give --inputs, --samples or --recorded"),
        (["mine:Silu", "--inputs", "f32[2,x]"], "--inputs: expected a size, which is an integer\n"),
        (["mine:Silu", "--inputs", "i64[2]"], "needs a floating-point tensor"),
        (["mine:Silu", "--inputs", "f32[2]", "--check", "taste"], "invalid choice: 'taste'"),
        (["mine:Silu", "--inputs", "f32[2]", "--html", "/nowhere/a.html"], "--html /nowhere"),
        (["mine:Silu", "--recorded", "none.json"], "there is no such file"),
        (["mine:Silu", "--recorded", "mine.py"], "is not a recording"),
        (["mine:Gelu", "--inputs", "f32[2]"], "mine has no Gelu"),
        (["mine", "--inputs", "f32[2]"], "write pkg.module:callable"),
        (["mine:number", "--inputs", "f32[2]"], "of type int, cannot be called"),
        (["mine:Scale", "--inputs", "f32[2]"], "give its arguments: --init"),
        (["yours:Silu", "--inputs", "f32[2]"], "cannot import yours: ModuleNotFoundError"),
        (["mine:Silu", "--samples", "mine:nothing"], "--samples mine:nothing: ValueError"),
        (["mine:Silu", "--inputs", "f32[2]", "--import", "yours"], "--import yours: ModuleNot"),
        (["torch.ops.mine.silu", "--inputs", "f32[2]"], "torch.ops.mine has no silu"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, message, here, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["validate", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_requirement_that_is_not_checked(here, capsys):
    with pytest.raises(SystemExit):
        validate("mine:Silu", "--inputs", "f32[2]", "--require", "vmap")
    assert "--require vmap: it is not among --check forward gradient" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "reference", "reason"),
    [
        ("mine:nothing", SILU, "ValueError: only on Sundays"),
        ("mine:Own", "own", "its own forward is not plain torch"),
    ],
)
def test_nothing_could_run(target, reference, reason, here, capsys):
    assert validate(target, "--inputs", "f32[2]", "--reference", reference) == 2
    out = capsys.readouterr().out
    assert f"`{target}`: not run" in out
    assert out.count(reason) == 1


def test_code_that_kills_its_process_is_not_run(project):
    """The command itself, in processes."""
    arguments = ["mine:Dies", "--inputs", "f32[2]", "--reference", "own", "--jobs", "1"]
    arguments += ["--check", "forward"]
    done = subprocess.run(
        [sys.executable, "-m", "custom_backprop", "validate", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
        timeout=300,
    )
    assert "Traceback" not in done.stderr
    assert "| not run | forward | the process that worked on it died |" in done.stdout
    assert done.returncode == 2
