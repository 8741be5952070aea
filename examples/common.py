"""What the examples share: their options, their checkpoints and the look of their pictures."""

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
    """Asks for Triton's interpreter where the command line forces kernels on a CPU. Triton reads
    this when it is imported, so it comes before custom_backprop."""
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
ANEW = "delete it, or name another folder by --out, to start anew"


def options(name: str, description: str | None, **own: int | tuple[str, ...]) -> argparse.Namespace:
    """The command line of the example ``name``: --out, --device, --backend and --seed, and its
    ``own``, each the default of a count or a tuple of choices.

    Makes the output folder, sets the backend, and limits torch to one thread: matrices as small as
    these gain nothing from a second one, and lose much where the cores are busy.
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
        help="of all that is random (default: %(default)s)",
    )
    for option, default in own.items():
        kind: dict[str, Any] = {"type": at_least(1), "default": default, "metavar": "N"}
        if isinstance(default, tuple):
            kind = {"choices": default, "default": default[0]}
        parser.add_argument(f"--{option}", help="default: %(default)s", **kind)
    args = parser.parse_args()
    try:
        torch.zeros((), device=args.device).item()  # meta, which has no values, refuses
        custom_backprop.use_backend(args.backend)
        args.out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=args.out).close()  # refuses now, not after the first epoch
    # torch raises AssertionError for cuda where it is built without
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    return args


def where(args: argparse.Namespace) -> str:
    return f"on {args.device}, backend {args.backend or 'by device'}"


def settings_of(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What a run must have in common with the checkpoint that it goes on from."""
    given = {k: v for k, v in vars(args).items() if k not in ("out", "checkpoint")}
    return given | more | {"torch": str(torch.__version__)}


def save(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint whole or not at all: an interruption leaves the one before.

    After what torch writes and reads stands its SHA-256: torch would take a damaged file's numbers
    as they are.
    """
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    with temporary.open("r+b") as file:
        file.write(sha256(file.read()).digest())
    os.replace(temporary, path)


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint at ``path``, or None if there is none. Ends the program if it is damaged or of
    other settings."""
    if not path.exists():
        return None
    try:
        content = path.read_bytes()
        state = torch.load(io.BytesIO(content), weights_only=True)
        saved = dict(state["settings"])
    except Exception as error:  # whatever a damaged file makes the reader raise
        sys.exit(f"cannot read the checkpoint {path} ({type(error).__name__}): {ANEW}")
    if sha256(content[:-32]).digest() != content[-32:]:
        sys.exit(
            f"cannot use the checkpoint {path}: it is damaged, "
            f"its checksum is not that of its content; {ANEW}"
        )
    if changed := [
        f"{k} {saved.get(k)!r}, now {settings.get(k)!r}"
        for k in settings | saved
        if saved.get(k) != settings.get(k)
    ]:
        sys.exit(
            f"the checkpoint {path} is of a run with other settings ({'; '.join(changed)}): "
            f"repeat those; or {ANEW}"
        )
    return state


def resume(
    path: Path,
    settings: dict[str, Any],
    learners: dict[str, Any],
    chance: torch.Generator,
    epochs: int,
) -> int:
    """How many epochs are done. Puts learners and ``chance`` back to where the checkpoint at
    ``path``, if there is one, left them."""
    if (state := load(path, settings)) is None:
        return 0
    chance.set_state(state["chance"])
    for name, learner in learners.items():
        learner.load_state_dict(state["learners"][name])
    print(f"going on after epoch {state['epoch']} of {epochs}, from {path}")
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
    checkpoint: Path, complete: str = "the last whole epoch is", of: str = "epoch"
) -> NoReturn:
    """Ends an interrupted run, and says how to go on."""
    saved = f"{complete} saved in {checkpoint}; the same command goes on from there"
    nothing = f"no {of} is complete yet, nothing is saved"
    print("\ninterrupted:", saved if checkpoint.exists() else nothing, file=sys.stderr)
    sys.exit(130)


def write(figure: Figure, path: Path) -> None:
    """Writes a picture and says so."""
    figure.savefig(path)
    plt.close(figure)
    print(f"wrote {path}")
