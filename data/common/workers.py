"""Where work runs: in this process, in local processes, in a job array or on a Ray cluster.

A task turns one input file into a folder. The manifest of that folder is the task's receipt: it holds the sha256 of the
input, the settings, the sha256 of the outputs, the counts and the version of the format. A task whose receipt proves
that it is done is skipped, so you can run a command again after a kill, and it does only what is missing:

    tasks = [Task("words", file, sha256_of_file, parts / file.name, {"lower": True}) for file in files]
    for task, counts in zip(tasks, run_tasks(count_words, tasks, workers, "counting words"), strict=True): ...

Here `count_words(source, folder, settings) -> counts` is a function that can be imported and depends on its arguments
alone. An element of a job array does its share of the tasks and ends with ShareDone. Afterwards the same command
without `--part` finds all receipts and finishes the work:

    tasks = share_of(tasks, workers)
    if isinstance(workers, JobArray):
        run_tasks(...)  # raises ShareDone
"""

import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.common.disk import disk_full_named
from data.common.errors import DiskFull, LeaseLost
from data.common.files import VERSIONS, ShareDone, TasksFailed, UserError, read_manifest, verify_files, write_manifest
from data.common.lease import Lease, hold
from data.common.ownership import MARKER, make_marked, partial_part, remove_own

ATTEMPTS = 3  # at a task whose worker dies
Work = Callable[[Path, Path, dict[str, Any]], dict[str, Any]]
Outcome = dict[str, Any] | str | UserError  # the counts, why the task failed, or why the whole command ends

Outcomes = Generator[tuple[int, Outcome], None, None]  # with the number of the task each


@dataclass(frozen=True)
class JobArray:
    """One element of a job array on a shared folder. It does its share of the tasks in this process."""

    element: int  # from 1
    elements: int


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster. Its machines share the folders and have this program installed."""

    address: str  # as `ray start` printed it, or "auto"


Workers = int | JobArray | Cluster  # an int: the number of local processes
Item = TypeVar("Item")


def share_of(items: list[Item], workers: Workers) -> list[Item]:
    """The items to work on here: every `elements`-th one for an element of a job array, otherwise all."""
    return items[workers.element - 1 :: workers.elements] if isinstance(workers, JobArray) else items


@dataclass(frozen=True)
class Task:
    """One input file and the folder that is made from it."""

    kind: str  # as in files.VERSIONS
    source: Path
    sha256: str  # of the source
    folder: Path
    settings: dict[str, Any]  # JSON: everything besides the source that the result depends on


def hold_for(out: Path, workers: Workers) -> AbstractContextManager[Lease]:
    """The lease of the folder `out` and of its parts. The elements of a job array hold one each."""
    return hold(out, (workers.element, workers.elements) if isinstance(workers, JobArray) else None)


def run_tasks(
    work: Work, tasks: list[Task], workers: Workers, title: str, lease: Lease | None = None
) -> list[dict[str, Any]]:
    """Call `work(source, folder, settings)` for each task without a receipt. Returns the counts of every task.

    lease: of the folder that the tasks are for; a task whose lease is lost makes no part.
    If a worker dies, another one does its task again; a task has ATTEMPTS attempts. Raises TasksFailed, which names
    each failed task and the reason, after all others are done; DiskFull, or UserError for a lost lease, at once. In a
    job array it raises ShareDone instead of returning.
    """
    outcomes: dict[int, Outcome] = {}
    if isinstance(workers, Cluster):
        done = _on_cluster(work, tasks, workers, lease)
    elif isinstance(workers, JobArray) or workers <= 1 or len(tasks) <= 1:
        done = _in_this_process(work, tasks, lease)
    else:
        done = _in_processes(work, tasks, workers, lease)
    try:
        with progress(title, len(tasks)) as advance, closing(done):
            for index, outcome in done:
                if isinstance(outcome, UserError):
                    raise outcome
                outcomes[index] = outcome
                advance()
    finally:  # what workers that were killed had begun
        for task in tasks:
            shutil.rmtree(partial_part(task.folder, _writer(lease)), ignore_errors=True)
    ordered = [outcomes[index] for index in range(len(tasks))]
    if failures := [outcome for outcome in ordered if isinstance(outcome, str)]:
        raise TasksFailed(failures, len(tasks))
    if isinstance(workers, JobArray):
        raise ShareDone(f"{title}: part {workers.element} of {workers.elements} is done, {len(tasks)} files")
    return [outcome for outcome in ordered if isinstance(outcome, dict)]


def perform(work: Work, task: Task, lease: Lease | None = None) -> Outcome:
    """Do one task unless its receipt proves it done. Returns its counts, or the reason why it failed.

    A reason that ends the whole command is an error, which is returned, not raised: DiskFull, or a lost lease.
    """
    request = {"source": task.source.name, "sha256": task.sha256, "settings": task.settings}
    try:
        receipt = read_manifest(task.folder, task.kind)
        if receipt["request"] == request and receipt["version"] == VERSIONS[task.kind]:
            verify_files(task.folder, receipt)
            return receipt["counts"]
    except UserError:
        pass  # it is not done, or was damaged since
    try:
        return _make_part(work, task, request, lease)
    except (DiskFull, LeaseLost) as error:
        return error
    except UserError as error:
        return str(error)
    except Exception:
        if lease:
            try:
                lease.check()
            except LeaseLost as error:  # another command removed what this one was writing
                return error
        return f"{task.source}: {traceback.format_exc()}"


def _make_part(work: Work, task: Task, request: dict[str, Any], lease: Lease | None) -> dict[str, Any]:
    """Do a task in a folder beside its own, which takes its name when it is whole. Returns the counts."""
    partial = partial_part(task.folder, _writer(lease))
    for left in task.folder.parent.glob(partial_part(task.folder, "*").name):
        remove_own(left, task.kind)
    try:
        with disk_full_named(partial, str(task.folder)):
            make_marked(partial, task.folder)
            receipt = write_manifest(partial, task.kind, request, work(task.source, partial, task.settings))
            if lease:
                lease.check()
            (partial / MARKER).unlink()
            remove_own(task.folder, task.kind)  # made from another input or settings, or damaged
            partial.replace(task.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return receipt["counts"]


def _writer(lease: Lease | None) -> str:
    return lease.token if lease else "task"


def _in_this_process(work: Work, tasks: list[Task], lease: Lease | None) -> Outcomes:
    for index, task in enumerate(tasks):
        yield index, perform(work, task, lease)


def _in_processes(
    work: Work, tasks: list[Task], processes: int, lease: Lease | None
) -> Generator[tuple[int, Outcome], None, None]:
    waiting = deque((index, 1) for index in range(len(tasks)))  # (task, number of the attempt)
    idle: list[_Worker] = []
    busy: dict[Connection, tuple[_Worker, int, int]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                worker = idle.pop() if idle else _Worker(work, lease)
                index, attempt = waiting.popleft()
                if worker.send(tasks[index]):
                    busy[worker.connection] = worker, index, attempt
                else:  # it died while it was idle
                    waiting.appendleft((index, attempt))
            for connection in wait(list(busy)):
                worker, index, attempt = busy.pop(connection)  # type: ignore[arg-type]
                if (outcome := worker.receive()) is not None:
                    idle.append(worker)
                    yield index, outcome
                elif attempt < ATTEMPTS:
                    waiting.append((index, attempt + 1))
                else:
                    yield index, f"{tasks[index].source}: its worker died {ATTEMPTS} times (killed, out of memory?)"
    finally:
        for worker in [*idle, *(worker for worker, *_ in busy.values())]:
            worker.kill()


class _Worker:
    """A local process that does one task after another, until it is killed."""

    def __init__(self, work: Work, lease: Lease | None) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy the locks of pyarrow's threads
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, work, lease))
        self._process.start()
        theirs.close()

    def send(self, task: Task) -> bool:
        """Give it a task. False if the process is dead."""
        try:
            self.connection.send(task)
        except BrokenPipeError:
            self._process.join()
            return False
        return True

    def receive(self) -> Outcome | None:
        """Wait for the outcome of its task. None if the process died."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            return None

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, work: Work, lease: Lease | None) -> None:
    """What a worker's process runs. It ends with its parent, so that the next command writes alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    parent = multiprocessing.parent_process()
    assert parent
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    while True:
        connection.send(perform(work, connection.recv(), lease))


def _on_cluster(
    work: Work, tasks: list[Task], cluster: Cluster, lease: Lease | None
) -> Generator[tuple[int, Outcome], None, None]:
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--cluster: Ray is not installed; pip install -c requirements.lock -e '.[cluster]'") from None
    _connect(ray, cluster.address)
    remote: Any = ray.remote(max_retries=ATTEMPTS - 1)(perform)  # done again if a worker or machine dies
    pending = {}
    for index, task in enumerate(tasks):
        there = replace(task, source=task.source.absolute(), folder=task.folder.absolute())
        pending[remote.remote(work, there, lease)] = index
    while pending:
        (reference,), _ = ray.wait(list(pending), num_returns=1)
        index = pending.pop(reference)
        try:
            outcome = ray.get(reference)
        except RayError as error:
            outcome = f"{tasks[index].source}: {type(error).__name__} {ATTEMPTS} times (killed, out of memory?)"
        yield index, outcome


def _connect(ray: Any, address: str) -> None:
    """Join a cluster. UserError if none answers; Ray alone would try for three minutes and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, logging_level="ERROR", log_to_driver=False, ignore_reinit_error=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--cluster {address}: {str(error).splitlines()[0]}") from None


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr on a terminal, otherwise one line at the end. Yields the function that advances it."""
    if not sys.stderr.isatty():
        yield lambda: None
        print(f"{title}: {total} of {total}", file=sys.stderr)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
