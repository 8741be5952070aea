"""Launches of ``@triton.jit`` functions, and calls of one from another, in the interpreter."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

#: names of the arguments that the autotuner of the launch under way protects from being run twice;
#: None where no choice among several configurations is made
tuned: list[frozenset[str] | None] = [None]

#: called with the ``@triton.jit`` function and its arguments after each launch
observers: list[Callable[[Any, tuple[Any, ...], dict[str, Any]], None]] = []


def require_triton() -> None:
    """Raises RuntimeError if triton is not installed."""
    if find_spec("triton") is None:
        raise RuntimeError("the package triton is not installed")


@contextmanager
def patched() -> Iterator[None]:
    """A ``@triton.jit`` function that was made for a GPU runs as one made for the interpreter."""
    import triton.compiler.code_generator  # now: it notes what the language's builtins are
    import triton.language
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import FunctionRewriter, InterpretedFunction, TensorHandle
    from triton.runtime.jit import JITFunction

    made: dict[int, Any] = {}
    compiled, launched = JITFunction.run, InterpretedFunction.run
    put_into = interpreter._patch_lang

    def of(jit: Any) -> Any:
        if id(jit) not in made:
            made[id(jit)] = jit, InterpretedFunction(jit.fn)
        return made[id(jit)][1]

    def run(jit: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if warmup:  # which compiles, and launches nothing
            return compiled(jit, *args, grid=grid, warmup=True, **kwargs)
        of(jit).pre_run_hooks = jit.pre_run_hooks
        launched(of(jit), *args, grid=grid, warmup=False, **kwargs)
        return observe(jit, args, kwargs)

    def run_interpreted(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launched(kernel, *args, grid=grid, warmup=warmup, **kwargs)
        observe(kernel, args, kwargs)

    def observe(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for observer in observers:
            observer(kernel, args, kwargs)

    def call(jit: Any, *args: Any, **kwargs: Any) -> Any:
        return of(jit)(*args, **kwargs)

    def get(jit: Any, instance: Any, owner: Any = None) -> Any:
        """A method of the interpreter's tensors, as in ``x.sum()``, is bound; a kernel that is an
        attribute of something else is not."""
        handle = getattr(instance, "handle", None)
        return partial(call, jit, instance) if isinstance(handle, TensorHandle) else jit

    def call_interpreted(function: Any, *args: Any, **kwargs: Any) -> Any:
        """A call from a kernel, in the language as the launch patched it. (Triton's own patches it
        again at each call, and restores nothing.)"""
        try:
            return function.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    def patch_lang(function: Any) -> Any:
        """For one launch: the language by its short name and its core, which Triton's own functions
        call."""
        modules = {"tl": triton.language, "core": triton.language.core}
        scope = put_into(types.SimpleNamespace(__globals__=modules))
        for module in modules.values():
            scope.set_attr(module, "range", counted)
        return scope

    def compile_and_exec(rewriter: Any, tree: Any) -> Any:
        """The function in a namespace of its own: its module is left as it is."""
        function, local = rewriter.fn, dict(rewriter.kwargs)
        closure = inspect.getclosurevars(function).nonlocals
        space = {**vars(interpreter), "range": counted, **function.__globals__, **closure}
        space |= {name: interpretable(value) for name, value in space.items()}
        exec(compile(tree, rewriter.filename, "exec"), space, local)
        return local[function.__name__]

    replaced = [
        (JITFunction, "run", run),
        (JITFunction, "__call__", call),
        (JITFunction, "__get__", get),
        (Autotuner, "run", run_first_valid),
        (FunctionRewriter, "_compile_and_exec", compile_and_exec),
        (InterpretedFunction, "run", run_interpreted),
        (InterpretedFunction, "__call__", call_interpreted),
        (interpreter, "_patch_lang", patch_lang),
        (InterpretedFunction, "rewritten_fn", {}),
    ]
    with ExitStack() as patches:
        for owner, name, replacement in replaced:
            patches.enter_context(patch.object(owner, name, replacement, create=True))
        yield


def counted(start: Any, stop: Any = None, step: Any = 1, **options: Any) -> Iterator[Any]:
    """``range`` in a kernel: it counts in tensors, as when compiled. (``tl.static_range`` counts in
    numbers.)"""
    from triton.runtime.interpreter import interpreter_semantic

    bounds = (0, start, step) if stop is None else (start, stop, step)
    for i in range(*map(int, bounds)):
        yield interpreter_semantic.to_tensor(i)


def interpretable(value: Any) -> Any:
    """What a kernel may call in the interpreter, in place of what its module imported by name: a
    function of libdevice, or a builtin of Triton's language."""
    from triton.language import core
    from triton.language.extra.cuda import libdevice
    from triton.runtime.interpreter import interpreter_semantic

    if isinstance(value, types.ModuleType) and value.__name__.endswith("libdevice"):
        return types.SimpleNamespace(
            **{n: interpretable(f) for n, f in vars(libdevice).items() if core.is_builtin(f)}
        )
    if not isinstance(value, types.FunctionType):
        return value
    if (value.__module__ or "").endswith("libdevice"):
        value = getattr(libdevice, value.__name__, value)
    if not core.is_builtin(value):
        return value

    def called(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("_semantic", None)
        # of tl.core, where the interpreter has put its own
        current = (
            getattr(core, value.__name__, value) if value.__module__ == core.__name__ else value
        )
        return current(*args, **kwargs, _semantic=interpreter_semantic)

    return called


def run_first_valid(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """``Autotuner.run`` without its clock: the first configuration that runs."""
    tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
    configs, reasons = tuner.prune_configs(kwargs), []
    several = len(configs) > 1
    protected = frozenset([*tuner.reset_to_zero, *tuner.restore_value])
    try:
        for config in configs:
            named = {**tuner.nargs, **kwargs, **config.all_kwargs()}
            if several:
                tuner.pre_hook(named)  # which copies what post_hook restores if this does not run
            if config.pre_hook:
                config.pre_hook(named)
            tuned.append(protected if several else None)
            try:
                found = tuner.fn.run(*args, **kwargs, **config.all_kwargs())
            except Exception as error:
                if several:
                    tuner.post_hook(named, exception=error)
                reasons.append(error)
                continue
            finally:
                tuned.pop()
            tuner.restore_copies = {}
            return found
        raise reasons[0]
    finally:
        tuner.nargs = None
