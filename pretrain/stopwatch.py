"""Where the time of a run goes, by parts such as "data", "forward" and "checkpoint"."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import record_function

OTHER = "other"
PARTS: tuple[str, ...] = ("data", "forward", "backward", "optimizer", "evaluation", "checkpoint", "observers", OTHER)
"""The parts of a run. "checkpoint" is the time that the run waits, and "observers" are those that are no part alone."""


class Stopwatch:
    """Splits time into parts, by `with stopwatch.part("data"):`. A part inside another one interrupts it.

    Every moment belongs to one part, or to "other", so the parts add up to the whole time. On a GPU the moments are
    those at which the GPU reaches the beginning and the end of a part's work. Marking them makes nobody wait, but they
    can be read only when the GPU has passed them, and they are kept until `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.seconds = dict.fromkeys(PARTS, 0.0)
        """Part -> its seconds from the beginning to the last `read`."""
        self._marks: list[tuple[str, Any]] = []  # the part that begins, and when
        self._mark(OTHER)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The block belongs to this part. A profiler's trace shows it under this name too."""
        outer, _ = self._marks[-1]
        self._mark(name)
        try:
            with record_function(name):
                yield
        finally:
            self._mark(outer)

    def since_read(self, *parts: str) -> float:
        """Seconds in these parts since the last `read`. On a GPU, it waits until the last of them is over."""
        pairs = [(begun, ended) for (name, begun), (_, ended) in pairwise(self._marks) if name in parts]
        if self._on_gpu and pairs:
            pairs[-1][1].synchronize()
        return sum(self._seconds(begun, ended) for begun, ended in pairs)

    def read(self) -> None:
        """Add to `seconds` what has passed between the last `read` and the last beginning or end of a part."""
        for (name, begun), (_, ended) in pairwise(self._marks):
            self.seconds[name] += self._seconds(begun, ended)
        del self._marks[:-1]

    def _mark(self, name: str) -> None:
        if self._on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((name, moment))

    def _seconds(self, begun: Any, ended: Any) -> float:
        return begun.elapsed_time(ended) / 1e3 if self._on_gpu else ended - begun
