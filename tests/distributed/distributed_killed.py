"""Runs examples/distributed.py. Rank 1 is killed once, while it writes the second checkpoint."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from pathlib import Path

from torch.distributed.checkpoint import FileSystemWriter

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import distributed as example

write_data, written = FileSystemWriter.write_data, []


def write_or_die(self, *args):
    written.append(self)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return write_data(self, *args)


if os.environ["RANK"] == "1":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        FileSystemWriter.write_data = write_or_die
    else:
        folder = Path(sys.argv[sys.argv.index("--out") + 1], "checkpoints")
        print("found", *sorted(p.name for p in folder.iterdir()), flush=True)


@atexit.register
def tell():
    """Prints gloo's threads, which may abort the interpreter's shutdown. It runs only if there is
    such a shutdown."""
    threads = {p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")}
    print("an interpreter ended beside", *(t for t in threads if "gloo" in t), flush=True)


example.run(example.main)
