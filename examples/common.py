"""What the examples share: their options, their checkpoints and the style of their pictures."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def _interpret_on_a_cpu() -> None:
    """Sets up Triton's interpreter if the command line forces kernels on a CPU. Triton reads the
    variable when it is imported, so this runs before custom_backprop is imported."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--backend")
    early.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given, _ = early.parse_known_args()
    if given.backend == "triton" and given.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


_interpret_on_a_cpu()

import custom_backprop  # noqa: E402

matplotlib.use("Agg")
plt.rcParams.update(
    {
        "figure.dpi": 120,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
    }
)


def at_least(least: int) -> Callable[[str], int]:
    """The type of a whole number on the command line."""

    def whole_number(text: str) -> int:
        if (number := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{number} is less than {least}")
        return number

    return whole_number


#: what to do with a checkpoint that cannot be used
REMEDY = "delete it, or name another folder by --out, to start again"


def options(
    name: str, description: str | None, **own: int | tuple[str, ...] | bool | Path | None
) -> argparse.Namespace:
    """The command line of the example ``name``: --out, --device, --backend and --seed, and its
    ``own`` options, each of them the default of a count, a tuple of choices, False for a switch, or
    a file or None.

    Creates the output folder, sets the backend, and limits torch to one thread, or to --threads if
    the example has this option: a second one does not help with small matrices, and costs much if
    the cores are busy.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out", name),
        metavar="DIR",
        help="where results go (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default here: %(default)s",
    )
    parser.add_argument(
        "--backend",
        help="aten, triton or formula: what runs our layers (default: chosen by device)",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        metavar="N",
        help="of everything random (default: %(default)s)",
    )
    for option, default in own.items():
        kind: dict[str, Any] = {"type": at_least(1), "default": default, "metavar": "N"}
        if isinstance(default, tuple):
            kind = {"choices": default, "default": default[0]}
        elif default is False:
            kind = {"action": "store_true"}
        elif not isinstance(default, int):
            kind = {"type": Path, "default": default, "metavar": "FILE"}
        parser.add_argument(f"--{option}", help="default: %(default)s", **kind)
    args = parser.parse_args()
    try:
        torch.zeros((), device=args.device).item()  # raises on meta, which has no values
        custom_backprop.use_backend(args.backend)
        args.out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=args.out).close()  # raises now, not after the first epoch
    # torch raises AssertionError for cuda if it was built without it
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    torch.set_num_threads(getattr(args, "threads", 1))
    return args


def where(args: argparse.Namespace) -> str:
    return f"on {args.device}, backend {args.backend or 'by device'}"


def settings_of(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What a run must have in common with the checkpoint that it continues from."""
    given = {k: v for k, v in vars(args).items() if k not in ("out", "checkpoint", "draw")}
    return given | more | {"torch": str(torch.__version__)}


def save(state: dict[str, Any], path: Path) -> None:
    """Writes a complete checkpoint, or none: after an interruption the one before is still there.

    The SHA-256 follows what torch writes, because torch would load wrong values from a damaged file
    without an error.
    """
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    with temporary.open("r+b") as file:
        file.write(sha256(file.read()).digest())
    os.replace(temporary, path)


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint at ``path``, or None if there is none. Ends the program if the checkpoint is
    damaged or has other settings."""
    if not path.exists():
        return None
    try:
        content = path.read_bytes()
        state = torch.load(io.BytesIO(content), weights_only=True)
        saved = dict(state["settings"])
    except Exception as error:  # a damaged file may cause any of them
        sys.exit(f"cannot read the checkpoint {path} ({type(error).__name__}): {REMEDY}")
    if sha256(content[:-32]).digest() != content[-32:]:
        sys.exit(
            f"cannot use the checkpoint {path}: it is damaged, "
            f"its checksum is not that of its content; {REMEDY}"
        )
    if changed := [
        f"{k} {saved.get(k)!r}, now {settings.get(k)!r}"
        for k in settings | saved
        if saved.get(k) != settings.get(k)
    ]:
        sys.exit(
            f"the checkpoint {path} is of a run with other settings ({'; '.join(changed)}): "
            f"repeat those; or {REMEDY}"
        )
    return state


def resume(
    path: Path,
    settings: dict[str, Any],
    learners: dict[str, Any],
    chance: torch.Generator,
    epochs: int,
) -> int:
    """How many epochs are done. Restores the learners and ``chance`` from the checkpoint at
    ``path``, if there is one."""
    if (state := load(path, settings)) is None:
        return 0
    chance.set_state(state["chance"])
    for name, learner in learners.items():
        learner.load_state_dict(state["learners"][name])
    print(f"continuing after epoch {state['epoch']} of {epochs}, from {path}")
    return state["epoch"]


def save_epoch(
    path: Path,
    settings: dict[str, Any],
    learners: dict[str, Any],
    chance: torch.Generator,
    epoch: int,
) -> None:
    """Writes the checkpoint that :func:`resume` reads."""
    states = {name: learner.state_dict() for name, learner in learners.items()}
    save(
        {"settings": settings, "epoch": epoch, "chance": chance.get_state(), "learners": states},
        path,
    )


def stop(
    checkpoint: Path, complete: str = "the last complete epoch is", of: str = "epoch"
) -> NoReturn:
    """Ends an interrupted run, and says how to continue it."""
    saved = f"{complete} saved in {checkpoint}; the same command continues from there"
    nothing = f"no {of} is complete yet, nothing is saved"
    print("\ninterrupted:", saved if checkpoint.exists() else nothing, file=sys.stderr)
    sys.exit(130)


def write(figure: Figure, path: Path) -> None:
    """Writes a picture and prints its path."""
    figure.savefig(path)
    plt.close(figure)
    print(f"wrote {path}")
