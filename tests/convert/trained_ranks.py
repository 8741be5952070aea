"""What the ranks of test_trained_ranks.py run: ``python trained_ranks.py FOLDER`` starts two. The
first one prints the name of each check that passes."""

from __future__ import annotations

import copy
import sys
from datetime import timedelta
from itertools import product

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from twins import assert_equal_training, batches, gradients, small, train, twins

import custom_backprop
from custom_backprop.conversions import deferred

RANKS, STEPS = 2, 3


def part(name):
    """This rank's batches, of another length than the other's. They differ in how many labels
    count."""
    rank = dist.get_rank()
    return batches(name, STEPS * RANKS, length=11 + 2 * rank)[rank::RANKS]


def whole(training):
    """Gradients of all shards."""
    losses, first = training
    return losses, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in first.items()}


def check_ddp(mesh):
    for name in ("llama", "gpt2", "bert", "vit"):
        stock, ours = (train(DistributedDataParallel(m), part(name)) for m in twins(name))
        assert_equal_training(ours, stock)


def check_ddp_without_exchange(mesh):
    """The gradients of the first of two batches stay on their rank."""

    def trained(model):
        ddp = DistributedDataParallel(model)
        first, second, _ = part("llama")
        with ddp.no_sync():
            losses = [ddp(**first).loss]
            losses[0].backward()
        alone = {f"{n}, alone": g for n, g in gradients(model).items()}
        losses.append(ddp(**second).loss)
        losses[1].backward()
        return losses, alone | gradients(model)

    stock, ours = map(trained, twins("llama"))
    assert_equal_training(ours, stock)


def sharded(model, mesh, head, **options):
    """Each block is a group; so is the head, or it is in that of the root."""
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    for module in (*layers, *([model.lm_head] if head else ())):
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def check_fsdp2(mesh):
    for name, head in (("llama", False), ("llama", True), ("gpt2", False)):
        stock, ours = (sharded(m, mesh, head) for m in twins(name))
        found, expected = (whole(train(m, part(name))) for m in (ours, stock))
        assert_equal_training(found, expected)
        assert is_fused(ours) != head


def is_fused(model):
    """Whether the model gives its loss without computing logits. A head that is a group of its own
    has its weights only while it runs, so that it must compute them."""
    return isinstance(model(**part("llama")[0]).logits, deferred.Deferred)


def check_fsdp2_with_a_loss_outside(mesh):
    """The head's group gives its weights back when forward ends, before the loss is computed."""

    def trained(model):
        (batch, *_), losses = part("llama"), []
        labels = batch["labels"].flatten()
        for reshard in (None, True):
            shards = sharded(copy.deepcopy(model), mesh, False, reshard_after_forward=reshard)
            logits = shards(batch["input_ids"]).logits
            losses.append(F.cross_entropy(logits.flatten(0, -2), labels))
            losses[-1].backward()
        return whole((losses, gradients(shards)))

    stock, ours = map(trained, twins("llama"))
    assert_equal_training(ours, stock)


def check_fsdp2_with_a_loss_of_the_logits(mesh):
    """Of a model that has computed its own loss, too. If the model is one group, that the gradient
    of the logits arrives is all that FSDP hears of backward; also if a Function gets them, which
    looks below torch's functions, or if a hook has had them made before."""

    def look(module, inputs, output):
        output.logits.argmax()

    def trained(model, in_layers, function, is_looked_at):
        batch, *_ = part("llama")
        if is_looked_at:
            model.register_forward_hook(look)
        shards = sharded(model, mesh, False) if in_layers else fully_shard(model, mesh=mesh)
        output = shards(**batch)
        loss = function(output.logits).square().mean()
        loss.backward()
        return whole(([loss, output.loss], gradients(shards)))

    for case in (
        (True, torch.Tensor.float, False),
        (False, torch.Tensor.float, False),
        (False, Doubled.apply, False),
        (False, torch.Tensor.float, True),
    ):
        stock, ours = (trained(m, *case) for m in twins("llama"))
        assert_equal_training(ours, stock)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def check_fsdp2_of_a_model_converted_later(mesh):
    """fully_shard gives what it shards a class of its own. Layers inside it are swapped."""
    stock = sharded(small("llama"), mesh, True)
    ours = custom_backprop.convert(sharded(small("llama"), mesh, True))
    found, expected = (whole(train(m, part("llama"))) for m in (ours, stock))
    assert_equal_training(found, expected)


def check_fsdp2_with_mixed_precision(mesh):
    """In bfloat16 both round; the distance of the twin's gradients from those in float32 is the
    measure."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    exact = whole(train(sharded(small("llama"), mesh, False), part("llama")))
    stock, ours = (
        whole(train(sharded(m, mesh, False, mp_policy=policy), part("llama")))
        for m in twins("llama")
    )
    assert_close(ours[0], stock[0], rtol=1e-2, atol=0)
    for n, gradient in exact[1].items():
        error = (stock[1][n] - gradient).norm()
        assert 0 < (ours[1][n] - gradient).norm() <= 1.5 * error + 1e-3 * gradient.norm(), n


def check_fsdp2_with_checkpointing(mesh):
    for reentrant, head in product((True, False), (True, False)):
        pair = twins("llama")
        for model in pair:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        stock, ours = (whole(train(sharded(m, mesh, head), part("llama"))) for m in pair)
        assert_equal_training(ours, stock)


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check(mesh)
            dist.barrier()
            if rank == 0:
                print("ok", name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    deferred.LEAST = 0  # losses of small models are fused with their heads, too
    small("llama")  # what this imports, the ranks share
    start_processes(main, (sys.argv[1],), nprocs=RANKS, start_method="fork")
