"""What a run reports: `metrics.jsonl`, TensorBoard and the progress line. Rank 0 only."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from data.files import whole_file
from model.config import DecoderConfig

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, from NVIDIA's data sheets


def flops_per_token(config: DecoderConfig, context_length: int) -> float:
    """Floating point operations of training a token: 6 N + 12 L d T (Chowdhery et al. 2022, appendix B)."""
    return 6 * config.parameter_count() + 12 * config.num_hidden_layers * config.hidden_size * context_length


def peak_flops() -> float | None:
    """Peak of this GPU, None where it is not known: then no MFU is reported rather than a wrong one."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


class Metrics:
    """The record of a run. A resumed run forgets what came after its checkpoint."""

    def __init__(self, run: Path, start_step: int, steps: int) -> None:
        self._path, self._steps = run / "metrics.jsonl", steps
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start_step]
        with whole_file(self._path) as stream:
            stream.write("".join(kept if start_step else []).encode())
        self._stream = self._path.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1 if start_step else 0)
        self._terminal = sys.stdout.isatty()
        self._started, self._start_step = time.monotonic(), start_step

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record the values of a step; names with a slash group them in TensorBoard."""
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def line(self, step: int, text: str, passing: bool = False) -> None:
        """Print a line of progress. On a terminal a passing one is overwritten by the next."""
        done = max(step - self._start_step, 1)
        left = (time.monotonic() - self._started) / done * (self._steps - step)
        hours, seconds = divmod(int(left), 3600)
        clock = f"{hours}:{seconds // 60:02d}:{seconds % 60:02d}"
        text = f"step {step}/{self._steps}  {text}" + (f"  left {clock}" if passing and step > self._start_step else "")
        if self._terminal:
            print(f"\r\x1b[2K{text}", end="" if passing else "\n", flush=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Flush everything."""
        if self._terminal:
            print(flush=True)
        self._stream.close()
        self._board.close()
