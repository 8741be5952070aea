"""Accumulation, mixed precision, compilation, several ranks, checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from monitor_helpers import batch, network, train
from torch import nn
from torch.nn.functional import cross_entropy

from custom_backprop.monitor import (
    GradientMonitor,
    JSONLines,
)


def test_accumulation():
    """The gradient is that of the sum, the activations are those of all passes."""
    model, (x, y) = network(), batch(32)
    monitor = GradientMonitor(model, every=1)
    cross_entropy(model(x), y).backward()
    whole = monitor.step()
    model.zero_grad()
    for part in range(4):
        (
            cross_entropy(model(x[part * 8 : part * 8 + 8]), y[part * 8 : part * 8 + 8]) / 4
        ).backward()
    parts = monitor.step()
    assert parts.norm == pytest.approx(whole.norm, rel=1e-5)
    for name in monitor.names:
        assert parts[name].activation_std == pytest.approx(whole[name].activation_std, rel=1e-5)


@pytest.mark.parametrize("unscale", [True, False])
def test_grad_scaler(unscale):
    """Gradients are measured without the scale, whoever removes it."""
    model, (x, y) = network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    monitor = GradientMonitor(model, every=1, scaler=scaler)
    for _ in range(3):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        true = nn.utils.get_total_norm(
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        ).item()
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        reading = monitor.step()
        scaler.step(optimizer)
        scaler.update()
        assert reading.norm == pytest.approx(true, rel=1e-5)
        assert not reading.verdicts


def test_one_step_that_the_scaler_skips_is_fine_but_many_are_not():
    model, (x, y) = network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
    monitor = GradientMonitor(model, every=4, measure=4, scaler=scaler)
    for step in range(8):
        optimizer.zero_grad()
        scaler.scale(
            cross_entropy(model(x), y) * (math.inf if step in (1, 4, 5, 6, 7) else 1)
        ).backward()
        monitor.step()
        scaler.step(optimizer)
        scaler.update()
    assert [[v.kind for v in r.verdicts] for r in monitor.history] == [[], ["non-finite"]]


def test_a_scaler_that_is_off_hides_nothing():
    model = network()
    monitor = GradientMonitor(
        model, every=2, measure=2, scaler=torch.amp.GradScaler("cpu", enabled=False)
    )
    for factor in (math.inf, 1.0):
        model.zero_grad()
        x, y = batch()
        (cross_entropy(model(x), y) * factor).backward()
        reading = monitor.step()
    assert {v.kind for v in reading.verdicts} == {"non-finite"}


def test_compiled():
    model = network()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match=r"torch\.compile leaves out hooks"):
        GradientMonitor(compiled, activations=True)
    monitor = GradientMonitor(compiled, every=1)
    reading = train(compiled, monitor, 2)[-1]
    assert monitor.names[0] == "0", "the names are those of the module inside"
    assert reading.norm == pytest.approx(
        nn.utils.get_total_norm([p.grad for p in model.parameters()]).item(), rel=1e-5
    )
    assert reading["0"].activation_std is None

    def step(x):
        return monitor.step()

    with pytest.raises(Exception, match="not be called in a compiled function"):
        torch.compile(step, backend="eager", fullgraph=True)(torch.ones(1))


def test_a_compiled_function_around_the_model():
    """The monitor does not know about it: traced hooks have no effect."""
    model = network()
    monitor = GradientMonitor(model, every=1)
    x, y = batch()
    step = torch.compile(lambda x, y: cross_entropy(model(x), y), backend="eager", fullgraph=True)
    step(x, y).backward()
    reading = monitor.step()
    assert reading.norm > 0
    assert reading["0"].activation_std is None


def test_wrappers_that_hide_the_gradients_are_refused():
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        GradientMonitor(nn.DataParallel(network()))
    hidden = type("FullyShardedDataParallel", (nn.Module,), {})()
    hidden.part = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="fully_shard"):
        GradientMonitor(hidden)


def distributed(rank, folder, results):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        found = {}
        x, y = (t.chunk(2)[rank] for t in (torch.randn(12, 16), torch.randint(0, 5, (12,))))
        for kind in ("ddp", "fsdp2"):
            torch.manual_seed(0)
            model = network(width=16, depth=2)  # its head has 5 rows: shards of 3 and 2
            model[2].bias.data[:13] = -100
            if kind == "ddp":
                model = nn.parallel.DistributedDataParallel(model)
            else:
                fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            torch.manual_seed(5)
            x, y = (t.chunk(2)[rank] for t in (torch.randn(12, 16), torch.randint(0, 5, (12,))))
            monitor = GradientMonitor(
                model, every=2, measure=2, writer=JSONLines(f"{folder}/{kind}.jsonl")
            )
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            for _ in range(2):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                reading = monitor.step()
                optimizer.step()
            layers = [
                [layer.norm, layer.mean, layer.std, layer.zeros, layer.dead, layer.update]
                for layer in reading.layers
            ]
            found[kind] = reading.norm, reading.update, layers, [str(v) for v in reading.verdicts]
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_ddp_and_fsdp2_read_what_one_process_reads(tmp_path):
    """After the all-reduce, on uneven shards, and equal on every rank. Only one writes them."""
    torch.multiprocessing.spawn(distributed, (str(tmp_path), None), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    model = network(width=16, depth=2)
    model[2].bias.data[:13] = -100
    torch.manual_seed(5)
    x, y = torch.randn(12, 16), torch.randint(0, 5, (12,))
    monitor = GradientMonitor(model, every=2, measure=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        reading = monitor.step()
        optimizer.step()
    for kind in ("ddp", "fsdp2"):
        assert ranks[0][kind] == ranks[1][kind]
        norm, update, layers, verdicts = ranks[0][kind]
        assert norm == pytest.approx(reading.norm, rel=1e-5)
        assert update == pytest.approx(reading.update, rel=1e-5)
        for mine, layer in zip(layers, reading.layers, strict=True):
            one = [layer.norm, layer.mean, layer.std, layer.zeros, layer.dead, layer.update]
            assert [v is None for v in mine] == [v is None for v in one]
            assert [v for v in mine if v is not None] == pytest.approx(
                [v for v in one if v is not None], rel=1e-4, abs=1e-7
            )
        assert (
            [v.partition(":")[0] for v in verdicts]
            == [str(v).partition(":")[0] for v in reading.verdicts]
            == ["dead units in '2'"]
        )
        assert len((tmp_path / f"{kind}.jsonl").read_text().splitlines()) == 1


def test_a_run_from_a_checkpoint_has_the_same_readings(tmp_path):
    def monitors(model):
        return GradientMonitor(model, every=4, measure=4, updates=False)

    torch.manual_seed(2)
    model = network()
    whole = monitors(model)
    copy = monitors(model)
    for step in range(8):
        if step == 6:
            torch.save(copy.state_dict(), tmp_path / "monitor.pt")
            copy.remove()
            copy = monitors(model)
            copy.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
        model.zero_grad()
        x, y = batch()
        cross_entropy(model(x), y).backward()
        whole.step()
        copy.step()
    assert list(copy.history) == list(whole.history)
    assert len(copy.history) == 2
