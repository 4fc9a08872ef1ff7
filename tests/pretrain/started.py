"""Runs of two ranks by a launcher of their own, to be stopped, killed and resumed from outside."""

import subprocess
import sys
import time
from pathlib import Path

import psutil

from pretrain.checkpoint import newest_checkpoint, read_state
from tests.pretrain.runs import metrics, settings

BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "-m", "pretrain.train", "tiny"]
BIOGPT = [str(BIN / "biogpt"), "train", "tiny", "--ranks", "2"]


class Started:
    """A run of two ranks by a launcher of its own, ended with the test."""

    def __init__(self, launcher: list[str], folder: Path, shards: Path, *more: str) -> None:
        self.run = folder / "run"
        self.process = subprocess.Popen(
            [*launcher, *settings(shards, self.run, *more)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.output()
            if (self.run / "metrics.jsonl").exists() and max(metrics(self.run, "train/loss"), default=0) >= step:
                return
            time.sleep(0.05)
        raise AssertionError("the run does not move")

    def ranks(self) -> list[psutil.Process]:
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in below if "RANK" in process.environ() and process.environ().get("WORLD_SIZE")]

    def end(self, timeout: float = 60) -> int:
        return self.process.wait(timeout)

    def output(self) -> str:
        assert self.process.stdout
        return self.process.stdout.read()

    def saved_step(self) -> int:
        checkpoint, faults = newest_checkpoint(self.run)
        assert checkpoint and not faults
        return read_state(checkpoint)["step"]

    def last_step(self) -> int:
        return max(metrics(self.run, "train/loss"))
