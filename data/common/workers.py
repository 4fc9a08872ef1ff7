"""Where the work runs: one file is one task with a receipt, here, in local processes, a job array or a Ray cluster.

A task fills a folder of its own, and that folder's manifest is its receipt: the input's sha256, the settings, the
outputs' sha256, the counts, the version of the format. A task whose receipt proves it done is not done again, so a
command that was killed, run again, goes on where it was:

    tasks = [Task("words", file, sha256_of_file, parts / file.name, {"lower": True}) for file in files]
    for task, counts in zip(tasks, run_tasks(count_words, tasks, workers, "counting words"), strict=True): ...

with `count_words(source, folder, settings) -> counts`, an importable function of its arguments alone. An element of a
job array does its share and ends with ShareDone; the command without `--part` finds all receipts and finishes:

    tasks = share_of(tasks, workers)
    if isinstance(workers, JobArray):
        run_tasks(...)  # raises
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.common.files import VERSIONS, ShareDone, TasksFailed, UserError, read_manifest, verify_files, write_manifest

ATTEMPTS = 3  # of a task whose worker dies
Work = Callable[[Path, Path, dict[str, Any]], dict[str, Any]]
Outcome = dict[str, Any] | str  # the counts, or why the task failed


@dataclass(frozen=True)
class JobArray:
    """One element of a job array on a shared folder: it does every so-manieth task, in this process."""

    element: int  # from 1
    elements: int


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster whose machines share the folders and have this program installed."""

    address: str  # as `ray start` printed it, or "auto"


Workers = int | JobArray | Cluster  # an int: so many local processes
Item = TypeVar("Item")


def share_of(items: list[Item], workers: Workers) -> list[Item]:
    """What is to be done here: all, or the share of an element of a job array."""
    return items[workers.element - 1 :: workers.elements] if isinstance(workers, JobArray) else items


@dataclass(frozen=True)
class Task:
    """One input file and the folder that is made of it."""

    kind: str  # as in files.VERSIONS
    source: Path
    sha256: str  # of the source
    folder: Path
    settings: dict[str, Any]  # JSON: all that the result depends on besides the source


def run_tasks(work: Work, tasks: list[Task], workers: Workers, title: str) -> list[dict[str, Any]]:
    """`work(source, folder, settings)` for each task without a receipt. Returns the counts of all.

    A worker that dies has its task done again by another, ATTEMPTS times. Raises TasksFailed, which names each task
    that failed and why, after all others are done; ShareDone instead of returning in a job array.
    """
    outcomes: dict[int, Outcome] = {}
    if isinstance(workers, Cluster):
        done = _on_cluster(work, tasks, workers)
    elif isinstance(workers, JobArray) or workers <= 1 or len(tasks) <= 1:
        done = _in_this_process(work, tasks)
    else:
        done = _in_processes(work, tasks, workers)
    with progress(title, len(tasks)) as advance:
        for index, outcome in done:
            outcomes[index] = outcome
            advance()
    ordered = [outcomes[index] for index in range(len(tasks))]
    if failures := [outcome for outcome in ordered if isinstance(outcome, str)]:
        raise TasksFailed(failures, len(tasks))
    if isinstance(workers, JobArray):
        raise ShareDone(f"{title}: part {workers.element} of {workers.elements} is done, {len(tasks)} files")
    return [outcome for outcome in ordered if not isinstance(outcome, str)]


def perform(work: Work, task: Task) -> Outcome:
    """Do one task, unless its receipt proves it done."""
    request = {"source": task.source.name, "sha256": task.sha256, "settings": task.settings}
    try:
        receipt = read_manifest(task.folder, task.kind)
        if receipt["request"] == request and receipt["version"] == VERSIONS[task.kind]:
            verify_files(task.folder, receipt)
            return receipt["counts"]
    except UserError:
        pass  # not done, or damaged since
    try:
        shutil.rmtree(task.folder, ignore_errors=True)
        task.folder.mkdir(parents=True)
        return write_manifest(task.folder, task.kind, request, work(task.source, task.folder, task.settings))["counts"]
    except UserError as error:
        return str(error)
    except Exception:
        return f"{task.source}: {traceback.format_exc()}"


def _in_this_process(work: Work, tasks: list[Task]) -> Iterator[tuple[int, Outcome]]:
    for index, task in enumerate(tasks):
        yield index, perform(work, task)


def _in_processes(work: Work, tasks: list[Task], processes: int) -> Iterator[tuple[int, Outcome]]:
    context = multiprocessing.get_context("spawn")  # fork would copy the threads' locks of pyarrow
    waiting = deque((index, 1) for index in range(len(tasks)))
    idle: list[tuple[Any, Connection]] = []
    busy: dict[Any, tuple[Any, int, int]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                process, connection = idle.pop() if idle else _start_worker(context, work)
                index, attempt = waiting.popleft()
                try:
                    connection.send(tasks[index])
                    busy[connection] = (process, index, attempt)
                except BrokenPipeError:  # it died idle
                    waiting.appendleft((index, attempt))
            for connection in wait(list(busy)):
                process, index, attempt = busy.pop(connection)
                try:
                    yield index, connection.recv()  # type: ignore[union-attr]
                    idle.append((process, connection))  # type: ignore[arg-type]
                except (EOFError, OSError):
                    process.join()
                    if attempt < ATTEMPTS:
                        waiting.append((index, attempt + 1))
                    else:
                        yield index, f"{tasks[index].source}: its worker died {ATTEMPTS} times (killed, out of memory?)"
    finally:
        for process in [process for process, *_ in [*idle, *busy.values()]]:
            process.kill()
            process.join()


def _start_worker(context: Any, work: Work) -> tuple[Any, Connection]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work))
    process.start()
    theirs.close()
    return process, ours


def _serve(connection: Connection, work: Work) -> None:
    """A worker: takes tasks until it is killed. It ends with its parent, so that a next run writes alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    parent = multiprocessing.parent_process()
    assert parent
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    while True:
        connection.send(perform(work, connection.recv()))


def _on_cluster(work: Work, tasks: list[Task], cluster: Cluster) -> Iterator[tuple[int, Outcome]]:
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--cluster: Ray is not installed; pip install 'biogpt-pretrain[cluster]'") from None
    _connect(ray, cluster.address)
    remote = ray.remote(max_retries=ATTEMPTS - 1)(perform)  # a worker or machine that dies has its task done again
    pending = {}
    for index, task in enumerate(tasks):
        there = replace(task, source=task.source.absolute(), folder=task.folder.absolute())
        pending[remote.remote(work, there)] = index
    while pending:
        (reference,), _ = ray.wait(list(pending), num_returns=1)
        index = pending.pop(reference)
        try:
            outcome = ray.get(reference)
        except RayError as error:
            outcome = f"{tasks[index].source}: {type(error).__name__} {ATTEMPTS} times (killed, out of memory?)"
        yield index, outcome


def _connect(ray: Any, address: str) -> None:
    """Join a cluster; UserError where none answers. Ray alone would try for three minutes and end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, logging_level="ERROR", log_to_driver=False, ignore_reinit_error=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--cluster {address}: {str(error).splitlines()[0]}") from None


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr on a terminal, else a plain line when done. Yields the function that advances it."""
    if not sys.stderr.isatty():
        yield lambda: None
        print(f"{title}: {total} of {total}", file=sys.stderr)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
