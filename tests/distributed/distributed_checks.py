"""What the ranks of tests/distributed/test_distributed.py run: ``python distributed_checks.py
FOLDER RANKS...`` starts that many ranks, for each number in turn.

They are forks of one process, so they share its imports. The first rank prints the name of each
check that passes.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import distributed as example

from custom_backprop import functional, nn, optim, patch
from custom_backprop.conversions import deferred
from custom_backprop.distributed import vocab_parallel_cross_entropy
from custom_backprop.testing.case import outputs
from custom_backprop.testing.database import database
from custom_backprop.testing.spec import Make

RANK, RANKS, FOLDER = 0, 1, Path(sys.argv[1])  # the first two are set by main
SIZES = [13, 8, 1, 11, 13]  # rows of each step's batch: not always one for every rank
PARTS = 2


@contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def our_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        nn.LinearActivation(6, 9, activation="relu"),
        nn.LinearActivation(9, 7, activation="gelu"),
        nn.Linear(7, 5),
    )


def stock_model():
    torch.manual_seed(0)
    layers = (
        torch.nn.Linear(6, 9),
        torch.nn.ReLU(),
        torch.nn.Linear(9, 7),
        torch.nn.GELU(),
        torch.nn.Linear(7, 5),
    )
    return torch.nn.Sequential(*layers)


def learner(strategy, dtype, mesh):
    return example.Learner(example.spread(our_model().to(dtype), strategy, mesh), {"run": "test"})


def batches(dtype):
    generator = torch.Generator().manual_seed(1)
    for size in SIZES:
        x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
        yield x.to(dtype), torch.randint(5, (size,), generator=generator)


def run(learner, steps, dtype):
    """The losses of those steps, over all ranks."""
    losses = torch.stack([learner.step(x, y, PARTS) for x, y in list(batches(dtype))[steps]])
    dist.all_reduce(losses)
    learner.losses += losses.tolist()
    return losses


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def weights(model):
    return [whole(p).detach().clone() for p in model.parameters()]


def one_process(dtype):
    """Stock torch with the whole batch in one process: losses and weights."""
    model, losses = stock_model().to(dtype), []
    optimizer = torch.optim.SGD(model.parameters(), lr=example.RATE, momentum=example.MOMENTUM)
    for x, y in batches(dtype):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), weights(model)


def assert_equal_on_all_ranks(tensors):
    for t in tensors:
        copies = [torch.empty_like(t) for _ in range(RANKS)]
        dist.all_gather(copies, t)
        assert all(torch.equal(c, t) for c in copies)


def check_training(mesh):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        losses, stock = one_process(dtype)
        for strategy in ("ddp", "fsdp2"):
            ours = learner(strategy, dtype, mesh)
            assert_close(run(ours, slice(None), dtype), losses, rtol=0, atol=tolerance)
            assert_close(weights(ours.model), stock, rtol=0, atol=tolerance)
            assert_equal_on_all_ranks(weights(ours.model))


#: an optimizer's class -> options far from their defaults
OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adagrad": {"lr": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.5},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01},
    "Lion": {"lr": 0.01},
}
NORM = 0.05  # far below the norm of any step's gradient


def backward(model, x, y, rows=slice(None)):
    """Backward of the mean loss over this rank's rows. The ranks' gradients are averaged."""
    ranks = 1 if rows == slice(None) else RANKS
    loss = F.cross_entropy(model(x[rows]), y[rows], reduction="sum")
    (loss * ranks / len(x)).backward()


def check_clipping(mesh):
    """``max_grad_norm`` bounds the norm of all gradients on all ranks, as torch's
    ``clip_grad_norm_`` does in one process. The norm of each rank's own shards would clip by a
    different factor on each rank."""
    assert OPTIMIZERS.keys() == set(optim.__all__)
    for name, options in OPTIMIZERS.items():
        kind = getattr(optim, name)
        alone = stock_model().double()
        optimizer = kind(alone.parameters(), **options)
        for x, y in batches(torch.float64):
            optimizer.zero_grad()
            backward(alone, x, y)
            assert clip_grad_norm_(alone.parameters(), NORM) > 2 * NORM
            optimizer.step()
        for strategy in ("ddp", "fsdp2"):
            ours = example.spread(our_model().double(), strategy, mesh)
            optimizer = kind(ours.parameters(), **options, max_grad_norm=NORM)
            for x, y in batches(torch.float64):
                optimizer.zero_grad()
                backward(ours, x, y, slice(RANK, None, RANKS))
                optimizer.step()
            label = f"{name}, {strategy}"
            for mine, theirs in zip(weights(ours), weights(alone), strict=True):
                assert_close(mine, theirs, rtol=0, atol=1e-12, msg=label)
            assert_equal_on_all_ranks(weights(ours))


def check_accumulation(mesh):
    """Ranks exchange gradients once per step, not once per part."""
    (x, y), *_ = batches(torch.float64)
    buckets = []

    def hook(state, bucket):
        buckets.append(bucket.index())
        return (
            dist.all_reduce(bucket.buffer().div_(RANKS), async_op=True)
            .get_future()
            .then(lambda f: f.value()[0])
        )

    ddp = learner("ddp", torch.float64, mesh)
    ddp.model.register_comm_hook(None, hook)
    ddp.step(x, y, 3)
    assert buckets == [0]
    fsdp2 = learner("fsdp2", torch.float64, mesh)
    reduced = []
    fsdp2.loss.register_forward_hook(
        lambda *_: reduced.append(any(p.grad is not None for p in fsdp2.model.parameters()))
    )
    fsdp2.step(x, y, 3)
    assert reduced == [False, False, False]
    assert_close(weights(ddp.model), weights(fsdp2.model), rtol=0, atol=1e-12)


def check_checkpoint(mesh):
    dtype, before, after = torch.float64, slice(0, 3), slice(3, None)
    losses, _ = one_process(dtype)
    for strategy in ("fsdp2", "ddp"):
        folder = FOLDER / f"{RANKS}-{strategy}"
        if RANK == 0:
            folder.mkdir()
        dist.barrier()
        first = learner(strategy, dtype, mesh)
        run(first, slice(0, 2), dtype)
        first.save(folder)
        run(first, slice(2, 3), dtype)
        first.save(folder)
        at = weights(first.model)
        dist.barrier()
        assert [p.name for p in folder.iterdir()] == ["step-000003"]
        dist.barrier()
        run(first, after, dtype)

        if RANK == 0:  # as left by a rank that was killed while writing
            (folder / "unfinished").mkdir()
            (folder / "unfinished" / "__0_0.distcp").write_bytes(b"half")
        dist.barrier()
        same = learner(strategy, dtype, mesh)
        assert same.load(folder) == folder / "step-000003"
        assert same.losses == first.losses[before]
        assert all(map(torch.equal, weights(same.model), at))
        run(same, after, dtype)
        if strategy == "fsdp2" or RANKS == 2:
            assert same.losses == first.losses
            assert all(map(torch.equal, weights(same.model), weights(first.model)))
        else:  # DDP reorders its buckets after the first step, and so sums in another order
            assert_close(weights(same.model), weights(first.model), rtol=0, atol=1e-14)
        assert not (folder / "unfinished").exists()

        other = learner("ddp" if strategy == "fsdp2" else "fsdp2", dtype, mesh)
        other.load(folder)
        assert_close(run(other, after, dtype), losses[after], rtol=0, atol=1e-12)

        alone = our_model().to(dtype)  # on another number of processes: one
        optimizer = torch.optim.SGD(alone.parameters(), lr=example.RATE, momentum=example.MOMENTUM)
        model_state, optimizer_state = get_state_dict(alone, optimizer)
        with quiet():  # torch warns that it loads in one process, as intended
            dcp.load(
                {"model": model_state, "optimizer": optimizer_state},
                checkpoint_id=folder / "step-000003",
                no_dist=True,
            )
        assert all(map(torch.equal, weights(alone), at))

        changed = learner(strategy, dtype, mesh)
        changed.settings = {"run": "another"}
        with pytest.raises(SystemExit, match="repeat those" if RANK == 0 else "^1$"):
            changed.load(folder)
        dist.barrier()
        if RANK == 0:
            (part := next((folder / "step-000003").glob("__1_*"))).write_bytes(
                flipped(part.read_bytes())
            )
        dist.barrier()
        with pytest.raises(
            SystemExit, match="cannot read .*step-000003.*to start again$" if RANK == 0 else "^1$"
        ):
            learner(strategy, dtype, mesh).load(folder)


def flipped(content):
    return content[: (i := len(content) // 2)] + bytes([content[i] ^ 16]) + content[i + 1 :]


def assert_same_network(ours, stock, x, atol=1e-12, of_rank=slice(None)):
    """Compares outputs and all gradients. ``of_rank``: the rows that this rank computes."""
    ours_x, stock_x = (x.clone().requires_grad_() for _ in range(2))
    factor = torch.sin(torch.arange(len(x) * 5, dtype=x.dtype)).reshape(len(x), 5)
    y, expected = ours(ours_x[of_rank]), stock(stock_x)
    assert_close(y, expected[of_rank], rtol=0, atol=atol)
    (y * factor[of_rank]).sum().backward()
    (expected * factor).sum().backward()
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        assert p.grad.placements == p.placements
        assert_close(whole(p.grad), q.grad, rtol=0, atol=atol)
    assert_close(ours_x.grad[of_rank], stock_x.grad[of_rank], rtol=0, atol=atol)


def check_tensor_parallel(mesh):
    x = torch.randn(3, 6, dtype=torch.float64)
    styles = (
        (ColwiseParallel, RowwiseParallel, ColwiseParallel),
        (RowwiseParallel, ColwiseParallel, RowwiseParallel),
    )
    for kinds in styles:
        ours = our_model().double()
        plan = {
            # local outputs would have to have equal widths
            "0": kinds[0](input_layouts=Replicate(), use_local_output=False),
            "1": kinds[1](use_local_output=False),
            "2": kinds[2](output_layouts=Replicate()),
        }
        assert_same_network(parallelize_module(ours, mesh, plan), stock_model().double(), x)
    if RANKS == 4:  # the batch over one dimension of the mesh, the layers over the other
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        plan = {
            "0": ColwiseParallel(use_local_output=False),
            "1": RowwiseParallel(),
            "2": ColwiseParallel(output_layouts=Replicate()),
        }
        ours = parallelize_module(our_model().double(), grid["tensor"], plan)
        fully_shard(ours, mesh=grid["data"])
        ours.set_gradient_divide_factor(1.0)
        share = slice(0, 2) if grid.get_local_rank("data") == 0 else slice(2, 3)
        ours_x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        stock = stock_model().double()
        with quiet():  # FSDP2 warns that the local part of a DTensor is a view
            (ours(ours_x[share]) ** 2).sum().backward()
        (stock(ours_x) ** 2).sum().backward()
        for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
            assert_close(whole(p.grad), q.grad, rtol=0, atol=1e-12)


def placements_of(args):
    """The placements to try on a sample: every tensor replicated; or, for each dimension i, those
    tensors sharded along i whose size there is that of the first."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    yield [Replicate()] * len(tensors)
    for i in range(tensors[0].dim()):
        same = [t.dim() > i and t.shape[i] == tensors[0].shape[i] for t in tensors]
        yield [Shard(i) if s else Replicate() for s in same]


def check_ops_of_the_database(mesh):
    """Each op on DTensors is right, as are both derivatives, or raises and says what to do."""
    followed, refused = set(), set()
    for name, spec in database().items():
        enough = {"activation": 1, "loss": 2}.get(spec.family)  # all of them have the same rule
        for sample in list(spec.samples(Make("cpu", torch.float64)))[:enough]:
            tensors = [a for a in sample.args if isinstance(a, torch.Tensor)]
            if not tensors or any(isinstance(v, torch.Tensor) for v in sample.kwargs.values()):
                continue
            for placements in placements_of(sample.args):
                label = f"{name} {sample.name} {[tuple(t.shape) for t in tensors]} {placements}"
                refusal = None
                try:
                    with quiet():  # about shapes that broadcast
                        off = difference(spec, sample, placements, mesh, label)
                # raised by ours, or by an operator of torch before it
                except (NotImplementedError, RuntimeError) as raised:
                    refusal = str(raised)
                if refusal is not None:
                    assert "full_tensor" in refusal or "harding" in refusal, f"{label}: {refusal}"
                    assert any(p.is_shard() for p in placements), label
                    refused.add(name)
                else:
                    assert off < 1e-10, f"{label}: off by {off}"
                    followed.update([name] if any(p.is_shard() for p in placements) else [])
    masks = {name for name, spec in database().items() if spec.family == "dropout"}
    # of the masks see check_dropout; of ops whose samples do not fit a shard, check_placements
    elsewhere = {"embedding_bag", "geglu_mlp", "linear_cross_entropy"}
    expected = database().keys() - {"info_nce"} - elsewhere - masks
    assert followed == expected, followed ^ expected
    assert not refused & {
        name for name, spec in database().items() if spec.family in {"activation", "prelu"}
    }


def difference(spec, sample, placements, mesh, label):
    """The largest error of the output, its gradients and the gradients of a penalty on them,
    computed on DTensors. The gradient of a sharded tensor is sharded in the same way, where
    backward sees that tensor."""
    given = iter(placements)
    ours, stock = [], []
    for a in sample.args:
        if isinstance(a, torch.Tensor):
            ours.append(
                distribute_tensor(a.detach(), mesh, [next(given)]).requires_grad_(a.requires_grad)
            )
            stock.append(a.detach().clone().requires_grad_(a.requires_grad))
        else:
            ours.append(a)
            stock.append(a)
    # torch refuses the product of an expanded DTensor of one dimension, and has no second
    # derivative of per-sample weights
    vector = spec.family == "linear" and sample.args[0].dim() == 1
    twice = not vector and sample.name != "sum, per-sample weights"
    result = spec.function(*ours, **sample.kwargs)
    found = derivatives(
        result,
        ours,
        lambda t: distribute_tensor(t, mesh, [Replicate()]),
        twice,
    )
    expected = derivatives(spec.reference(*stock, **sample.kwargs), stock, lambda t: t, twice)
    leaves = [a for a in ours if isinstance(a, DTensor) and a.requires_grad]
    for leaf, gradient in zip(leaves, found[len(outputs(result)) :], strict=False):
        if leaf.numel() and any(p.is_shard() for p in leaf.placements):
            # the backward of rotary sees dy alone, which is replicated
            of = (Replicate(),) if spec.family == "rotary" else leaf.placements
            assert gradient.placements == of, f"{label}: {gradient.placements} of {of}"
    return max(map(error, map(whole, found), expected))


def error(mine, theirs):
    """The largest relative error. NaN and infinity must be where the reference has them, and
    nowhere else."""
    assert mine.shape == theirs.shape
    if not mine.numel():
        return 0.0
    if not torch.equal(mine.isnan(), theirs.isnan()):
        return torch.inf
    equal = (mine == theirs) | mine.isnan()
    return torch.where(equal, 0, (mine - theirs).abs() / (1 + theirs.abs())).max().item()


def derivatives(result, args, spread, twice=True):
    """The outputs and their gradients by a plain backward. With ``twice``, also by one that makes a
    graph, and the gradients of a penalty on those."""
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    ys = outputs(result)
    if not leaves:
        return [*ys]
    factors = [
        spread(torch.sin(1 + torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)) for y in ys
    ]
    plain = torch.autograd.grad(ys, leaves, factors, retain_graph=twice)
    if not twice:
        return [*ys, *plain]
    grads = torch.autograd.grad(ys, leaves, factors, create_graph=True)
    penalty = sum((g.sin().sum() for g in grads), spread(torch.zeros((), dtype=ys[0].dtype)))
    second = (
        torch.autograd.grad(penalty, leaves, materialize_grads=True)
        if penalty.requires_grad
        else []
    )
    return [*ys, *plain, *grads, *second]


def check_second_derivatives_of_classes(mesh):
    """The formulas of cross_entropy and nll_loss create tensors of their own, such as the indices
    of the classes, and combine them with DTensors."""
    for shape in ((6, 4), (4, 5, 3)):
        x, weight = (
            torch.randn(shape, dtype=torch.float64),
            torch.rand(shape[1], dtype=torch.float64),
        )
        classes = torch.randint(shape[1], shape[:1] + shape[2:])
        classes.view(-1)[1] = -100
        cases = [
            ("mean", Replicate()),
            ("sum", Shard(0)),
            ("none", Shard(0)),
            ("none", Shard(len(shape) - 1)),
            ("mean", Shard(0)),
        ]
        for name, target in (
            ("nll_loss", classes),
            ("cross_entropy", classes),
            ("cross_entropy", x.softmax(1)),
        ):
            for reduction, placement in cases:
                if placement == Shard(1):
                    continue
                of_target = Shard(1) if placement == Shard(2) and target is classes else placement
                options = {"reduction": reduction} | (
                    {"label_smoothing": 0.1} if name == "cross_entropy" else {}
                )
                stock_x, ours_x = (
                    x.clone().requires_grad_(),
                    distribute_tensor(x, mesh, [placement]).requires_grad_(),
                )
                spread = (
                    distribute_tensor(target, mesh, [of_target]),
                    distribute_tensor(weight, mesh, [Replicate()]),
                )
                expected = derivatives(
                    getattr(F, name)(stock_x, target, weight, **options), [stock_x], lambda t: t
                )
                if (reduction, placement) == ("mean", Shard(0)):
                    with pytest.raises(
                        NotImplementedError,
                        match="for a mean: reduction='sum', divided by the count",
                    ):
                        getattr(functional, name)(ours_x, *spread, **options)
                    continue
                loss = getattr(functional, name)(ours_x, *spread, **options)
                found = derivatives(
                    loss, [ours_x], lambda t: distribute_tensor(t, mesh, [Replicate()])
                )
                assert_close([whole(t) for t in found], expected, rtol=0, atol=1e-12)


def check_vocabulary_parallel(mesh):
    for classes, shape in ((4 * RANKS, (7,)), (4 * RANKS - 1, (3, 2))):
        x = 3 * torch.randn(shape[0], classes, *shape[1:], dtype=torch.float64)
        target = torch.randint(classes, shape)
        target.view(-1)[2] = -100
        target.view(-1)[0], target.view(-1)[1] = 0, classes - 1
        for smoothing in (0.0, 0.1):
            for reduction in ("mean", "sum", "none"):
                for shift in (0.0, 1e4):
                    shard, full = (
                        (x[:, mesh_part(classes)] + shift).requires_grad_(),
                        (x + shift).requires_grad_(),
                    )
                    options = {"reduction": reduction, "label_smoothing": smoothing}
                    loss = vocab_parallel_cross_entropy(
                        shard, target, mesh.get_group(), classes=classes, **options
                    )
                    expected = functional.cross_entropy(full, target, **options)
                    assert_close(loss, expected, rtol=0, atol=1e-12 if not shift else 1e-10)
                    factor = torch.sin(1 + torch.arange(loss.numel(), dtype=loss.dtype)).reshape(
                        loss.shape
                    )
                    loss.backward(factor)
                    expected.backward(factor)
                    assert_close(shard.grad, full.grad[:, mesh_part(classes)], rtol=0, atol=1e-12)
                    F.cross_entropy(
                        stock := full.detach().requires_grad_(), target, **options
                    ).backward(factor)
                    assert_close(shard.grad, stock.grad[:, mesh_part(classes)], rtol=0, atol=1e-10)


def check_confident_vocabulary_parallel(mesh):
    """A float32 loss and gradient keep their digits where 1 - p has none."""
    x = torch.randn(5, 2 * RANKS)
    target = torch.arange(5) % (2 * RANKS)
    x.scatter_(1, target.unsqueeze(1), x.amax(1, True) + torch.arange(5.0, 30.0, 5.0).unsqueeze(1))
    part, exact = x[:, mesh_part(2 * RANKS)].requires_grad_(), x.double().requires_grad_()
    loss = vocab_parallel_cross_entropy(part, target, mesh.get_group(), reduction="none")
    expected = functional.cross_entropy(exact, target, reduction="none")
    loss.sum().backward()
    expected.sum().backward()
    assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    assert_close(part.grad.double(), exact.grad[:, mesh_part(2 * RANKS)], rtol=2e-6, atol=0)


def mesh_part(classes):
    """The classes that DTensor gives to this rank."""
    share = -(-classes // RANKS)
    return slice(RANK * share, min(classes, (RANK + 1) * share))


def check_edges_of_vocabulary_parallel(mesh):
    x, target = torch.randn(3, 2), torch.tensor([0, 1, 2 * RANKS - 1])
    ignored = torch.full((3,), -100)
    logits = x.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(logits, ignored)
    loss.backward()
    assert loss.isnan()
    assert logits.grad.eq(0).all()
    half = vocab_parallel_cross_entropy(x.bfloat16(), target)
    assert half.dtype == torch.bfloat16
    assert_close(
        half.float(), vocab_parallel_cross_entropy(x.bfloat16().float(), target), rtol=1e-2, atol=0
    )
    with pytest.raises(IndexError, match="out of bounds"):
        vocab_parallel_cross_entropy(x, target + 1)
    with pytest.raises(ValueError, match=r"target \(2,\)"):
        vocab_parallel_cross_entropy(x, target[:2])
    with pytest.raises(ValueError, match="classes"):
        vocab_parallel_cross_entropy(x, target, classes=4 * RANKS)
    with pytest.raises(ValueError, match="too few"):
        vocab_parallel_cross_entropy(x, target, classes=RANKS - 1)
    with pytest.raises(ValueError, match="men"):
        vocab_parallel_cross_entropy(x, target, reduction="men")
    with pytest.raises(RuntimeError, match="int64"):
        vocab_parallel_cross_entropy(x, target.int())
    with pytest.raises(RuntimeError, match="label_smoothing"):
        vocab_parallel_cross_entropy(x, target, label_smoothing=1.5)
    (penalised,) = torch.autograd.grad(
        vocab_parallel_cross_entropy(logits, target), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        penalised.square().sum().backward()
    with pytest.raises(RuntimeError, match=r"logits.to_local\(\)"):
        vocab_parallel_cross_entropy(DTensor.from_local(x, mesh, [Shard(1)]), target)
    (first,) = torch.autograd.grad(
        vocab_parallel_cross_entropy(logits, target) ** 2, logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        first.sum().backward()


def cases_of_placements():
    """Name, function, inputs, their placements; then that of the output, and those of the
    gradients."""
    R, P, S = Replicate(), Partial(), Shard
    x, t, classes = torch.randn(4, 8), torch.rand(4, 8), torch.randint(8, (4,))
    W, b, slopes = torch.randn(8, 8), torch.randn(8), torch.rand(8)
    triples = torch.randn(3, 4, 8, 2)

    def by(reduction, name):
        return lambda *args: getattr(functional, name)(*args, reduction=reduction)

    def gelu_of_linear(*args):
        return functional.linear_activation(*args, activation="gelu")

    def layer_norm(x, weight, bias):
        return functional.layer_norm(x, [8], weight, bias)

    def rms_norm(x, weight):
        return functional.rms_norm(x, [8], weight)

    for name, function in (("linear", functional.linear), ("linear_activation", gelu_of_linear)):
        yield f"{name}, rows", function, (x, W, b), [S(0), R, R], S(0), [S(0), P, P]
        yield f"{name}, columns", function, (x, W, b), [R, S(0), S(0)], S(1), [P, S(0), S(0)]
    yield "linear, inner", functional.linear, (x, W, b), [S(1), S(1), R], P, [S(1), S(1), R]
    for i in range(2):
        yield "gelu", functional.gelu, (x,), [S(i)], S(i), [S(i)]
        for name in ("softmax", "log_softmax"):
            rows = partial(getattr(functional, name), dim=1 - i)
            yield name, rows, (x,), [S(i)], S(i), [S(i)]
        for name in ("mse_loss", "l1_loss", "kl_div"):
            both = [S(i), S(i)]
            yield f"{name}, none", by("none", name), (x, t), both, S(i), both
            yield f"{name}, sum", by("sum", name), (x, t), both, P, both
    yield "layer_norm", layer_norm, (x, slopes, b), [S(0), R, R], S(0), [S(0), P, P]
    yield "rms_norm", rms_norm, (x, slopes), [S(0), R], S(0), [S(0), P]
    yield "swiglu, halves", functional.swiglu, (x,), [S(0)], S(0), [S(0)]
    yield "swiglu, two tensors", functional.swiglu, (x, t), [S(1)] * 2, S(1), [S(1)] * 2
    bags = torch.randint(8, (4, 3))
    for mode in ("sum", "mean", "max"):
        look_up = partial(functional.embedding_bag, mode=mode)
        yield f"embedding_bag, {mode}", look_up, (bags, W), [R, S(1)], S(1), [S(1)]

    def weighted(index, weight, p):
        return functional.embedding_bag(index, weight, mode="sum", per_sample_weights=p)

    some = bags, W, torch.randn(4, 3)
    yield "embedding_bag, weighted", weighted, some, [R, S(1), R], S(1), [S(1), P]
    weights = W, torch.randn(8, 8), torch.randn(8, 8)
    for recompute, gated in product((False, True), (functional.swiglu_mlp, functional.geglu_mlp)):
        mlp = partial(gated, recompute=recompute)
        rows, columns = [S(0), R, R, R], [R, S(0), S(0), S(1)]
        yield f"{gated.__name__}, rows", mlp, (x, *weights), rows, S(0), [S(0), P, P, P]
        yield f"{gated.__name__}, columns", mlp, (x, *weights), columns, P, [P, *columns[1:]]
    for reduction, of in (("none", S(0)), ("sum", P)):
        loss = partial(functional.linear_cross_entropy, reduction=reduction)
        rows = [S(0), R, S(0)]
        yield f"linear_cross_entropy, {reduction}", loss, (x, W, classes), rows, of, [S(0), P]
    yield "normalize", functional.normalize, (x,), [S(0)], S(0), [S(0)]
    yield "prelu, rows", functional.prelu, (x, slopes), [S(0), R], S(0), [S(0), P]
    yield "prelu, channels", functional.prelu, (x, slopes), [S(1), S(0)], S(1), [S(1), S(0)]
    for name in ("cross_entropy", "nll_loss"):
        yield f"{name}, none", by("none", name), (x, classes), [S(0), S(0)], S(0), [S(0)]
        yield f"{name}, sum", by("sum", name), (x, classes), [S(0), S(0)], P, [S(0)]
    triplet = by("none", "triplet_margin_loss")
    yield "triplet, none", triplet, triples.unbind(), [S(0)] * 3, S(0), [S(0)] * 3
    yield (
        "triplet, sum",
        by("sum", "triplet_margin_loss"),
        triples[..., 0].unbind(),
        [S(0)] * 3,
        P,
        [S(0)] * 3,
    )


def weights_like(y):
    """The same on every rank, with no two elements alike."""
    return torch.linspace(-1, 2, y.numel()).view(y.shape)


def check_placements(mesh):
    """The placements of the output and the gradients of each op. Nothing is sent."""
    for name, function, tensors, placements, of_output, of_gradients in cases_of_placements():
        inputs = [distribute_tensor(t, mesh, [p]) for t, p in zip(tensors, placements, strict=True)]
        leaves = [t.requires_grad_() for t in inputs if t.is_floating_point()]
        with CommDebugMode() as sent:
            y = function(*inputs)
            dy = weights_like(torch.empty(y.shape))
            # every rank has the gradient of a sum
            of_dy = Replicate() if of_output.is_partial() else of_output
            y.backward(distribute_tensor(dy, mesh, [of_dy], src_data_rank=None))
        assert y.placements == (of_output,), name
        assert [leaf.grad.placements[0] for leaf in leaves] == of_gradients, name
        assert sent.get_total_counts() == 0, name
        stock = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
        expected = function(*stock)
        expected.backward(dy)
        assert_close(whole(y), expected, msg=name)
        for leaf, t in zip(leaves, (t for t in stock if t.requires_grad), strict=True):
            assert_close(whole(leaf.grad), t.grad, msg=name)


def check_in_place(mesh):
    x = torch.randn(4, 6)
    for placement in (Replicate(), Shard(0), Shard(1)):
        d = distribute_tensor(x, mesh, [placement])
        assert functional.relu(d, inplace=True) is d
        assert d.placements == (placement,)
        assert_close(whole(d), x.relu())


def check_partial_sums_are_summed(mesh):
    x = torch.randn(4, 6)
    parts = DTensor.from_local(x, mesh, [Partial()])
    assert_close(whole(functional.relu(parts)), (RANKS * x).relu())
    with pytest.raises(NotImplementedError, match="full_tensor"):
        functional.relu(parts, inplace=True)


def check_nan(mesh):
    """A NaN affects its row, on the rank that has it, and nothing else."""
    x = torch.randn(4, 6, dtype=torch.float64)
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    for name in ("softmax", "log_softmax"):
        for placement, dim in ((Shard(0), 1), (Shard(1), 0), (Replicate(), 1)):
            stock = x.clone().requires_grad_()
            ours = distribute_tensor(x, mesh, [placement]).requires_grad_()
            expected = derivatives(getattr(F, name)(stock, dim), [stock], lambda t: t, False)
            found = derivatives(
                getattr(functional, name)(ours, dim),
                [ours],
                lambda t: distribute_tensor(t, mesh, [Replicate()]),
                False,
            )
            assert 0 < expected[0].isnan().sum() < x.numel()
            assert max(map(error, map(whole, found), expected)) < 1e-12, (name, placement)


def check_refusals(mesh):
    """If a tensor would have to be gathered, the op raises and says what to do."""
    x = torch.randn(4, 6, dtype=torch.float64)
    d, target = distribute_tensor(x, mesh, [Shard(1)]), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="full_tensor"):
        functional.softmax(d, 1)
    with pytest.raises(NotImplementedError, match="reduction='sum'"):
        functional.mse_loss(d, d)
    with pytest.raises(NotImplementedError, match="vocab_parallel_cross_entropy"):
        functional.cross_entropy(d, distribute_tensor(target, mesh, [Replicate()]))
    with pytest.raises(RuntimeError, match=r"torch\.Tensor and DTensor"):
        functional.cross_entropy(d, target)
    rows = [distribute_tensor(torch.randn(4, 6), mesh, [Shard(0)]) for _ in range(3)]
    with pytest.raises(
        NotImplementedError, match="for a mean: reduction='sum', divided by the count"
    ):
        functional.triplet_margin_loss(*rows)
    with pytest.raises(NotImplementedError, match=r"full_tensor\(\).*only this rank's negatives"):
        functional.info_nce(*rows[:2])


def check_triplets(mesh):
    triples = torch.randn(3, 4, 6, 2, dtype=torch.float64)
    for i, reduction in ((0, "sum"), (1, "sum"), (1, "none")):
        stock = [t.clone().requires_grad_() for t in triples]
        ours = [distribute_tensor(t, mesh, [Shard(i)]).requires_grad_() for t in triples]
        options = {"swap": True, "reduction": reduction}
        expected = derivatives(F.triplet_margin_loss(*stock, **options), stock, lambda t: t)
        found = derivatives(
            functional.triplet_margin_loss(*ours, **options),
            ours,
            lambda t: distribute_tensor(t, mesh, [Replicate()]),
        )
        assert_close([whole(t) for t in found], expected, rtol=0, atol=1e-12)


def check_batch_norm_of_all_ranks(mesh):
    """Under DDP, against one process with the whole batch; a rank without samples too."""
    for sizes in ([3, 1, 4, 2], [0, 2, 5, 1]):
        whole_x = torch.randn(sum(sizes[:RANKS]), 3, 4, dtype=torch.float64) + 7
        dy = torch.randn_like(whole_x)
        dist.broadcast(whole_x, 0)
        dist.broadcast(dy, 0)
        rows = slice(sum(sizes[:RANK]), sum(sizes[: RANK + 1]))
        stock = torch.nn.BatchNorm1d(3, momentum=None, dtype=torch.float64)
        stock.weight.data.copy_(torch.tensor([2.0, -1.0, 0.5]))
        alone, x = stock(whole_x.requires_grad_()), whole_x[rows].detach().requires_grad_()
        dx, *expected = torch.autograd.grad(alone, [whole_x, stock.weight, stock.bias], dy)
        ours = nn.SyncBatchNorm(3, momentum=None, dtype=torch.float64)
        ours.weight.data.copy_(stock.weight.data)
        with mock.patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle"):
            model = DistributedDataParallel(ours)  # it refuses stock's, which needs a GPU
        y = model(x)
        y.backward(dy[rows] * RANKS)  # DDP divides by it
        assert_close(y, alone[rows], rtol=1e-12, atol=1e-12)
        assert_close(x.grad, dx[rows] * RANKS, rtol=1e-12, atol=1e-12)
        assert_close([ours.weight.grad, ours.bias.grad], expected, rtol=1e-12, atol=1e-12)
        assert_close(list(ours.buffers()), list(stock.buffers()), rtol=1e-12, atol=1e-12)
        assert_close(ours.eval()(x), stock.eval()(x), rtol=1e-12, atol=1e-12)


def check_batch_norm_of_all_ranks_without_parameters(mesh):
    """Channels last."""
    whole_x, dy = torch.randn(2, RANKS, 3, 2, 2, dtype=torch.float64)
    dist.broadcast(whole_x, 0)
    dist.broadcast(dy, 0)
    whole_x = whole_x.contiguous(memory_format=torch.channels_last).requires_grad_()
    x = whole_x[RANK : RANK + 1].detach().requires_grad_()
    y = F.batch_norm(whole_x, None, None, training=True)
    (expected,) = torch.autograd.grad(y, whole_x, dy)
    ours = nn.SyncBatchNorm(3, affine=False, dtype=torch.float64)
    (dx,) = torch.autograd.grad(ours(x), x, dy[RANK : RANK + 1])
    assert_close(dx, expected[RANK : RANK + 1], rtol=1e-12, atol=1e-12)


def check_batch_norm_of_all_ranks_has_no_second_derivative(mesh):
    x = torch.randn(2, 3, requires_grad=True)
    y = nn.SyncBatchNorm(3)(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def check_dropout(mesh):
    """Torch draws the mask, and each rank that of its shard. A seed is that of a whole tensor."""
    x = torch.rand(16, 64, dtype=torch.float64) + 1
    d = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    seed = torch.tensor(3)
    for call in (
        lambda: functional.dropout(d, 0.3),
        lambda: functional.dropout_add(d, torch.zeros_like(d), 0.3),
    ):
        with quiet():  # torch's generators on a CPU are those of the ranks
            y = call()
        kept = (whole(y) != 0).double()
        assert 0.5 < kept.mean() < 0.9
        assert_close(whole(y), kept * x / 0.7, rtol=0, atol=1e-12)
        (dx,) = torch.autograd.grad(y.sum(), d)
        assert_close(whole(dx), kept / 0.7, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match=r"torch\.Tensor and DTensor"):
        functional.dropout(d, 0.3, seed=seed)
    replicated = [distribute_tensor(t, mesh, [Replicate()]) for t in (x, seed)]
    y = functional.dropout(replicated[0], 0.3, seed=replicated[1])
    assert torch.equal(whole(y), functional.dropout(x, 0.3, seed=seed))
    attention = functional.scaled_dot_product_attention
    q, r = (t.view(2, 2, 4, 64) for t in (x, replicated[0]))
    y = attention(r, r, r, dropout_p=0.3, seed=replicated[1])
    assert torch.equal(whole(y), attention(q, q, q, dropout_p=0.3, seed=seed))
    with pytest.raises(RuntimeError, match="dropout of DTensors needs a seed"):
        attention(r, r, r, dropout_p=0.3)


class Words(torch.nn.Module):
    """A language model, which returns the loss and the logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 6)
        self.head = torch.nn.Linear(6, 11)

    def forward(self, ids):
        logits = self.head(self.body(self.table(ids)).tanh())
        return F.cross_entropy(logits.view(-1, 11), ids.view(-1)), logits


def by_fsdp(model, *parts):
    for part in (*parts, model):
        fully_shard(part)
    return model


def check_deferred_logits(mesh):
    """Under DDP and FSDP the loss is fused with a head that is whole, and right with any other."""
    ids = torch.arange(12).view(3, 4) % 11
    wrappers = (
        (DistributedDataParallel, True),
        (partial(DistributedDataParallel, static_graph=True), False),
        (partial(DistributedDataParallel, find_unused_parameters=True), False),
        (by_fsdp, True),
        (lambda model: by_fsdp(model, model.head), False),
    )
    stock = Words()
    stock(ids)[0].backward()
    for wrapped, is_fused in wrappers:
        with quiet(), mock.patch.object(deferred, "LEAST", 0):
            model = wrapped(patch(Words()))
            loss, logits = model(ids)
            loss.backward()
        assert is_fused == (isinstance(logits, deferred.Deferred) and not logits.is_made())
        for a, b in zip(model.parameters(), stock.parameters(), strict=True):
            assert_close(whole(a.grad), b.grad)


def main(rank, ranks):
    global RANK, RANKS
    RANK, RANKS = rank, ranks
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = f"file://{FOLDER}/store-{ranks}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (ranks,))
    for name, check in list(globals().items()):
        if name.startswith("check_") and (ranks == 2 or check is not check_ops_of_the_database):
            check(mesh)
            dist.barrier()
            if rank == 0:
                print("ok", ranks, name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    for count in map(int, sys.argv[2:]):
        start_processes(main, (count,), nprocs=count, start_method="fork")
