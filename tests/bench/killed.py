"""`pretrain.train` with a hook in the checkpoint's writer: rank 0 is killed before its n-th file operation of a save.

KILL_AT=7 torchrun ... -m tests.bench.killed RECIPE ...
"""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

from pretrain import checkpoint
from pretrain.train import main

left = [int(os.environ.get("KILL_AT", -1))]


def counted(original: Any) -> Any:
    """The function, after a look at the clock of operations."""

    def call(*arguments: Any, **more: Any) -> Any:
        if saving[0]:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **more)

    return call


saving = [False]
begin = checkpoint.CheckpointWriter.begin


def begun(self: Any, *arguments: Any) -> None:
    """From the first checkpoint on."""
    saving[0] = True
    begin(self, *arguments)


if __name__ == "__main__":
    if left[0] > 0:
        checkpoint.CheckpointWriter.begin = begun  # type: ignore[method-assign]
        for owner, name in ((Path, "replace"), (Path, "mkdir"), (Path, "open"), (shutil, "rmtree"), (os, "fsync")):
            setattr(owner, name, counted(getattr(owner, name)))
    main()
