"""Reasons to stop a run early: a signal, a `stop` file in the run folder, a time limit.

Any rank may have one. It is shared in the all-reduce of each step (train.update), so that all ranks stop after the same
step. A second signal ends the process at once. A separate thread reads the signals, because the main thread may be
waiting in a collective for a rank that is gone.
"""

import os
import signal
import threading
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST_SECONDS = 3.0
"""A launcher repeats the terminal's signal to its ranks, so signals this close together count as one."""
SLURM_MARGIN_SECONDS = 300.0
"""The run stops this long before the end of its Slurm job, to write a checkpoint."""
REASONS = ("", "a signal", "the stop file", "the time limit", "the end of the Slurm job")


class StopRequest:
    """Whether this rank has a reason to stop. `code()` is 0, or the index of the reason in REASONS."""

    def __init__(self, folder: Path, minutes: float, rank: int) -> None:
        self._stop_file = folder / "stop"
        self._rank, self._signalled = rank, 0.0
        self._limit = time.time() + minutes * 60 if minutes else float("inf")
        self._job_end = float(os.environ.get("SLURM_JOB_END_TIME", "inf")) - SLURM_MARGIN_SECONDS
        if rank == 0:
            self._stop_file.unlink(missing_ok=True)  # left over from an earlier process
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = [signal.signal(number, lambda *_: None) for number in SIGNALS]
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def _watch(self, reader: int) -> None:
        while received := os.read(reader, 1):
            if received[0] not in SIGNALS:
                continue
            if self._signalled and time.monotonic() - self._signalled > ONE_REQUEST_SECONDS:
                os._exit(128 + received[0])
            self._signalled = self._signalled or time.monotonic()
        os.close(reader)

    def code(self) -> int:
        """This rank's reason to stop. Only rank 0 looks at files and clocks."""
        if self._signalled:
            return 1
        if self._rank == 0:
            if self._stop_file.exists():
                return 2
            if time.time() > self._limit:
                return 3
            if time.time() > self._job_end:
                return 4
        return 0

    def close(self) -> None:
        """Restore the signal handlers and remove the stop file."""
        signal.set_wakeup_fd(-1)
        os.close(self._writer)  # ends the thread
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)
        if self._rank == 0:
            self._stop_file.unlink(missing_ok=True)
