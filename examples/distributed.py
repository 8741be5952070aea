"""Handwritten digits, learned by many processes with our layers and PyTorch's DDP or FSDP2.

    torchrun --standalone --nproc-per-node 4 --max-restarts 2 \\
        examples/distributed.py --strategy fsdp2

With --strategy ddp each rank has the whole model, and gradients are averaged. With fsdp2 each rank
has a part of every parameter, gradient and momentum. The backend is gloo on a CPU and NCCL on GPUs.
Without torchrun there is one process. Every batch is divided among the ranks as by
DistributedSampler, and into --accumulate parts, so any number of processes computes the same
gradient as one: the losses differ only by rounding.

Every --interval steps the ranks write a checkpoint, each its own part. It gets its final name only
when it is complete. When a rank dies, torchrun's agent restarts all of them, and they continue from
the last checkpoint. If all have died, the same command continues from it, with any number of
processes and either strategy. A finished run leaves its weights and its picture but no checkpoint,
so the same command then starts again. On several machines set
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (PyTorch issue 135712), and choose an --out on a disk that all
of them share.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

try:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from common import REMEDY, options, plt, save, stop, write
    from digits import MOMENTUM, RATE, data, our_model
    from torch import Tensor
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_state_dict,
    )
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from tqdm import tqdm

    from custom_backprop import nn
except ImportError as error:
    sys.exit(f"{error}; the examples need: pip install -e '.[demo]'")

BATCH = 128  # rows of all ranks together
CHECKSUMS = "checksums.json"


def join(device: str) -> DeviceMesh:
    """A mesh of one dimension: all ranks of torchrun, or this process alone."""
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    if not dist.is_torchelastic_launched():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    elif os.environ["GROUP_WORLD_SIZE"] == "1":
        # the agent's store outlives the ranks: under the old names a restarted rank may find a dead
        # rank's address, and wait for it
        store, rank, ranks = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    else:  # the number of restarts may differ between machines
        dist.init_process_group(backend)
    return init_device_mesh(torch.device(device).type, (dist.get_world_size(),))


def spread(model: torch.nn.Module, strategy: str, mesh: DeviceMesh) -> torch.nn.Module:
    """The model on the ranks of the mesh. All of them drew the same weights."""
    if strategy == "ddp":
        return DistributedDataParallel(model, device_mesh=mesh)
    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def syncing(model: torch.nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Ranks exchange gradients in the backward of a step's last part. Before that, each rank adds
    up its own."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last else model.no_sync()  # type: ignore[operator]


def checksums(folder: Path) -> dict[str, str]:
    """One for each file of a checkpoint: torch would load wrong values from a damaged file without
    an error."""
    return {
        p.name: sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.iterdir())
        if p.name != CHECKSUMS
    }


def refuse(message: str) -> NoReturn:
    """Ends every rank. One of them says why."""
    sys.exit(message if dist.get_rank() == 0 else 1)


class Learner:
    """The model in training, and its checkpoints."""

    def __init__(self, model: torch.nn.Module, settings: dict[str, Any]) -> None:
        self.model, self.settings = model, settings
        self.loss = nn.CrossEntropyLoss(reduction="sum")
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
        self.losses: list[float] = []  # one per step, of all ranks

    def step(self, x: Tensor, y: Tensor, parts: int) -> Tensor:
        """One update by a batch. This rank computes its share of it, in ``parts``. Returns the
        share's part of the mean loss."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        shares = (t[rank::ranks].tensor_split(parts) for t in (x, y))
        for i, (inputs, targets) in enumerate(zip(*shares, strict=True)):
            with syncing(self.model, last=i == parts - 1):
                loss = self.loss(self.model(inputs), targets) / len(x)
                # the ranks' gradients are averaged, and the losses are parts of a sum
                (loss * ranks).backward()
            total += loss.detach()
        self.optimizer.step()
        return total

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return (self.model(x).argmax(dim=1) == y).double().mean().item()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "losses": self.losses,
            "settings": dict(self.settings),
        }

    def save(self, folder: Path) -> None:
        """Writes a checkpoint of this step to the folder and deletes the others. Every rank calls
        it."""
        whole = folder / f"step-{len(self.losses):06d}"
        dcp.save(self.state_dict(), checkpoint_id=folder / "unfinished")
        if dist.get_rank() == 0:
            (folder / "unfinished" / CHECKSUMS).write_text(
                json.dumps(checksums(folder / "unfinished")), encoding="utf-8"
            )
            os.rename(folder / "unfinished", whole)
            for other in folder.glob("step-*"):
                if other != whole:
                    shutil.rmtree(other)

    def load(self, folder: Path) -> Path | None:
        """Loads the folder's last checkpoint, if there is one. Every rank calls it."""
        checkpoint = max(folder.glob("step-*"), default=None)
        dist.barrier()  # all have looked
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "unfinished", ignore_errors=True)
        dist.barrier()
        if checkpoint is None:
            return None
        state = self.state_dict()
        try:
            if json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8")) != checksums(
                checkpoint
            ):
                raise ValueError("a checksum is not that of its file")
            dcp.load(state, checkpoint_id=checkpoint)
        except Exception as error:  # a damaged file may cause any of them
            why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            refuse(f"cannot read the checkpoint {checkpoint} ({why}): {REMEDY}")
        if state["settings"] != self.settings:
            given = f"the settings {state['settings']}, not {self.settings}"
            refuse(
                f"the checkpoint {checkpoint} is of a run with {given}: repeat those; or {REMEDY}"
            )
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.losses = state["losses"]
        return checkpoint


def batches(count: int, seed: int, epochs: int) -> Iterator[Tensor]:
    """The rows of each batch. The order of an epoch depends only on its number, so a run can
    continue at any step without a saved order."""
    for epoch in range(epochs):
        yield from torch.randperm(
            count, generator=torch.Generator().manual_seed(seed + epoch)
        ).split(BATCH)


def train(learner: Learner, x: Tensor, y: Tensor, args: Namespace) -> None:
    """Trains to the end, from the last checkpoint if there is one."""
    first = dist.get_rank() == 0
    if (checkpoint := learner.load(args.checkpoints)) is not None and first:
        print(f"continuing after step {len(learner.losses)}, from {checkpoint}", flush=True)
    steps = list(batches(len(x), args.seed, args.epochs))
    since: list[Tensor] = []
    start = len(learner.losses)
    for i, rows in enumerate(
        tqdm(steps[start:], initial=start, total=len(steps), unit="step", disable=not first),
        start + 1,
    ):
        rows = rows.to(x.device)
        since.append(learner.step(x[rows], y[rows], args.accumulate))
        if i % args.interval == 0 or i == len(steps):
            losses = torch.stack(since)
            dist.all_reduce(losses)
            learner.losses += losses.tolist()
            since.clear()
            learner.save(args.checkpoints)


def draw(losses: list[float], ranks: int, args: Namespace) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.8))
    axes.plot(range(1, len(losses) + 1), losses, linewidth=1)
    axes.set(
        xlabel="step",
        ylabel="cross-entropy",
        yscale="log",
        title=f"Training loss, {args.strategy}, processes: {ranks}",
    )
    write(figure, args.out / "distributed.png")


def main() -> None:
    # one rank says what is wrong with the options
    with nullcontext() if os.environ.get("LOCAL_RANK", "0") == "0" else redirect_stderr(None):
        args = options(
            "distributed", __doc__, strategy=("ddp", "fsdp2"), epochs=20, interval=50, accumulate=2
        )
    args.checkpoints = args.out / "checkpoints"
    args.checkpoints.mkdir(exist_ok=True)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    learn(args, join(args.device))
    dist.destroy_process_group()


def learn(args: Namespace, mesh: DeviceMesh) -> None:
    """What a rank does after it joins the others and before it leaves them."""
    first = dist.get_rank() == 0
    x, test_x, y, test_y = data(args.seed, args.device)
    torch.manual_seed(args.seed)
    settings = {
        "seed": args.seed,
        "epochs": args.epochs,
        "batch": BATCH,
        "rate": RATE,
        "momentum": MOMENTUM,
    }
    learner = Learner(spread(our_model(256, 128).to(args.device), args.strategy, mesh), settings)
    if first:
        run = f"{args.strategy}, {mesh.size()} x {args.device}, {dist.get_backend()}"
        print(f"{len(x)} digits for training; {run}", flush=True)
    try:
        train(learner, x, y, args)
    except KeyboardInterrupt:
        if not first:
            sys.exit(130)
        last = max(args.checkpoints.glob("step-*"), default=args.checkpoints / "step")
        stop(last, "the run is", of="checkpoint")
    accuracy = learner.accuracy(test_x, test_y)
    weights = get_model_state_dict(
        learner.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if first:
        draw(learner.losses, mesh.size(), args)
        save(weights, args.out / "weights.pt")
        print(f"wrote {args.out / 'weights.pt'}")
        shutil.rmtree(args.checkpoints)
        print(f"test accuracy: {100 * accuracy:.2f} %, last loss {learner.losses[-1]:.6f}")
    dist.barrier()  # no rank may leave while the first one writes: torchrun would end them all


def run(program: Callable[[], None]) -> NoReturn:
    """Runs ``program``, then ends the process without the interpreter's own shutdown.

    DTensor's caches, or a failed run, may still refer to a group, so gloo's threads live on after
    ``destroy_process_group``. If such a thread releases a tensor while the interpreter shuts down,
    it aborts the process: "terminate called without an active exception" (PyTorch issue 190489).
    After a failure the group is not destroyed at all, because that may wait for dead ranks.
    """
    code: Any = 0
    try:
        program()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    run(main)
