"""``python -m benchmarks.gpu``, without a GPU: the dry run, and a store that survives."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_is_a_picture

from custom_backprop.testing import Make, database

sys.path.append(str(Path(__file__).parents[2]))  # the benchmarks are not installed
pytest.importorskip("matplotlib")
main_ = importlib.import_module("benchmarks.gpu.__main__")
ahead_, case_, device_, figures, graphs, page_, peers_, results, run_, sweep = (
    importlib.import_module(f"benchmarks.gpu.{name}")
    for name in (
        "ahead",
        "case",
        "device",
        "figures",
        "graphs",
        "page",
        "peers",
        "results",
        "run",
        "sweep",
    )
)
Row, Store, Case = results.Row, results.Store, case_.Case


@pytest.fixture
def dry(tmp_path, monkeypatch):
    """The dry run with options: its exit code, the rows and the page. No peer is installed."""
    if torch.cuda.is_available():
        pytest.skip("the kernels were decorated for the GPU that is here")
    monkeypatch.setattr(peers_, "version", _not_installed)

    def main(*options):
        code = main_.main(["--dry-run", "--out", str(tmp_path), *options])
        rows = results.read(tmp_path / "gpu-dry-run.json")[1]
        return code, rows, (tmp_path / "gpu-dry-run.md").read_text()

    return main


def _not_installed(name):
    raise peers_.PackageNotFoundError(name)


def test_a_dry_run_walks_through_every_section(dry, tmp_path, monkeypatch):
    with monkeypatch.context() as without_pictures:
        without_pictures.setattr(figures, "draw", lambda *_: [])
        assert dry("cross_entropy", "--sections", "sweep")[0] == 0
    code, rows, page = dry("relu")
    assert code == 0
    assert {row.section for row in rows} == {
        "ceilings", "peers", "sweep", "host", "steps", "graphs", "database",
    }  # fmt: skip
    assert {row.status for row in rows if row.section != "peers"} == {"ok"}
    sweeps = {(r.op, r.direction, r.dtype, r.n): r for r in rows if r.who == "ours" and r.tbps}
    assert len(sweeps) == 2 * 3 + 2 * 2 * 2, "a loss has no backward alone"
    relu = sweeps["relu", "backward", "float32", None]
    assert relu.bytes == 3 * 4 * 64 * 64
    assert relu.fraction == pytest.approx(relu.bytes / relu.seconds / _copied(rows))
    whos = {(row.op, row.who) for row in rows if row.section == "sweep"}
    assert whos == {
        (op, who) for op in ("relu", "cross_entropy") for who in ("ours", "stock", "compiled")
    }
    models = {(r.op, r.who) for r in rows if r.section == "steps"}
    assert models == {(m, w) for m in ("gpt", "vit-b") for w in ("ours", "stock", "compiled")}
    assert "quack-kernels: not installed (1)" in page
    for name in ("-lengths", "-roofline"):
        assert_is_a_picture(tmp_path / f"gpu-dry-run{name}.png")
    assert "![gpu-dry-run](gpu-dry-run.png)" in page


def _copied(rows):
    (copy,) = [row for row in rows if row.op == "copy"]
    return copy.bytes / copy.seconds


def test_a_case_that_fails_is_reported(dry, monkeypatch, capsys):
    with monkeypatch.context() as planted:
        planted.setattr(graphs, "_same", lambda first, other: False)
        code, rows, page = dry("relu", "--sections", "graphs")
    assert code == 1
    assert [row.op for row in rows if row.status == "failed"] == ["relu", "relu"]
    said = "other bits: a second call, a replay, a second replay"
    assert said in page
    assert said in capsys.readouterr().err
    assert dry("relu", "--sections", "graphs")[0] == 1, "it is done, and failed"
    assert dry("relu", "--sections", "graphs", "--again")[0] == 0


def test_nothing_holds_the_graph_of_an_earlier_call_while_one_is_recorded(dry, monkeypatch):
    """It would have nodes of another stream, which a recorded backward would wait for."""
    both, held = case_.Inputs.both, []

    def node(leaf):
        return leaf.view_as(leaf).grad_fn.next_functions[0][0]  # is made anew, unless it is alive

    def marked(given, function):
        results = both(given, function)
        for leaf in given.leaves:
            node(leaf).metadata["earlier"] = True
        return results

    def captured(device, call):
        given = call.func.__self__
        held.extend("earlier" in node(leaf).metadata for leaf in given.leaves)
        return call

    monkeypatch.setattr(case_.Inputs, "both", marked)
    monkeypatch.setattr(device_.DryRun, "captured", captured)
    assert dry("layer_norm", "--sections", "graphs")[0] == 0
    assert held == [False] * 6


def test_what_is_not_timed_runs_ahead_in_processes(dry, monkeypatch):
    def init(device, before=device_.DryRun.__init__):
        before(device)
        device.workers = 2

    def alone(plan, shares, store, *rest, run=main_.run):
        done.append(store.done())
        run(plan, shares, store, *rest)

    done = []
    monkeypatch.setattr(device_.DryRun, "__init__", init)
    monkeypatch.setattr(main_, "run", alone)
    code, rows, _ = dry("relu", "--sections", "graphs", "database", "host")
    assert code == 0
    _, ahead = done
    not_timed = {"database/relu", "graphs/relu/bfloat16", "graphs/relu/float32"}
    assert {key for key in ahead if "relu" in key} == not_timed
    assert {row.case for row in rows if row.op == "relu"} == {*not_timed, "host/relu/float32"}


def test_sections_go_ahead_at_the_same_pace():
    def cases(section, count, **options):
        return [Case(Row(section, f"{i}"), list, **options) for i in range(count)]

    plan = {
        "sweep": cases("sweep", 4, first=list),
        "host": cases("host", 3),
        "graphs": cases("graphs", 3, timed=False),
    }
    assert ahead_.in_turns(plan, {"graphs/0"}) == [
        "sweep/0", "graphs/1", "sweep/1", "sweep/2", "graphs/2", "sweep/3",
    ]  # fmt: skip


@pytest.mark.parametrize("spec", database().values(), ids=str)
def test_each_op_has_a_call_of_each_length(spec):
    card = device_.Card
    for n in card.lengths if spec.by_length else (None,):
        rows = n and 2**26 // n
        sample = case_.sample_of(spec, Make("meta", torch.bfloat16), rows, n, "huge")
        tensors = [a for a in sample.args if isinstance(a, torch.Tensor)]
        assert any(n in t.shape for t in tensors) or n is None
        most = max(t.numel() for t in tensors)
        assert most == 2**26 or n is None, "the card's memory holds it"


@pytest.fixture
def run(tmp_path):
    """Runs cases "a" to "e", with what each does; again from the file. Returns the keys that ran,
    and the store."""

    def go(until=float("inf"), machine="x", **does):
        ran = []

        def work(name):
            ran.append(name)
            return does.get(name, lambda: [Row("sweep", name)])()

        cases = [Case(Row("sweep", name), lambda name=name: work(name)) for name in "abcde"]
        store = Store(tmp_path / "gpu-x.json", {"card": machine}, "command")
        try:
            run_.run({"sweep": cases}, {}, store, device_.DryRun(), until)
        except KeyboardInterrupt:
            ran.append("interrupted")
        return "".join(ran), store

    return go


def _raise(error):
    raise error


def test_an_interrupted_run_goes_on(run):
    ran, store = run(c=lambda: _raise(KeyboardInterrupt()))
    assert ran == "abcinterrupted"
    assert store.left == ["sweep/c", "sweep/d", "sweep/e"]
    ran, store = run()
    assert ran == "cde"
    assert [row.op for row in store.rows] == [*"abcde"]
    assert not store.left
    assert run(machine="another")[0] == "abcde", "their figures are not to stand in one file"


def test_sigterm_interrupts(run):
    with main_._terminated_as_interrupted():
        ran, store = run(b=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert ran == "abinterrupted"
    assert [row.op for row in store.rows] == ["a"]


def test_the_file_is_whole_whatever_ends_the_process(run, monkeypatch, tmp_path):
    before = os.replace

    def killed(new, file):
        if "sweep/c" in Path(new).read_text().replace(os.sep, "/").split('"rows"')[1]:
            raise KeyboardInterrupt
        before(new, file)

    monkeypatch.setattr(os, "replace", killed)
    assert run()[0] == "abcinterrupted"
    monkeypatch.undo()
    kept = json.loads((tmp_path / "gpu-x.json").read_text())
    assert [row["op"] for row in kept["rows"]] == ["a", "b"]
    assert kept["left"] == ["sweep/c", "sweep/d", "sweep/e"]
    assert run()[0] == "cde"


def test_what_is_skipped_has_a_reason(run):
    _, store = run(
        b=lambda: _raise(torch.cuda.OutOfMemoryError("")), c=lambda: _raise(ValueError(3))
    )
    found = {row.op: (row.status, row.reason) for row in store.rows}
    assert found["b"] == ("skipped", "out of memory")
    assert found["c"] == ("failed", "ValueError: 3")
    assert found["d"] == ("ok", None)


def test_no_case_begins_that_ends_too_late(run, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run_, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow():
        now[0] += 5.0
        return [Row("sweep", "x")]

    ran, store = run(until=14.0, a=slow, b=slow)
    assert ran == "ab", "the third could end at 15"
    assert store.left == ["sweep/c", "sweep/d", "sweep/e"]
    assert run(until=10.0)[0] == ""


def test_a_section_gets_its_share(tmp_path, monkeypatch):
    """And what others leave."""
    order = []
    monkeypatch.setattr(run_, "time", SimpleNamespace(perf_counter=lambda: float(len(order))))

    def work(name):
        order.append(name)
        return [Row(name, "x")]

    plan = {
        name: [Case(Row(name, f"{i}"), lambda name=name: work(name)) for i in range(count)]
        for name, count in (("sweep", 9), ("host", 9), ("steps", 1))
    }
    store = Store(tmp_path / "gpu-x.json", {}, "command")
    shares = {"sweep": 0.75, "host": 0.25, "steps": 0.01}
    run_.run(plan, shares, store, device_.DryRun(), float("inf"))
    assert order[:3] == ["sweep", "host", "steps"]
    assert order[:11].count("sweep") == 7
    assert order[-6:] == ["host"] * 6
    assert len(order) == 19


def test_a_peer_that_computes_something_else_is_not_timed(tmp_path):
    spec = database()["relu"]
    device = device_.DryRun()
    ceilings = importlib.import_module("benchmarks.gpu.ceilings").Ceilings(1e12)
    row = Row("sweep", "relu", dtype="float32")
    op = sweep.Op(device, spec, torch.float32, row, lambda: ceilings)
    others = {"right": torch.relu, "wrong": torch.sigmoid, "broken": lambda x: x.no}
    found = {}
    for row in op.against(others):
        found.setdefault(row.who, []).append(row)
    assert found["wrong"][0].reason.startswith("its results differ from stock's by")
    assert found["broken"][0].reason.startswith("AttributeError")
    assert [r.status for r in found["right"]] == ["ok"] * 3
    slow, device.longest = replace(ceilings, copy=1e3), 80.0
    op = replace(op, ceilings=lambda: slow)
    assert {r.reason for r in op.against({})} == {"a call takes 81.9 s or more"}


def test_a_card_takes_turns():
    calls = []

    def timer(name, seconds):
        return lambda count: calls.append((name, count)) or seconds

    card = object.__new__(device_.Card)
    timers = {"ours": timer("ours", 1e-4), "stock": timer("stock", 2e-4)}
    assert card.seconds(timers) == {"ours": 1e-4, "stock": 2e-4}
    assert calls == [(w, 3) for w in timers] + 3 * [
        *((w, 10) for w in ("stock", "ours")), *((w, 10) for w in timers),
    ] + [(w, 10) for w in ("stock", "ours")]  # fmt: skip
    assert card.seconds({}) == {}


@pytest.mark.parametrize("broken", ["torch.rand", "torch.cuda.synchronize"])
def test_a_card_without_random_numbers_is_lost(monkeypatch, broken):
    """A recording that failed leaves torch's generator where it raises ever after."""
    card = object.__new__(device_.Card)
    card.kind = "cpu"
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not card.is_lost()
    monkeypatch.setattr(broken, lambda *_, **__: _raise(RuntimeError("unexpectedly")))
    assert card.is_lost()


def test_what_loses_the_card_is_named(tmp_path):
    class Lost(device_.DryRun):
        def timer(self, made):
            raise RuntimeError("of a peer")

        def is_lost(self):
            return True

    ceilings = importlib.import_module("benchmarks.gpu.ceilings").Ceilings(1e12)
    row = Row("sweep", "relu", dtype="float32")
    op = sweep.Op(Lost(), database()["relu"], torch.float32, row, lambda: ceilings)
    rows = run_.rows_of(Case(row, lambda: op.measured({"peer": torch.relu}, {})))
    assert [(r.who, r.status) for r in rows] == [("peer", "skipped"), ("ours", "failed")]
    assert {r.reason for r in rows} == {"RuntimeError: of a peer"}


def test_a_peer_that_is_half_installed_has_a_reason(monkeypatch):
    monkeypatch.setattr(peers_, "version", lambda name: "1.0")
    module = type(sys)("half")
    module.PACKAGE, module.ops = "half", lambda: _raise(OSError("no library"))
    peer = peers_._peer(module)
    assert (peer.version, peer.ops) == ("1.0", {})
    assert peer.reason == "cannot be imported: OSError: no library"


def test_the_page_names_what_misses_a_goal():
    def row(op, n, fraction, **other):
        return Row("sweep", op, "ours", "forward", "bfloat16", n, fraction=fraction, **other)

    rows = [row("softmax", 4096, 0.95), row("softmax", 2**15, 0.9), row("linear", 4096, 0.1)]
    rows[2] = replace(rows[2], flops=1)
    text = page_.markdown({"card": "x"}, rows, ["a", "b"], "command")
    assert "- Goal, forward of 4K to 32K at 0.95: 1 of 2; below: softmax 32K 0.90.\n" in text
    assert "- Goal, forward of 1K" not in text
    assert "before 2 cases" in text


def test_the_ratio_is_to_the_best_of_the_others():
    def row(who, seconds, **other):
        return Row("sweep", "relu", who, "forward", "float32", seconds=seconds, **other)

    rows = [row("ours", 2.0), row("stock", 4.0), row("peer", 3.0), row("compiled", None)]
    (found,) = results.ratios([*rows, row("broken", 1.0, status="failed")])
    assert (found.best.who, found.ratio) == ("peer", 1.5)
    assert json.loads(json.dumps(results.without_none(rows[3])))["who"] == "compiled"
