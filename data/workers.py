"""Where the work runs: one file is one task, in this process or in local processes, with a progress bar."""

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Result = TypeVar("Result")


def run_tasks(function: Callable[..., Result], tasks: list[tuple[Any, ...]], workers: int, title: str) -> list[Result]:
    """`function(*task)` for each task, at most `workers` at once; the results in the order of the tasks.

    The function must be importable and its arguments picklable. An error of any task ends the others.
    """
    with progress(title, len(tasks)) as advance:
        if workers <= 1 or len(tasks) <= 1:
            results = []
            for task in tasks:
                results.append(function(*task))
                advance()
            return results
        context = multiprocessing.get_context("spawn")  # fork would copy the threads' locks of pyarrow
        with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context) as pool:
            futures = [pool.submit(function, *task) for task in tasks]
            for future in futures:
                future.add_done_callback(lambda _: advance())
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                failed = [future for future in futures if future.done() and future.exception()]
                return [future.result() for future in (failed or futures)]
            finally:
                pool.shutdown(cancel_futures=True)


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
