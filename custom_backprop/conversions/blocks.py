"""The blocks of Hugging Face models in which neighbours are run as one op: their forwards, as they
are known here, and ours.

A class is known by what its forward says, not by its name. Its statements must be those of one of
:data:`KNOWN`, up to the names of variables and to parameters that are only handed on. A release
that changes a forward makes it unknown, and the block stays as it is.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .joined import add_norm, dropout_add, linear_activation

#: the decorators of a forward that change at most the names of its arguments
HARMLESS = ("auto_docstring", "deprecate_kwarg")


@dataclass(frozen=True)
class Known:
    """A forward that is known.

    Attributes:
        source: as a function; calls hand on what they get as ``**rest``.
        parameters: the names that theirs has for those of ``source``, without self.
        forward: ``forward(base, on)`` gives ours, with the fusions ``on``.
        fusions: each fusion that there is, and the names of the modules that it does not call.
    """

    source: str
    parameters: tuple[str, ...]
    forward: Callable[[Any, frozenset[str]], Callable[..., Any]]
    fusions: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Block:
    """Of the class of a block, the subclass by ours for the known forward of that name."""

    kind: str
    on: frozenset[str]

    def __call__(self, base: Any) -> dict[str, Any]:
        made = KNOWN[self.kind].forward(base, self.on)
        return {"forward": functools.wraps(base.forward)(made)}


def _output(base, on):
    def forward(self, hidden_states, input_tensor):
        x = self.dense(hidden_states)
        return add_norm(self.LayerNorm, x, input_tensor, on, self.dropout)[0]

    return forward


def _decoder(base, on):
    _, _, *rest = inspect.signature(base.forward).parameters.values()
    names = [p.name for p in rest if p.kind is not p.VAR_KEYWORD]
    defaults = {p.name: p.default for p in rest if p.default is not p.empty}

    def forward(self, hidden_states, *args, **named):
        if len(args) > len(names):  # an error, and its own
            return base.forward(self, hidden_states, *args, **named)
        given = {**defaults, **dict(zip(names, args, strict=False)), **named}
        x, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
        x, residual = add_norm(self.post_attention_layernorm, x, hidden_states, on)
        return residual + self.mlp(x)

    return forward


def _encoder(base, on):
    def forward(self, hidden_states, attention_mask=None, **rest):
        x = self.layernorm_before(hidden_states)
        x, _ = self.attention(x, attention_mask, **rest)
        x, residual = add_norm(self.layernorm_after, x, hidden_states, on, self.dropout)
        return dropout_add(self.dropout, self.mlp(x), residual, on)

    return forward


def _intermediate(base, on):
    def forward(self, hidden_states):
        return linear_activation(self.dense, self.intermediate_act_fn, hidden_states)

    return forward


def _mlp(base, on):
    def forward(self, hidden_states):
        return self.fc2(linear_activation(self.fc1, self.activation_fn, hidden_states))

    return forward


KNOWN = {
    "output": Known(
        """def forward(self, x, residual):
            x = self.dense(x)
            x = self.dropout(x)
            x = self.LayerNorm(x + residual)
            return x""",
        ("hidden_states", "input_tensor"),
        _output,
        (("dropout_add", ("dropout",)), ("add_norm", ("LayerNorm",))),
    ),
    "decoder": Known(
        """def forward(self, x, **rest):
            residual = x
            x = self.input_layernorm(x)
            x, _ = self.self_attn(hidden_states=x, **rest)
            x = residual + x
            residual = x
            x = self.post_attention_layernorm(x)
            x = self.mlp(x)
            x = residual + x
            return x""",
        ("hidden_states",),
        _decoder,
        (("add_norm", ("post_attention_layernorm",)),),
    ),
    "encoder": Known(
        """def forward(self, x, mask=None, **rest):
            residual = x
            x = self.layernorm_before(x)
            x, _ = self.attention(x, mask, **rest)
            x = self.dropout(x)
            x = x + residual
            residual = x
            x = self.layernorm_after(x)
            x = self.mlp(x)
            x = self.dropout(x)
            x = x + residual
            return x""",
        ("hidden_states", "attention_mask"),
        _encoder,
        (("dropout_add", ("dropout",)), ("add_norm", ("layernorm_after",))),
    ),
    "intermediate": Known(
        """def forward(self, x):
            x = self.dense(x)
            x = self.intermediate_act_fn(x)
            return x""",
        ("hidden_states",),
        _intermediate,
        (("linear_activation", ("dense", "intermediate_act_fn")),),
    ),
    "mlp": Known(
        """def forward(self, x):
            x = self.fc1(x)
            x = self.activation_fn(x)
            x = self.fc2(x)
            return x""",
        ("hidden_states",),
        _mlp,
        (("linear_activation", ("fc1", "activation_fn")),),
    ),
}


def looks_like(names: set[str]) -> str | None:
    """Which of the known forwards uses just the modules of these names."""
    return next((kind for kind, used in _modules_used().items() if used == names), None)


def is_known(cls: Any, kind: str) -> bool:
    """Whether the forward of just this class says what the known one of that name says."""
    its = getattr(inspect.unwrap(cls.forward), "__qualname__", "")
    return its == f"{cls.__qualname__}.forward" and _says(cls.forward, kind)


@functools.cache
def _says(forward, kind):
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))
        (found,) = ast.parse(source).body
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, or of no def
        return False
    (known,) = ast.parse(KNOWN[kind].source).body
    given, expected = _normal(found), _normal(known)
    return given is not None and given[1:] == expected[1:] and given[0] == KNOWN[kind].parameters


def _normal(function):
    """The parameters of a function without what it only hands on, their defaults, and the
    statements with the variables numbered. None if it may do more than these say."""
    if not isinstance(function, ast.FunctionDef) or not all(
        map(_harmless, function.decorator_list)
    ):
        return None
    given = function.args
    names = [a.arg for a in (*given.args, *given.kwonlyargs)]
    handed_on = set()
    for call in ast.walk(function):
        if isinstance(call, ast.Call) and any(k.arg is None for k in call.keywords):
            on = {k.arg for k in call.keywords if _names_itself(k) and k.arg in names[2:]}
            call.keywords = [k for k in call.keywords if k.arg not in on]
            handed_on |= on
    values = [*given.defaults, *given.kw_defaults]
    defaults = dict(zip(reversed(names), reversed(values), strict=False))
    stay = [name for name in names if name not in handed_on]
    rest = [None if a is None else a.arg for a in (given.vararg, given.kwarg)]
    numbers = {name: f"v{i}" for i, name in enumerate([*stay, *filter(None, rest)])}
    body = function.body[ast.get_docstring(function) is not None :]
    for name in (n for statement in body for n in ast.walk(statement)):
        if isinstance(name, ast.Name):
            name.id = numbers.setdefault(name.id, f"v{len(numbers)}")
    of_stay = ["" if (d := defaults.get(n)) is None else ast.unparse(d) for n in stay]
    takes_rest = [name is not None for name in rest]
    return tuple(stay[1:]), of_stay, takes_rest, "\n".join(map(ast.unparse, body))


def _harmless(decorator):
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(called, ast.Name) and called.id in HARMLESS


def _names_itself(keyword):
    return isinstance(keyword.value, ast.Name) and keyword.value.id == keyword.arg


@functools.cache
def _modules_used() -> dict[str, set[str]]:
    return {
        kind: {n.attr for n in ast.walk(ast.parse(k.source)) if isinstance(n, ast.Attribute)}
        for kind, k in KNOWN.items()
    }
