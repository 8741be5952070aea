"""Those who watch: hooks of tensors and of nodes, and of what is saved for backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..case import Case, outputs, weights_for
from ..outcome import NotApplicable, NotOffered, feature, first_sample
from .compare import equal, outputs_of, require, same, transposed
from .determinism import seeded


@first_sample
def hooks(case: Case) -> None:
    """A hook of an output sees its incoming gradient, and backward gets what the hook returns; one
    of an input sees the input's gradient once, as does one that runs after it was accumulated; one
    of ``grad_fn`` runs once.

    Finds a backward that writes into ``.grad`` by itself, or starts another backward for a part of
    the graph: clipping and data-parallel training, which are hooks, then miss gradients.
    """
    results, leaves, dys = _graph(case)
    with seeded(case):
        doubled = torch.autograd.grad(
            results, leaves, [2 * dy for dy in dys], retain_graph=True, allow_unused=True
        )
    at_outputs: list[Tensor] = []

    def double(dy: Tensor) -> Tensor:
        at_outputs.append(dy)
        return 2 * dy

    at_inputs: dict[int, list[Tensor]] = {i: [] for i in range(len(leaves))}
    after: dict[int, int] = dict.fromkeys(at_inputs, 0)
    ran: list[Node] = []
    nodes = {r.grad_fn for r in results if r.grad_fn is not None}
    registered = [node.register_hook(lambda *_, node=node: ran.append(node)) for node in nodes]
    for r in {id(r): r for r in results}.values():
        registered.append(r.register_hook(double))
    for i, leaf in enumerate(leaves):
        registered.append(leaf.register_hook(at_inputs[i].append))
        registered.append(
            leaf.register_post_accumulate_grad_hook(
                lambda _, i=i: after.__setitem__(i, after[i] + 1)
            )
        )
    with seeded(case):
        torch.autograd.backward(results, dys)
    for hook in registered:
        hook.remove()
    if len({id(r) for r in results}) == len(results):
        same(at_outputs, _in_order(at_outputs, dys), "what hooks of outputs saw")
    equal(len(ran), len(nodes), "runs of the nodes that made the outputs")
    for i, (leaf, expected) in enumerate(zip(leaves, doubled, strict=True)):
        times = int(expected is not None)
        equal(len(at_inputs[i]), times, f"gradients of input {i} that its hook saw")
        equal(after[i], times, f"accumulations into input {i}")
        same((leaf.grad,), (expected,), f"gradient of input {i} if a hook doubled those of outputs")
        same(at_inputs[i], [expected][:times], f"the gradient of input {i} that its hook saw")


def _in_order(seen: list[Tensor], dys: tuple[Tensor, ...]) -> list[Tensor]:
    """The incoming gradients in the order in which autograd came to them."""
    left, found = list(dys), []
    for s in seen:
        k = next((k for k, d in enumerate(left) if d.shape == s.shape and torch.equal(d, s)), 0)
        found.append(left.pop(k) if left else s.new_zeros(()))
    return found + left


@feature
@first_sample
def saved_tensors(case: Case) -> None:
    """All that is kept for backward goes through ``save_for_backward``: nothing is an attribute of
    ``ctx``. Gradients are the same if what was saved was packed away and comes back in contiguous
    copies, as from ``save_on_cpu``, and under checkpointing.

    Finds ``ctx.x = x``: checkpointing and offloading do not free it, and backward does not notice
    that it was changed. For an argument or an output that is wrong; for other tensors it is not
    offered. Finds strides that forward noted of a tensor that comes back with others.
    """
    results, leaves, dys = _graph(case)
    given = {t.untyped_storage().data_ptr() for t in (*leaves, *results)}
    given |= {
        a.untyped_storage().data_ptr()
        for a in (*case.args, *case.kwargs.values())
        if isinstance(a, Tensor)
    }
    unseen = []
    for name, t in outside(results):
        require(
            case.isolated or not t.numel() or t.untyped_storage().data_ptr() not in given,
            f"{name} is an argument or an output, of shape {tuple(t.shape)}, and not in "
            "save_for_backward",
        )
        unseen.append(f"{name}, of shape {tuple(t.shape)}")
    strided = [transposed(leaf.detach()).requires_grad_() for leaf in leaves]
    found = []
    for pack in (Tensor.detach, _contiguous):
        with seeded(case), torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
            packed = [r for r in outputs(case.call(*strided)) if r.requires_grad]
            found.append(torch.autograd.grad(packed, strided, dys, allow_unused=True))
    expected, grads = found
    same(grads, expected, "gradients from saved tensors that came back as contiguous copies")
    with seeded(case):
        again = [
            r for r in checkpoint(outputs_of(case), *leaves, use_reentrant=False) if r.requires_grad
        ]
    expected = torch.autograd.grad(results, leaves, dys, allow_unused=True)
    grads = torch.autograd.grad(again, leaves, dys, allow_unused=True)
    same(grads, expected, "gradients under torch.utils.checkpoint")
    if unseen:
        raise NotOffered(f"hooks of saved tensors do not see {', '.join(unseen)}")


def _graph(case: Case) -> tuple[list[Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(outputs that require grad, leaves, incoming gradients)."""
    leaves = case.leaves
    with seeded(case):
        results = [r for r in outputs(case.call(*leaves)) if r.requires_grad]
    if not results:
        raise NotApplicable("no output requires grad")
    return results, leaves, weights_for(results)


def _contiguous(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.contiguous_format)


def nodes_of(results: list[Tensor]) -> Iterator[Any]:
    """All nodes of a graph."""
    seen: set[Any] = set()
    left: list[Any] = [r.grad_fn for r in results]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        left += [further for further, _ in node.next_functions]


def outside(results: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are attributes of a Function's context."""
    for node in nodes_of(results):
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            for name, value in sorted(vars(node).items()):
                for t in tree_leaves(value):
                    if isinstance(t, Tensor):
                        yield f"ctx.{name} of {type(node).__name__}", t
