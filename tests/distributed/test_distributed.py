"""Several real processes over gloo. What each rank checks is in distributed_checks.py."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import output_of, started

import custom_backprop

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)


#: written out, so that the test notices a check that is gone
CHECKS = {
    "training",
    "clipping",
    "accumulation",
    "checkpoint",
    "tensor_parallel",
    "placements",
    "in_place",
    "partial_sums_are_summed",
    "nan",
    "refusals",
    "triplets",
    "vocabulary_parallel",
    "confident_vocabulary_parallel",
    "edges_of_vocabulary_parallel",
    "second_derivatives_of_classes",
    "batch_norm_of_all_ranks",
    "batch_norm_of_all_ranks_without_parameters",
    "batch_norm_of_all_ranks_has_no_second_derivative",
    "dropout",
    "deferred_logits",
}


def test_two_and_four_ranks(tmp_path):
    with started(TESTS / "distributed_checks.py", tmp_path, 2, 4) as ranks:
        passed = re.findall(r"^ok (\d) check_(\w+)$", output_of(ranks), re.MULTILINE)
    assert set(passed) == {(n, name) for n in "24" for name in CHECKS} | {
        ("2", "ops_of_the_database")
    }


def test_killed_and_restarted(monkeypatch, tmp_path):
    """A rank dies while it writes the second checkpoint: the agent restarts all ranks, and they
    continue from the first one."""
    options = "--epochs", "1", "--interval", "4", "--device", "cpu"
    torchrun = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        "--max-restarts",
        1,
        "--monitor-interval",
        0.1,
    )
    with started(
        *torchrun, TESTS / "distributed_killed.py", "--out", tmp_path / "killed", *options
    ) as agent:
        one_process(monkeypatch, "--out", str(tmp_path / "alone"), *options)
        output = output_of(agent)
    assert "found step-000004 unfinished" in output
    assert not re.search("an interpreter ended beside.*gloo|terminate called", output)
    assert re.findall(r"^continuing after step (\d+)", output, re.MULTILINE) == ["4"]
    weights = [
        torch.load(tmp_path / name / "weights.pt", weights_only=True)
        for name in ("killed", "alone")
    ]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    for name in ("killed", "alone"):
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [
            "distributed.png",
            "weights.pt",
        ]


def test_an_interrupt_is_reported_in_one_line(example, monkeypatch, tmp_path, capsys):
    module, main = example("distributed")
    step, steps = module.Learner.step, []

    def interrupted(*args):
        if len(steps) % 2:
            steps.clear()
            raise KeyboardInterrupt
        return steps.append(1) or step(*args)

    monkeypatch.setattr(module.Learner, "step", interrupted)
    for interval, said in (
        (2, "no checkpoint is complete yet"),
        (1, f"the run is saved in {tmp_path / 'checkpoints' / 'step-000001'}"),
    ):
        try:
            with pytest.raises(SystemExit) as error:
                main("--epochs", 1, "--interval", interval)
        finally:
            dist.destroy_process_group()
        assert error.value.code == 130
        assert f"interrupted: {said}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit('why')", 1, "why\n"),
        ("sys.exit(130)", 130, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_a_rank_ends_as_its_program_does(program, code, said, example, monkeypatch, capfd):
    module, _ = example("distributed")
    ended = []
    monkeypatch.setattr(module.os, "_exit", ended.append)
    module.run(lambda: exec(program))
    assert ended == [code]
    assert capfd.readouterr().err.endswith(said)


def one_process(monkeypatch, *options):
    """The example in this process, without torchrun."""
    monkeypatch.syspath_prepend(TESTS.parents[1] / "examples")
    monkeypatch.setattr(sys, "argv", ["distributed", *options])
    threads = torch.get_num_threads()
    try:
        with custom_backprop.use_backend(None):
            importlib.import_module("distributed").main()
    finally:
        torch.set_num_threads(threads)
        for name in ("common", "digits", "distributed"):
            sys.modules.pop(name, None)
