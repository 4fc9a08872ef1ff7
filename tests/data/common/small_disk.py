"""A disk of 4 MB, a way to leave so much room on it, and the stages that write there. Needs no pytest."""

import contextlib
import os
import shutil
import subprocess
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.corpus.build import make_corpus
from data.shards.build import make_shards
from data.text.train import train_tokenizer

PAGE = 4096
STAGES: dict[str, Callable[[Path, Path, Any], Any]] = {
    "corpus": lambda made, disk, workers: make_corpus([made / "raw"], disk / "corpus", 0.1, 0.1, workers),
    "tokenizer": lambda made, disk, workers: train_tokenizer(made / "corpus", disk / "tokenizer", 300, 1, workers),
    "shards": lambda made, disk, workers: make_shards(made / "corpus", made / "tokenizer", disk / "shards", workers),
}
"""Each reads the folders in `made` and writes its own on `disk`."""


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A disk of 4 MB of its own, mounted at `place`. Skips the test where that is not allowed."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        raise unittest.SkipTest("this machine does not let us mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def room(disk: Path, pages: int) -> Iterator[None]:
    """A disk with room for so many pages, until the block ends."""
    filler = disk / "filler"
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(disk).free - pages * PAGE)
    try:
        yield
    finally:
        filler.unlink()
