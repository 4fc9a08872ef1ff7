"""The watchdog: ends a run in which no rank moves any more, and names the rank that the others wait for.

A rank moves when it passes a mark: a stamp of the loop (`Run.stamp`) or the entry into a collective. A thread in each
rank shows the number of its marks to the others, through the store by which the ranks found each other. A second thread
decides, because the first may have to wait for the store. The rank that hangs has passed fewer marks than those that
wait for it. A stopped process cannot say anything, so the others name it.
"""

import json
import os
import secrets
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from pretrain import ERROR_FILE
from pretrain.run import Observer, Run

TICK = 2.0
"""Seconds between two looks."""
GRACE = 3 * TICK
"""Seconds that the ranks get to show where they stand, once one has raised the alarm."""
SUSPENDED = 30.0
"""A longer pause between two looks means that this process was suspended, and its peers probably too."""
USUAL_STEPS = 10
"""A step is never called hanging before it takes this many times the median of the recent steps."""
LONG = 5
"""The first step, evaluations and checkpoints get this many times the limit: 25 minutes, where torch's is 30."""


class Record(NamedTuple):
    """What a rank shows to the others."""

    marks: int
    place: str
    alarmed: bool


class Stillness:
    """For how long nothing has moved. Pauses in which this process was suspended do not count."""

    def __init__(self, now: float) -> None:
        self._looked = self._moved = now
        self._seen: Any = None

    def seconds(self, now: float, seen: Any) -> float:
        """Seconds since `seen` last changed, or since this process was resumed."""
        if seen != self._seen or now - self._looked > SUSPENDED:
            self._moved = now
        self._looked, self._seen = now, seen
        return now - self._moved


class Watchdog(Observer):
    """Watches one rank, from the first evaluation to the last checkpoint."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._limit_seconds = run.recipe.train.hang_minutes * 60
        self._steps: deque[float] = deque(maxlen=20)  # seconds of the recent steps
        self._names: list[str] = []
        self._records: list[Record] = []
        self._answered = time.monotonic()  # when the store last answered
        self._alarmed, self._ended = False, threading.Event()

    def begin(self, run: Run) -> None:
        """Meet the other ranks, and start to watch."""
        if not self._limit_seconds:
            return
        name = f"rank {run.rank} (process {os.getpid()} on {socket.gethostname()})"
        met: list[Any] = [None] * run.ranks
        dist.all_gather_object(met, (name, secrets.token_hex(4)))
        self._names = [name for name, _ in met]
        # A connection of our own, because the main thread may wait on its one. torchrun's restarts share a store.
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        self._store = PrefixStore(f"watchdog-{met[0][1]}", store)
        self._show()
        dist.barrier()  # `multi_get` waits for keys that do not exist
        for work in (self._exchange, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def after_step(self, run: Run, report: dict[str, Any]) -> None:
        """Learn how long a step usually takes."""
        self._steps.append(report["seconds"])

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()

    def limit(self) -> float:
        """Seconds without a mark that the present place of this rank allows."""
        usual = statistics.median(self._steps) if self._steps else 0.0
        long = self._run.long_place or not self._steps
        return max(self._limit_seconds, USUAL_STEPS * usual) * (LONG if long else 1)

    def _show(self) -> None:
        record = Record(self._run.stamps + collectives_entered(), self._run.place, self._alarmed)
        self._store.set(str(self._run.rank), json.dumps(record))

    def _exchange(self) -> None:
        """Show our record and read the others', again and again. This waits while the store's host is stopped."""
        keys = [str(rank) for rank in range(self._run.ranks)]
        while not self._ended.is_set():
            try:
                self._show()
                self._records = [Record(*json.loads(record)) for record in self._store.multi_get(keys)]
                self._answered = time.monotonic()
            except RuntimeError:  # the store does not answer
                pass
            self._ended.wait(TICK)

    def _watch(self) -> None:
        stillness = Stillness(time.monotonic())
        while not self._ended.wait(TICK):
            own = self._run.stamps + collectives_entered()
            marks = [own, *(record.marks for record in self._records)]
            seconds = stillness.seconds(time.monotonic(), marks)
            if seconds > self.limit() or any(record.alarmed for record in self._records):
                self._end(seconds)

    def _end(self, seconds: float) -> None:
        """Show where this rank stands, and end its process. The lowest rank that answers says which one hangs."""
        self._alarmed = True
        run = self._run
        still = f"has not moved for {seconds:.0f} s at {run.place}; its stack:"
        print(f"biogpt: {self._names[run.rank]} {still}\n{stacks()}", file=sys.stderr, flush=True)
        time.sleep(GRACE)
        if time.monotonic() - self._answered > GRACE:
            line = f"{store_host(self._names)} hangs: it holds the store of the ranks, and does not answer"
            speaks = True
        else:
            line = verdict(self._names, self._records)
            speaks = not any(record.alarmed for record in self._records[: run.rank])
        if speaks:
            line += f"; nothing moved for {seconds:.0f} s, so the run ends; run the same command to resume"
            print(f"biogpt: error: {line}", file=sys.stderr, flush=True)
            if ERROR_FILE in os.environ:
                Path(os.environ[ERROR_FILE]).write_text(line, encoding="utf-8")
        else:
            time.sleep(GRACE)  # a launcher may end all ranks with the first one
        os._exit(1)  # the main thread waits inside a collective


def collectives_entered() -> int:
    """How many collectives of all process groups this rank has entered."""
    groups = list(dist.distributed_c10d._world.pg_map)  # torch has no public list of them
    return sum(group._get_sequence_number_for_group() for group in groups)  # pyright: ignore[reportAttributeAccessIssue]


def stacks() -> str:
    """The stacks of the main thread, and of threads of torch that run Python code, such as backward passes."""
    main = threading.main_thread().ident
    others = {thread.ident for thread in threading.enumerate()} - {main}
    frames = [frame for thread, frame in sys._current_frames().items() if thread not in others]
    return "\n".join("".join(traceback.format_stack(frame)) for frame in frames)


def verdict(names: list[str], records: list[Record]) -> str:
    """Which ranks hang: those that do not answer. If all answer, those that have passed the fewest marks."""
    silent = [rank for rank, record in enumerate(records) if not record.alarmed]
    fewest = min(record.marks for record in records)
    found = silent or [rank for rank, record in enumerate(records) if record.marks == fewest]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    who = ", ".join(names[rank] for rank in found[:3]) + more
    why = "no answer: stopped, or the machine is gone" if silent else "the stack is above"
    return f"{who} hangs at {records[found[0]].place} ({why})"


def store_host(names: list[str]) -> str:
    """Who holds the store of the ranks: torchrun, or rank 0 under other launchers."""
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"torchrun on {os.environ['MASTER_ADDR']}" if by_torchrun else names[0]
