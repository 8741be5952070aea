"""The communication model of docs/scaling.md against calculations by hand."""

from __future__ import annotations

import json
import math

import pytest
from helpers import python

from benchmarks import scaling_ranks as ranks

SIZES = ranks.FITTED


@pytest.mark.parametrize("turns", [1, 2])
def test_the_fit_finds_latency_and_bandwidth(turns):
    link = ranks.fit({size: turns * (2e-5 + size / 2 / 3e9) for size in SIZES}, turns)
    assert link.latency == pytest.approx(2e-5)
    assert link.bandwidth == pytest.approx(3e9)


@pytest.mark.parametrize(
    "times", [{s: 1e-4 * (1 - s / 1e8) for s in SIZES}, {s: 1e-9 * s - 1e-7 for s in SIZES}]
)
def test_latency_and_bandwidth_are_not_negative(times):
    link = ranks.fit(times, 1)
    assert link.latency >= 0
    assert link.bandwidth > 0


def test_collectives_of_a_ring_and_a_tree():
    link = ranks.Link(1e-5, 1e9)
    assert link.pass_on(4e6, 4) == pytest.approx(3 * (1e-5 + 1e-3))
    assert link.all_reduce(4e6, 4) == pytest.approx(2 * link.pass_on(4e6, 4))
    assert link.all_reduce(8.0, 1024) == pytest.approx(
        2 * 10 * 1e-5 + 16 / 1e9
    )  # a tree: 10 rounds down and 10 up instead of 2046
    assert link.all_reduce(4e6, 1) == 0


def test_processes_share_the_cores_that_copy(monkeypatch):
    monkeypatch.setattr(ranks.os, "cpu_count", lambda: 2)
    links = dict.fromkeys(("all_reduce", "all_gather"), ranks.Link(1e-5, 1e9))
    assert ranks.collective("all_gather", links, 4e6, 2) == links["all_gather"].pass_on(4e6, 2)
    assert ranks.collective("all_reduce", links, 4e6, 4) == 2 * links["all_reduce"].all_reduce(
        4e6, 4
    )


def test_what_a_step_sends():
    """DDP sends every gradient once, FSDP2 every layer three times, tensor parallelism the
    activations between layers."""
    link = ranks.Link(0.0, 1.0)  # so that seconds equal the bytes that pass one link
    links = dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter"), link)
    parameters = 4 * ranks.LAYERS * ranks.WIDTH * (ranks.WIDTH + 1)
    assert ranks.communication("ddp", links, 2) == pytest.approx(parameters)
    assert ranks.communication("fsdp2", links, 2) == pytest.approx(1.5 * parameters)
    assert ranks.communication("tensor", links, 2) == pytest.approx(
        (ranks.LAYERS - 1) * 4 * ranks.ROWS * ranks.WIDTH
    )


MEASURES = """
import sys
from torch.multiprocessing import start_processes
from benchmarks import scaling_ranks as ranks
ranks.FITTED, ranks.CHECKED, ranks.ROWS, ranks.ALL_TURNS = (64,), (128,), 8, 0
ranks.TURN = 1e-4
start_processes(ranks.measure, (2, sys.argv[1]), nprocs=2, start_method="fork")
"""


def test_two_processes_measure_each_collective_and_each_strategy(tmp_path):
    python(MEASURES.replace("sys.argv[1]", repr(str(tmp_path))))
    found = json.loads((tmp_path / "2.json").read_text())
    names = {"all_reduce", "all_gather", "reduce_scatter"}
    assert {size: set(times) for size, times in found["collectives"].items()} == {
        "64": names,
        "128": names,
    }
    for times in (*found["collectives"].values(), found["compute"], found["step"]):
        assert all(0 < t < 60 for t in times.values())
    assert found["step"].keys() == found["compute"].keys() == {"ddp", "fsdp2", "tensor"}


def test_the_table_of_many_gpus_has_a_row_for_each_size():
    rows = ranks.table().splitlines()[2:]
    assert [int(row.split("|")[1]) for row in rows] == [8, 32, 128, 512, 1024]
    assert all("nan" not in row and "inf" not in row for row in rows)
    assert math.isfinite(ranks.Link(5e-6, 350e9).all_reduce(14e9, 8))
