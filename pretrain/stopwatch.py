"""The time of a rank's own work in a step: bringing data and the forward passes, without waiting for other ranks.

Backward passes are left out, because they wait for the other ranks' gradients. At ZeRO 3 the forward passes gather
weights from all ranks, so a slow rank slows all of them, and only slow data tells the ranks apart.
"""

import time
from typing import Any

import torch


class Stopwatch:
    """Adds up the time of `with` blocks. On a GPU, it is the time that the GPU spends in them."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._blocks: list[list[Any]] = []  # beginning and end

    def __enter__(self) -> None:
        self._blocks.append([self._now()])

    def __exit__(self, *_: object) -> None:
        self._blocks[-1].append(self._now())

    def seconds(self) -> float:
        """Seconds in all blocks so far. On a GPU, it waits until their work is done."""
        if self._on_gpu:
            self._blocks[-1][1].synchronize()
            return sum(begun.elapsed_time(ended) for begun, ended in self._blocks) / 1e3
        return sum(ended - begun for begun, ended in self._blocks)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
