"""`pretrain.train` that is struck once, on rank 0: before a file operation of a save, or at a step.

STRIKE="save 7" torchrun ... -m tests.bench.killed RECIPE ...

"save 7": kill -9 before the 7th file operation from the first save on. "step 7": kill -9 before the 7th step.
"nan 7": the 7th backward pass gets NaN for its loss. `tests/bench/trainer_run.py` strikes Trainer in the same way.
With STRIKE_LOG=FILE, the number of file operations so far is appended to the file when a save begins.
"""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain import engine as engines
from pretrain import train
from pretrain.checkpoint import CheckpointWriter

Place = tuple[Any, str]
"""An owner and the name of its function."""


def before(place: Place, look: Callable[[], Any]) -> None:
    """Call `look` before each call of the function."""
    owner, name = place
    original = getattr(owner, name)

    def call(*arguments: Any, **more: Any) -> Any:
        look()
        return original(*arguments, **more)

    setattr(owner, name, call)


def strike(save: Place, files: tuple[Place, ...], step: Place) -> None:
    """Do what the environment variable STRIKE says, if anything. save: what begins a save; files: its operations."""
    kind, number = os.environ.get("STRIKE", "log 0").split()
    if os.environ["RANK"] != "0":
        return
    counted, saving = [0], [False]

    def count() -> None:
        counted[0] += saving[0]
        if kind in ("save", "step") and counted[0] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    def begin() -> None:
        saving[0] = True
        if "STRIKE_LOG" in os.environ:
            with os.fdopen(os.open(os.environ["STRIKE_LOG"], os.O_CREAT | os.O_APPEND | os.O_WRONLY), "w") as stream:
                stream.write(f"{counted[0]}\n")

    if kind == "nan":
        poison(int(number))
    elif kind == "step":
        saving[0] = True
        before(step, count)
    else:
        before(save, begin)
        for place in files:
            before(place, count)


def poison(number: int) -> None:
    """Let the loss of a backward pass be NaN."""
    kind, counted = engines.deepspeed.DeepSpeedEngine, [0]
    original = kind.backward

    def backward(self: Any, loss: Any, *arguments: Any, **more: Any) -> Any:
        counted[0] += 1
        return original(self, loss * float("nan") if counted[0] == number else loss, *arguments, **more)

    kind.backward = backward


if __name__ == "__main__":
    operations = ((Path, "replace"), (Path, "mkdir"), (Path, "open"), (shutil, "rmtree"), (os, "fsync"))
    strike(save=(CheckpointWriter, "begin"), files=operations, step=(train, "update"))
    train.main()
