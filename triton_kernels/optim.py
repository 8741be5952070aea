"""One launch that updates any number of tensors, whatever the rule.

The addresses of parameters, gradients and states stand in a table on the device, made once.
Gradients at addresses that neither of the last two different steps had cost one small asynchronous
copy. Each program looks up its tensor and updates ROUNDS blocks of it. Nothing is read back.

Rules: ``custom_backprop/formulas/optim.py``. A device function takes θ, g, three states and
numbers, all in the accumulator's dtype. The hyperparameters come in float64, and 1 - β is taken
before it is rounded: in float32, 1 - 0.999 would be off by 5e-5.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from .elementary import expm1
from .launch import Launch, accumulator, cdiv, kernel, planned

BLOCK, ROUNDS = 1024, 4

_TYPES = {getattr(torch, t): getattr(tl, t) for t in ("float64", "float32", "float16", "bfloat16")}


@triton.jit
def _decay(rate, p):
    """rate θ; 0 without a decay even where θ is infinite or NaN."""
    return tl.where(rate == 0, 0.0, rate * p)


@triton.jit
def sgd(p, g, m, s1, s2, t, bias_a, bias_b, lr, decay, momentum, dampening, rest_a, undamped, eps,
        NESTEROV: tl.constexpr, STATES: tl.constexpr, FRESH: tl.constexpr):  # fmt: skip
    g = g + _decay(decay, p)
    d = g
    if STATES:
        m = g if FRESH else momentum * m + undamped * g
        d = g + momentum * m if NESTEROV else m
    return p - lr * d, m, s1, s2


@triton.jit
def adagrad(p, g, s, s1, s2, t, bias_a, bias_b, lr, decay, lr_decay, b, rest_a, rest_b, eps,
            FLAG: tl.constexpr, STATES: tl.constexpr, FRESH: tl.constexpr):  # fmt: skip
    g = g + _decay(decay, p)
    s = s + g * g
    return p - lr / (1 + (t - 1) * lr_decay) * g / (tl.sqrt(s) + eps), s, s1, s2


@triton.jit
def rmsprop(p, g, v, m, a, t, bias_a, bias_b, lr, decay, alpha, momentum, rest, rest_b, eps,
            CENTERED: tl.constexpr, STATES: tl.constexpr, FRESH: tl.constexpr):  # fmt: skip
    g = g + _decay(decay, p)
    v = alpha * v + rest * g * g
    w = v
    if CENTERED:
        a = a + rest * (g - a)
        w = v - a * a
    u = g / (tl.sqrt(w) + eps)
    if STATES & 2:
        m = momentum * m + u
        u = m
    return p - lr * u, v, m, a


@triton.jit
def adam(p, g, m, v, w, t, bias_a, bias_b, lr, decay, beta1, beta2, rest1, rest2, eps,
         DECOUPLED: tl.constexpr, STATES: tl.constexpr, FRESH: tl.constexpr):  # fmt: skip
    if DECOUPLED:
        p = p - _decay(lr * decay, p)
    else:
        g = g + _decay(decay, p)
    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    w = tl.where((v > w) | (v != v), v, w) if STATES & 4 else v
    return p - lr / bias_a * m / (tl.sqrt(w) / tl.sqrt(bias_b) + eps), m, v, w


@triton.jit
def lion(p, g, m, s1, s2, t, bias_a, bias_b, lr, decay, beta1, beta2, rest1, rest2, eps,
         FLAG: tl.constexpr, STATES: tl.constexpr, FRESH: tl.constexpr):  # fmt: skip
    c = m + rest1 * (g - m)
    sign = (c > 0).to(p.dtype) - (c < 0).to(p.dtype)
    return p - _decay(lr * decay, p) - lr * sign, m + rest2 * (g - m), s1, s2


@triton.jit
def _address(entry, which, tensors, T: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in row ``which`` of the table. ALIGNED, which the compiler cannot see in a table,
    makes loads and stores 128 bits wide."""
    address = tl.load(entry + which * tensors).to(tl.pointer_type(T))
    return tl.multiple_of(address, ALIGNED)


@triton.jit
def _block(
    entry, tensors, start, inside, offsets, key, scale,
    t, bias_a, bias_b, lr, decay, a, b, rest_a, rest_b, eps,
    RULE: tl.constexpr, P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr,
    STATES: tl.constexpr, MASTER: tl.constexpr, FLAG: tl.constexpr, FRESH: tl.constexpr,
    MAXIMIZE: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Updates one block of one tensor; ``inside`` is None where all of the block is."""
    param = _address(entry, 2, tensors, P, ALIGNED) + start + offsets
    g = tl.load(_address(entry, 3, tensors, G, ALIGNED) + start + offsets, inside).to(ACC)
    if MASTER:
        master = _address(entry, 4, tensors, ACC, ALIGNED) + start + offsets
        p = tl.load(master, inside)
    else:
        p = tl.load(param, inside).to(ACC)
    if scale is not None:
        g = g * scale
    if MAXIMIZE:
        g = -g
    s0, s1, s2 = p, p, p
    if STATES & 1:
        state0 = _address(entry, 5, tensors, S, ALIGNED) + start + offsets
        s0 = tl.load(state0, inside).to(ACC)
    if STATES & 2:
        state1 = _address(entry, 6, tensors, S, ALIGNED) + start + offsets
        s1 = tl.load(state1, inside).to(ACC)
    if STATES & 4:
        state2 = _address(entry, 7, tensors, S, ALIGNED) + start + offsets
        s2 = tl.load(state2, inside).to(ACC)
    p, s0, s1, s2 = RULE(
        p, g, s0, s1, s2, t, bias_a, bias_b, lr, decay, a, b, rest_a, rest_b, eps,
        FLAG, STATES, FRESH,
    )  # fmt: skip
    if MASTER:
        tl.store(master, p, inside)
    if STOCHASTIC:  # float32 rounded up or down to bfloat16's bits
        bits = p.to(tl.int32, bitcast=True) + (tl.randint(key, offsets) & 0xFFFF).to(tl.int32)
        p = tl.where(tl.abs(p) < float("inf"), (bits & -65536).to(tl.float32, bitcast=True), p)
    tl.store(param, p.to(P), inside)
    if STATES & 1:
        tl.store(state0, s0.to(S), inside)
    if STATES & 2:
        tl.store(state1, s1.to(S), inside)
    if STATES & 4:
        tl.store(state2, s2.to(S), inside)


@kernel
def _update(
    TABLE, WHICH, STEPS, SCALE, FOUND, tensors, seed, lr: tl.float64, decay: tl.float64,
    a: tl.float64, b: tl.float64, eps: tl.float64, log_a: tl.float64, log_b: tl.float64,
    RULE: tl.constexpr, P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr,
    STATES: tl.constexpr, MASTER: tl.constexpr, FLAG: tl.constexpr, FRESH: tl.constexpr,
    MAXIMIZE: tl.constexpr, STOCHASTIC: tl.constexpr, BIAS: tl.constexpr, ALIGNED: tl.constexpr,
    ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """WHICH names a program's tensor; the table has a column for each: elements, first program,
    addresses of θ, g, master, states.

    FOUND (not 0: do nothing) and SCALE (of the gradients) are numbers on the device, or None. BIAS:
    the rule divides by 1 - βᵗ, which is -expm1(t log β), so that no digits are lost where βᵗ is
    near 1.
    """
    program = tl.program_id(0)
    i = tl.load(WHICH + program)
    entry = TABLE + i
    left = tl.load(entry)
    start = (program - tl.load(entry + tensors)) * (BLOCK * ROUNDS)
    if FOUND is not None:
        left = tl.where(tl.load(FOUND) != 0, 0, left)
    rest_a, rest_b = tl.full((), 1 - a, ACC), tl.full((), 1 - b, ACC)
    lr, decay = tl.full((), lr, ACC), tl.full((), decay, ACC)
    a, b, eps = tl.full((), a, ACC), tl.full((), b, ACC), tl.full((), eps, ACC)
    scale = None if SCALE is None else tl.load(SCALE).to(ACC)
    t = eps if STEPS is None else tl.load(STEPS + i).to(ACC)
    bias_a, bias_b = t, t
    if BIAS:
        bias_a = -expm1(t * tl.full((), log_a, ACC))
        bias_b = -expm1(t * tl.full((), log_b, ACC))
    offsets = tl.arange(0, BLOCK)
    for k in range(ROUNDS):
        key = seed + program.to(tl.int64) * ROUNDS + k
        if start + BLOCK <= left:
            _block(
                entry, tensors, start, None, offsets, key, scale,
                t, bias_a, bias_b, lr, decay, a, b, rest_a, rest_b, eps,
                RULE, P, G, S, ACC, STATES, MASTER, FLAG, FRESH, MAXIMIZE, STOCHASTIC, ALIGNED,
            )  # fmt: skip
        elif start < left:
            _block(
                entry, tensors, start, offsets < left - start, offsets, key, scale,
                t, bias_a, bias_b, lr, decay, a, b, rest_a, rest_b, eps,
                RULE, P, G, S, ACC, STATES, MASTER, FLAG, FRESH, MAXIMIZE, STOCHASTIC, ALIGNED,
            )  # fmt: skip
        start += BLOCK


#: rule -> (device function, the hyperparameters it calls a and b, its flag); ``betas`` fill both
_RULES: dict[str, tuple[Any, str, str, str]] = {
    "sgd": (sgd, "momentum", "dampening", "nesterov"),
    "adagrad": (adagrad, "lr_decay", "", ""),
    "rmsprop": (rmsprop, "alpha", "momentum", "centered"),
    "adam": (adam, "betas", "betas", "decoupled_weight_decay"),
    "lion": (lion, "betas", "betas", ""),
}


class Table:
    """The tensors that one launch updates, as the kernel finds them.

    Args:
        params: flat parameters of one dtype and device.
        states: up to three lists of flat states, None in the place of one that is absent; all of
            one dtype, that of ``params`` or float32.
        masters: float32 copies of ``params``, which are then rounded from them.
    """

    def __init__(
        self, params: list[Tensor], states: list[list[Tensor] | None], masters: list[Tensor] | None
    ) -> None:
        self.params, self.states, self.masters = params, states, masters
        self.device, self.tensors = params[0].device, len(params)
        which: list[int] = []
        first: list[int] = []
        for i, p in enumerate(params):
            first.append(len(which))
            which += [i] * cdiv(p.numel(), BLOCK * ROUNDS)
        state = next((s[0].dtype for s in states if s is not None), accumulator(params[0].dtype))
        present = sum(2**i for i, s in enumerate(states) if s is not None)
        self._layout = params[0].dtype, state, present, masters is not None, ROUNDS, BLOCK
        self.programs = len(which)
        absent = [0] * self.tensors
        rows = [[p.numel() for p in params], first]
        rows += [
            absent if t is None else list(map(Tensor.data_ptr, t))
            for t in (params, None, masters, *states, *[None] * (3 - len(states)))
        ]
        self._else_aligned = not any(address % 16 for row in rows[2:] for address in row)
        self._table = self._on_host(rows, torch.int64).to(self.device, non_blocking=True)
        self.which = self._on_host(which, torch.int32).to(self.device, non_blocking=True)
        #: (addresses of gradients, the table that has them, whether all addresses are multiples of
        #: 16), the last used first
        self._seen: list[tuple[list[int], Tensor, bool]] = []
        self._captured: list[Tensor] = []
        self._plans: dict[tuple[Any, ...], Launch] = {}

    def _on_host(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        """Values to copy without waiting for the device. torch reuses pinned memory only when the
        copies from it are done."""
        pinned = self.device.type == "cuda"
        return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=pinned)

    def see(self, grads: list[Tensor]) -> tuple[Tensor, bool]:
        """The table with the addresses of these gradients, and whether every address is a multiple
        of 16.

        There are two tables, since an allocator often hands out two sets of addresses in turn. The
        copy of a third set overwrites the table used longer ago, in the order of the stream.
        """
        addresses = list(map(Tensor.data_ptr, grads))
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._capture(addresses), self._is_aligned(addresses)
        seen = self._seen
        if not seen or seen[0][0] != addresses:
            if len(seen) == 2:
                seen.reverse()
            if not seen or seen[0][0] != addresses:
                table = seen.pop(0)[1] if len(seen) == 2 else self._table.clone()
                table[3].copy_(self._on_host(addresses, torch.int64), non_blocking=True)
                seen.insert(0, (addresses, table, self._is_aligned(addresses)))
        return seen[0][1:]

    def _is_aligned(self, addresses: list[int]) -> bool:
        return self._else_aligned and not any(a % 16 for a in addresses)

    def _capture(self, addresses: list[int]) -> Tensor:
        """A table for one CUDA graph alone. Each replay copies the addresses again, so the memory
        that they come from is kept, and no step outside of the graph uses either."""
        table, on_host = self._table.clone(), self._on_host(addresses, torch.int64)
        table[3].copy_(on_host, non_blocking=True)
        self._captured += [table, on_host]
        return table

    def plan(self, *variant: Any) -> Launch:
        """The launch for a rule, the gradients' dtype, and the flags of :func:`plan`."""
        found = self._plans.get(variant)
        if found is None:
            found = self._plans[variant] = plan(self.programs, *variant, *self._layout)
        return found


@planned
def plan(
    programs: int, rule: str, g: torch.dtype, flag: bool, fresh: bool, maximize: bool,
    stochastic: bool, aligned: bool, p: torch.dtype, state: torch.dtype, states: int, master: bool,
    rounds: int, block: int,
) -> Launch:  # fmt: skip
    """A step of ``rule`` for tensors of these dtypes; its numbers differ at every step."""
    acc = accumulator(p)
    return _update.launch(
        programs, num_warps=8 if acc == torch.float64 else 4, RULE=_RULES[rule][0],
        P=_TYPES[p], G=_TYPES[g], S=_TYPES[state], ACC=_TYPES[acc], STATES=states, MASTER=master,
        FLAG=flag, FRESH=fresh, MAXIMIZE=maximize, STOCHASTIC=stochastic, BIAS=rule == "adam",
        ALIGNED=16 if aligned else 1, ROUNDS=rounds, BLOCK=block,
    )  # fmt: skip


def update(
    rule: str, table: Table, grads: list[Tensor], steps: Tensor | None, hyper: dict[str, Any], *,
    scale: Tensor | None = None, found_inf: Tensor | None = None, fresh: bool = False,
    seed: int | None = None,
) -> None:  # fmt: skip
    """One step of ``rule`` for all tensors of a table, in place.

    Args:
        grads: contiguous gradients, of one dtype.
        steps: the number of this step for each tensor, where the rule asks for it.
        hyper: the rule's hyperparameters, as in its formula: flags, and numbers of type float.
        scale: what gradients are multiplied by, one element on their device.
        found_inf: one element on their device; nothing is done unless it is 0.
        fresh: the states hold nothing yet (SGD's first step).
        seed: round bfloat16 parameters at random, by this seed.
    """
    if not isinstance(_update.jit, JITFunction) and table.device.type != "meta":
        tensors = [*table.params, *grads, *(t for s in table.states if s for t in s)]
        # the interpreter cannot compute in bfloat16: see launch.py
        if any(t.dtype == torch.bfloat16 for t in tensors):
            options: Any = {"scale": scale, "found_inf": found_inf, "fresh": fresh, "seed": seed}
            _in_float32(rule, table, grads, steps, hyper, **options)
            return
    _, first, second, flag = _RULES[rule]
    a, b = hyper["betas"] if first == "betas" else (hyper[first], hyper.get(second, 0.0))
    log_a, log_b = (math.log(v) if v > 0 else -math.inf for v in (a, b))
    flags = bool(hyper.get(flag, False)), fresh, bool(hyper["maximize"]), seed is not None
    addresses, aligned = table.see(grads)
    table.plan(rule, grads[0].dtype, *flags, aligned)(
        addresses, table.which, steps, scale, found_inf, tensors=table.tensors,
        seed=(seed or 0) | 1 | 2**40, lr=hyper["lr"], decay=hyper["weight_decay"], a=a, b=b,
        eps=hyper.get("eps", 0.0), log_a=log_a, log_b=log_b,
    )  # fmt: skip


def _in_float32(rule: str, table: Table, grads: list[Tensor], *args: Any, **kwargs: Any) -> None:
    """The same on float32 copies, rounded back."""
    states = [s and [t.float() for t in s] for s in table.states]
    wide = Table([p.float() for p in table.params], states, table.masters)
    update(rule, wide, [g.float() for g in grads], *args, **kwargs)
    for ours, theirs in zip([table.params, *table.states], [wide.params, *states], strict=True):
        if ours is not None and theirs is not None:
            torch._foreach_copy_(ours, theirs)
