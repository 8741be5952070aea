"""The command line, as a user sees it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import DEVICE

import custom_backprop
from custom_backprop.__main__ import main
from custom_backprop.cli import COMMANDS, check, kernels, work
from custom_backprop.testing import (
    CHECKS,
    Audit,
    AuditedLaunch,
    Report,
    Resources,
    Result,
    Traffic,
    database,
)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
ROOT = str(Path(custom_backprop.__file__).parents[1])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": ROOT}
    command = [sys.executable, "-m", "custom_backprop", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture
def planted(monkeypatch):
    """``planted(result)`` sets what every worker returns."""

    def plant(result):
        for command in (check, kernels):
            monkeypatch.setattr(
                command, "in_processes", lambda function, items, *_: dict.fromkeys(items, result)
            )

    return plant


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    assert "usage: custom-backprop" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["prove"], "invalid choice"),
        (["check", "rleu"], "no op or family rleu; there are the ops relu"),
        (["check", "relu", "--backend", "cuda"], "invalid choice: 'cuda'"),
        (["check", "relu", "--check", "taste"], "invalid choice: 'taste'"),
        (["check", "relu", "--jobs", "0"], "argument --jobs: 0 is less than 1"),
        (["kernels", "relu", "--jobs", "-1"], "argument --jobs: -1 is less than 1"),
        (
            ["check", "relu", "--json", "/nowhere/found.json"],
            "--json /nowhere/found.json: no file can be written there",
        ),
        (["kernels", "relu", "--json", "/nowhere/found.json"], "no file can be written there"),
        (["cost", "digits", "--json", "/nowhere/found.json"], "no file can be written there"),
        (["check", "relu", "--device", "meta"], "--device meta: the checks need values"),
        (["check", "relu", "--device", "abacus"], "no device 'abacus': "),
        (["kernels", "relu", "--target", "sm_90,sm_1"], "no target sm_1; there are sm_80"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (
        "torch",
        "triton on cuda",
        "inductor",
        "offline compiler",
        "primitives",
        "relu_squared",
    ):
        assert word in out


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (["silu", "relu"], ["relu", "silu"]),
        (["softmax"], ["softmax"]),
        (["linear", "prelu", "cross_entropy"], ["linear", "prelu", "cross_entropy"]),
        (["contrastive", "mse_loss"], ["triplet_margin_loss", "info_nce", "mse_loss"]),
        (["activation"], [s.name for s in database().values() if s.family == "activation"]),
        ([], list(database())),
    ],
)
def test_a_name_selects_one_op_and_a_family_all_of_its_ops(wanted, chosen):
    assert sorted(work.select(wanted)) == sorted(chosen)
    assert set(chosen) <= database().keys()


@pytest.mark.parametrize("command", ["check", pytest.param("kernels", marks=needs_triton)])
def test_the_commands_share_the_selection(command, monkeypatch, capsys):
    worked = []
    monkeypatch.setattr(
        {"check": check, "kernels": kernels}[command],
        "in_processes",
        lambda function, items, *_: worked.extend(items) or {},
    )
    main([command, "softmax"])
    assert {item[0] for item in worked} == {"softmax"}
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "an op; or a family, for all its ops, unless an op has its name" in " ".join(
        capsys.readouterr().out.split()
    )


def test_check_end_to_end(tmp_path):
    done = run(
        "check",
        "relu",
        "--check",
        "forward",
        "--check",
        "precision",
        "--device",
        DEVICE,
        "--json",
        str(tmp_path / "f.json"),
    )
    assert done.returncode == 0, done.stderr
    assert "y = max(x, 0);  dx = dy [y > 0]" in done.stdout
    assert "3 passed, 0 failed: 1 ops on aten, formula, triton" in done.stdout
    reports = json.loads((tmp_path / "f.json").read_text())
    assert [(r["op"], r["backend"], r["verdict"]) for r in reports] == [
        ("relu", b, "right") for b in ("aten", "formula", "triton")
    ]


@pytest.mark.parametrize(
    "planted_result",
    [Report("relu", [Result("forward", "wrong", "off by 7")]), ValueError("off by 7")],
)
def test_a_failed_check_exits_with_1(planted_result, planted, capsys):
    planted(planted_result)
    assert main(["check", "relu", "--backend", "aten"]) == 1
    out = capsys.readouterr().out
    assert "FAIL relu [aten]" in out
    assert "off by 7" in out
    assert "0 passed, 1 failed" in out


def test_a_row_has_a_mark_under_each_check():
    report = Report("relu", [Result(c, "right") for c in CHECKS], {"float32": (1e-8, 2e-8)})
    report.results[3] = Result(list(CHECKS)[3], "n/a")
    lines = check._rows({"relu": report}, list(CHECKS)).splitlines()
    row = lines[-1]
    for line, name, mark in zip(
        lines, CHECKS, ["ok", "ok", "ok", "- ", *["ok"] * len(CHECKS)], strict=False
    ):
        at = line.index(name)
        assert row[at : at + 2] == mark
    assert "1e-08 / 2e-08" in row


@needs_triton
def test_kernels_end_to_end(tmp_path):
    done = run("kernels", "relu", "--target", "sm_90", "--json", str(tmp_path / "f.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "f.json").read_text())
    assert {r["kernel"].rpartition(".")[2].strip("_") for r in found} == {"forward", "backward"}
    assert all(r["wide_loads"] == r["loads"] > 0 and r["registers"] for r in found)


@needs_triton
def test_audit_end_to_end(tmp_path):
    done = run("kernels", "relu", "--audit", "--json", str(tmp_path / "f.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "f.json").read_text())
    assert all(r["moved"] == r["floor"] > 0 for r in found)
    assert max(r["programs"] for r in found) > 1


@needs_triton
def test_traffic_end_to_end(tmp_path):
    done = run("kernels", "relu", "--traffic", "--json", str(tmp_path / "f.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "f.json").read_text())
    assert [r["direction"] for r in found] == ["forward", "backward"]
    assert all(r["moved"] == r["floor"] > 0 for r in found)


SPILLED = Resources("activation._forward", "sm_90", "*fp32", "F=relu", 4, 255, 8, 0, 2, 1, 1, 1, 0)


@needs_triton
def test_a_spill_exits_with_1(planted, capsys):
    planted([SPILLED])
    assert main(["kernels", "relu", "--target", "sm_90"]) == 1
    kernel = "activation._forward (*fp32; F=relu) on sm_90"
    assert f"FAULT relu: {kernel}: 8 bytes of local memory per thread" in capsys.readouterr().out


@needs_triton
def test_a_fault_of_the_audit_exits_with_1(planted, capsys):
    planted(
        Audit(
            [
                AuditedLaunch(
                    "activation._forward", 1, 8, 8, {"X": 2.0}, ["1 loads outside every tensor"]
                )
            ]
        )
    )
    assert main(["kernels", "relu", "--audit"]) == 1
    out = capsys.readouterr().out
    assert "FAULT relu: activation._forward: 1 loads outside every tensor" in out
    assert "X x2.0" in out


@needs_triton
def test_too_much_traffic_exits_with_1(planted, capsys):
    planted([Traffic("relu", "forward", 16, 8, 0), Traffic("relu", "backward", 12, 12, 0)])
    assert main(["kernels", "relu", "--traffic"]) == 1
    out = capsys.readouterr().out
    assert "FAULT relu: forward: moved 2.00 times as many bytes as it must" in out
    assert "2 directions of 1 ops, 1 faults" in out


@needs_triton
def test_a_result_that_the_audit_finds_wrong_exits_with_1(planted, capsys):
    launch = AuditedLaunch("activation._forward", 1, 8, 8)
    planted(Audit([launch], ["relu (awkward): output 0 is off the formula's by 3"]))
    assert main(["kernels", "relu", "--audit"]) == 1
    assert "FAULT relu (awkward): output 0 is off" in capsys.readouterr().out


@needs_triton
def test_a_kernel_that_does_not_compile_exits_with_1(planted, capsys):
    planted(RuntimeError("no such instruction"))
    assert main(["kernels", "relu", "--target", "sm_90"]) == 1
    assert "FAULT relu on sm_90: RuntimeError: no such instruction" in capsys.readouterr().out


def test_the_interpreter_is_chosen_for_new_processes_only(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with work.interpreter(True):
        assert os.environ["TRITON_INTERPRET"] == "1"
    assert "TRITON_INTERPRET" not in os.environ


INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
from custom_backprop.__main__ import main
sys.exit(main(["check", "relu", "linear", "cross_entropy", "--backend", "aten", "--jobs", "1"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_an_interrupt_ends_the_workers_and_prints_what_is_done(tmp_path):
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTIBLE],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": ROOT},
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    try:
        deadline = time.monotonic() + 120
        one = len(CHECKS)
        while not any(int(n) > one for n in re.findall(rf"(\d+)/{3 * one}", errors.read_text())):
            # by the progress bar, one op is done and the next began
            assert process.poll() is None, errors.read_text()
            assert time.monotonic() < deadline, errors.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors.read_text()
    assert "interrupted" in errors.read_text()
    assert "Traceback" not in errors.read_text()
    assert re.search(r"^relu  +ok", out, re.MULTILINE)
    assert re.search(r"^interrupted after [12] of 3$", out, re.MULTILINE)


def dies_or_answers(name, marks):
    """Work for a process, which creates a file in ``marks`` when it begins."""
    Path(marks, f"{name}-{os.getpid()}").touch()
    if name == "dies":
        os._exit(9)
    return name


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_process_that_dies_fails_only_its_own_op(jobs, tmp_path):
    names = ["a", "b", "dies", "c", "d", "e"]
    found = work.in_processes(dies_or_answers, [(n, str(tmp_path)) for n in names], jobs)
    assert [n for n, _ in found] == names
    for (name, _), result in found.items():
        if name == "dies":
            assert isinstance(result, RuntimeError)
            assert "died" in str(result)
        else:
            assert result == name


@pytest.mark.parametrize("command", ["check", pytest.param("kernels", marks=needs_triton)])
def test_an_op_without_a_result_was_interrupted(command, monkeypatch, capsys):
    monkeypatch.setattr(
        {"check": check, "kernels": kernels}[command],
        "in_processes",
        lambda function, items, *_: {},
    )
    assert main([command, "relu"]) == 130
    assert "interrupted after 0 of" in capsys.readouterr().out


def test_nothing_checked_exits_with_1(planted, capsys):
    planted(Report("relu", [Result("sweep", "n/a", "not elementwise")]))
    assert main(["check", "relu", "--backend", "aten"]) == 1
    assert "nothing was checked" in capsys.readouterr().out


@needs_triton
@pytest.mark.parametrize(
    ("arguments", "nothing", "fault"),
    [
        (["--target", "sm_90"], [], "FAULT relu on sm_90: no kernel was launched"),
        (["--audit"], Audit(), "FAULT relu: no kernel was launched"),
        (["--traffic"], [], "FAULT relu: no kernel was launched"),
    ],
)
def test_no_launch_exits_with_1(arguments, nothing, fault, planted, capsys):
    planted(nothing)
    assert main(["kernels", "relu", *arguments]) == 1
    assert fault in capsys.readouterr().out


def test_a_check_that_was_not_run_says_so_in_its_row(planted, capsys):
    planted(Report("relu", [Result("compile", "not run", "Inductor"), Result("forward", "right")]))
    assert main(["check", "relu", "--backend", "aten"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("relu"))
    assert "~" in row
    assert "compile not run: Inductor" in row
