"""``python -m benchmarks.scaling_ranks``: the model of docs/scaling.md against 1, 2 and 4 processes
on this machine.

Latency and bandwidth are fitted to small messages between two processes. The model predicts larger
collectives and whole training steps from these, from the time that the same processes need to
compute without communication, and from what DDP, FSDP2 or tensor parallelism costs one process. All
of them are measured, too. ``--table`` prints the model's predictions for 8 to 1024 GPUs instead.
The figures of docs/scaling.md come from both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

import custom_backprop.distributed  # noqa: F401 (for its sharding rules)
from custom_backprop import nn

RESULTS = Path(__file__).parent / "results"
WIDTH, LAYERS, ROWS = 512, 4, 256  # of the network; rows of all ranks together
FITTED, CHECKED = (1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20), (1 << 22, 1 << 24)  # bytes
TURN, ALL_TURNS = 0.02, 1.0  # seconds of one turn of calls, and of all turns of one call

TITLES = (
    "",
    "processes",
    "measured, ms",
    "predicted, ms",
    "predicted / measured",
    "of which computing, ms",
    "engine, ms",
    "speed-up over one",
)

#: torch 2.13 renamed both
GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class Link:
    """Between neighbours of a ring: seconds per message, and bytes per second."""

    latency: float
    bandwidth: float

    def pass_on(self, size: float, n: int) -> float:
        """All-gather, or reduce-scatter, of ``size`` bytes in total: n - 1 rounds, with a message
        of size / n in each."""
        return (n - 1) * (self.latency + size / n / self.bandwidth)

    def all_reduce(self, size: float, n: int) -> float:
        """A reduce-scatter and an all-gather; or, if that is faster, down and up a tree."""
        tree = 2 * np.log2(n) * self.latency + 2 * size / self.bandwidth
        return float(min(2 * self.pass_on(size, n), tree)) if n > 1 else 0.0


def network(width: int = WIDTH) -> torch.nn.Sequential:
    """Alternately WIDTH -> width -> WIDTH. With a smaller width, it is one rank's part of a
    tensor-parallel network."""
    torch.manual_seed(0)
    ends = [(WIDTH, width), (width, WIDTH)] * (LAYERS // 2)
    return torch.nn.Sequential(*(nn.LinearActivation(i, o, activation="relu") for i, o in ends))


def step(model: torch.nn.Module, rows: int) -> Callable[[], None]:
    x = torch.randn(rows, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return run


def parallel(strategy: str, mesh: DeviceMesh) -> torch.nn.Module:
    model = network()
    if strategy == "ddp":
        return DistributedDataParallel(model, bucket_cap_mb=1024)
    if strategy == "tensor":
        plan: dict[str, Any] = {
            str(i): RowwiseParallel() if i % 2 else ColwiseParallel() for i in range(LAYERS)
        }
        return parallelize_module(model, mesh, plan)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def seconds(*runs: Callable[[], Any]) -> list[float]:
    """Seconds of a call of each. The calls take turns, and all ranks run at once. In each of many
    short rounds the slowest rank counts; of all rounds the fastest one does, since whatever else
    the machine does only adds time."""
    for run in runs:
        run()
    start = time.perf_counter()
    for run in runs:
        run()
    once = torch.tensor((time.perf_counter() - start) / len(runs))
    dist.broadcast(once, 0)
    calls = max(1, int(TURN / once.item()))
    rounds = []
    for _ in range(min(25, max(6, int(ALL_TURNS / (calls * once.item()))))):
        taken = torch.empty(len(runs), dtype=torch.float64)
        for i, run in enumerate(runs):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            taken[i] = (time.perf_counter() - start) / calls
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        rounds.append(taken)
    return torch.stack(rounds).amin(0).tolist()


def measure(rank: int, n: int, folder: str) -> None:
    """Times n ranks. The first one writes the result to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{n}", rank=rank, world_size=n
    )
    mesh = init_device_mesh("cpu", (n,))
    found: dict[str, Any] = {"collectives": {}, "compute": {}, "step": {}}
    for size in FITTED + CHECKED:
        whole = torch.zeros(size // 4)
        part = torch.zeros(size // 4 // n)
        calls: dict[str, Any] = {
            "all_reduce": (dist.all_reduce, whole),
            "all_gather": (GATHER, whole, part),
            "reduce_scatter": (REDUCE_SCATTER, part, whole),
        }
        found["collectives"][size] = dict(
            zip(calls, seconds(*(partial(*call) for call in calls.values())), strict=True)
        )
    for strategy in ("ddp", "fsdp2", "tensor"):
        rows, width = (ROWS, WIDTH // n) if strategy == "tensor" else (ROWS // n, WIDTH)
        alone, together = seconds(step(network(width), rows), step(parallel(strategy, mesh), rows))
        found["compute"][strategy], found["step"][strategy] = alone, together
    if rank == 0:
        Path(folder, f"{n}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def fit(times: dict[int, float], turns: int) -> Link:
    """Fits t = turns (latency + size / 2 / bandwidth) to the times of two ranks, by least squares
    of relative errors. Neither latency nor bandwidth is below 0."""
    sizes, taken = (np.array(v) for v in zip(*times.items(), strict=True))
    terms = turns * np.stack([np.ones_like(taken), sizes / 2], axis=1) / taken[:, None]
    both, *_ = np.linalg.lstsq(terms, np.ones_like(taken), rcond=None)
    if both.min() < 0:  # the best fit is then at an edge, where one of them is 0
        edges = np.diag(terms.sum(0) / (terms**2).sum(0))
        both = min(edges, key=lambda e: float(((terms @ e - 1) ** 2).sum()))
    latency, inverse = map(float, both)
    return Link(latency, 1 / max(inverse, 1e-15))


def collective(name: str, links: dict[str, Link], size: float, n: int) -> float:
    """Seconds for n processes on this machine. Their link is a core that copies: processes share it
    if there are more of them than cores."""
    alone = (
        links[name].all_reduce(size, n) if name == "all_reduce" else links[name].pass_on(size, n)
    )
    return alone * max(1.0, n / (os.cpu_count() or 1))


def communication(strategy: str, links: dict[str, Link], n: int) -> float:
    """Seconds of communication in a step. DDP: one all-reduce of the gradients. FSDP2: two gathers
    and a reduce-scatter for each layer. Tensor parallel: an all-reduce of activations for each pair
    of layers in forward, and in backward except for the first, whose input needs no gradient."""
    layer = 4 * WIDTH * (WIDTH + 1)
    if strategy == "ddp":
        return collective("all_reduce", links, LAYERS * layer, n)
    if strategy == "fsdp2":
        return LAYERS * (
            2 * collective("all_gather", links, layer, n)
            + collective("reduce_scatter", links, layer, n)
        )
    return (LAYERS - 1) * collective("all_reduce", links, 4 * ROWS * WIDTH, n)


def compare() -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for n in (1, 2, 4):
            start_processes(measure, (n, folder), nprocs=n, start_method="fork")
            found[n] = json.loads(Path(folder, f"{n}.json").read_text())
    links = {}
    for name, turns in (("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1)):
        links[name] = fit(
            {size: found[2]["collectives"][str(size)][name] for size in FITTED}, turns
        )
    rows = []
    for n in (2, 4):
        for size in CHECKED:
            for name, measured in found[n]["collectives"][str(size)].items():
                predicted = collective(name, links, size, n)
                rows.append(
                    {
                        "what": f"{name}, {size >> 20} MiB",
                        "n": n,
                        "measured": measured,
                        "predicted": predicted,
                    }
                )
        for strategy, measured in found[n]["step"].items():
            alone, compute = found[1]["compute"][strategy], found[n]["compute"][strategy]
            engine = max(0.0, found[1]["step"][strategy] - alone) * max(1.0, n * compute / alone)
            row = {
                "what": f"step, {strategy}",
                "n": n,
                "measured": measured,
                "compute": compute,
                "engine": engine,
            }
            row["predicted"] = compute + engine + communication(strategy, links, n)
            rows.append(row | {"speedup": found[1]["step"][strategy] / measured})
    cores = f"{os.cpu_count()} cores ({platform.machine()})"
    machine = f"torch {torch.__version__}, {cores}, load {os.getloadavg()[0]:.1f} at the end"
    return {
        "machine": machine,
        "links": {k: asdict(v) for k, v in links.items()},
        "one": found[1],
        "rows": rows,
    }


def report(result: dict[str, Any]) -> str:
    fitted = ", ".join(
        f"{k} {1e6 * v['latency']:.0f} us and {v['bandwidth'] / 1e9:.2f} GB/s"
        for k, v in result["links"].items()
    )
    one = ", ".join(f"{k} {1e3 * v:.1f} ms" for k, v in result["one"]["step"].items())
    alone = 1e3 * result["one"]["compute"]["ddp"]
    lines = [
        f"{result['machine']}; all processes on the same cores.",
        f"Fitted to messages of 1 KiB to 1 MiB between two processes: {fitted}.",
        f"A step of one process: {one}; without an engine {alone:.1f} ms.",
        "",
        f"| {' | '.join(TITLES)} |",
        "|---" * len(TITLES) + "|",
    ]
    for r in result["rows"]:
        own = (
            f"{1e3 * r['compute']:.2f} | {1e3 * r['engine']:.2f} | {r['speedup']:.2f}"
            if "compute" in r
            else "| |"
        )
        times = f"{1e3 * r['measured']:.2f} | {1e3 * r['predicted']:.2f}"
        share = f"{r['predicted'] / r['measured']:.2f}"
        lines.append(f"| {r['what']} | {r['n']} | {times} | {share} | {own} |")
    return "\n".join(lines) + "\n"


def table() -> str:
    """A step of a transformer with 7e9 parameters, 32 layers of width 4096 and 8192 tokens per GPU,
    in bf16 with AdamW in float32."""
    parameters, layers, width, tokens = 7e9, 32, 4096, 8192
    inside, between = Link(5e-6, 350e9), Link(15e-6, 45e9)
    compute, size = 6 * parameters * tokens / 400e12, 2 * parameters
    lines = [
        "| GPUs | DDP | FSDP2 | FSDP2 + TP 8 | memory per GPU: DDP, FSDP2, FSDP2 + TP 8 |",
        "|---|---|---|---|---|",
    ]
    for n in (8, 32, 128, 512, 1024):
        link = inside if n == 8 else between
        ddp = link.all_reduce(size, n)
        fsdp = 3 * layers * link.pass_on(size / layers, n)
        groups = n // 8
        tensor = 4 * layers * inside.all_reduce(
            2 * width * 8 * tokens, 8
        ) + 3 * layers * between.pass_on(size / 8 / layers, groups)
        # 34 bytes per feature, if attention does not save its scores
        activations = 34 * tokens * width * layers
        memory = [
            16 * parameters + activations,
            16 * parameters / n + 2 * size / layers + activations,
        ]
        memory.append(16 * parameters / n + 2 * size / 8 / layers + activations)
        times = " | ".join(_computing(compute, t) for t in (ddp, fsdp, tensor))
        lines.append(f"| {n} | {times} | {', '.join(f'{m / 2**30:.0f}' for m in memory)} GiB |")
    return "\n".join(lines) + "\n"


def _computing(compute: float, communicate: float) -> str:
    """Both times, and the share of computing if they overlap completely, or not at all."""
    least, most = max(compute, communicate), compute + communicate
    return f"{compute:.2f} + {communicate:.2f} s ({compute / least:.0%}, {compute / most:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling_ranks",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--table", action="store_true", help="print the predictions for many GPUs; measures nothing"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    result = compare()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "scaling.md").write_text(text := report(result))
    print(text)
    print(f"wrote {args.out / 'scaling.json'} and {args.out / 'scaling.md'}")


if __name__ == "__main__":
    main()
