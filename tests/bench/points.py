"""Many training runs of one benchmark: several at once, each on a core, and none of them twice."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from data.common.files import read_json, write_json
from tests.paths import ROOT


class Point(Protocol):
    """One run of a benchmark, with its settings. Hashable."""

    @property
    def name(self) -> str:
        """Of its folder."""
        ...


P = TypeVar("P", bound=Point)
Figures = dict[str, Any]


class Points(Generic[P]):
    """Runs points in worker processes. What they give is kept, so a benchmark that was cut off goes on."""

    def __init__(self, folder: Path, workers: int, measure: Callable[[P, Path], Figures], shown: str) -> None:
        """measure(point, folder): trains a point, in a worker; a function of a module. shown: a figure to print."""
        self._folder, self._measure, self._shown = folder, measure, shown
        self._executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        self.figures: dict[P, Figures] = {}

    def run(self, points: Iterable[P]) -> None:
        """Run those that have not been run. `figures` holds what all of them gave."""
        missing = [point for point in dict.fromkeys(points) if point not in self.figures]
        futures = {point: self._executor.submit(_kept, point, self._folder, self._measure) for point in missing}
        for point, future in futures.items():
            self.figures[point] = future.result()
            print(f"  {point.name}: {self.figures[point][self._shown]:.4f}", flush=True)

    def tune(self, grids: dict[str, list[P]], neighbours: Callable[[P], list[P]]) -> dict[str, P]:
        """The point of each grid whose shown figure is lowest. Its neighbours have been run too."""
        tried = {arm: set(grid) for arm, grid in grids.items()}
        while True:
            self.run(point for grid in tried.values() for point in sorted(grid, key=lambda point: point.name))
            best = {arm: min(grid, key=lambda point: self.figures[point][self._shown]) for arm, grid in tried.items()}
            around = {arm: set(neighbours(point)) for arm, point in best.items()}
            if all(around[arm] <= tried[arm] for arm in tried):
                return best
            tried = {arm: tried[arm] | around[arm] for arm in tried}

    def close(self) -> None:
        """End the workers."""
        self._executor.shutdown()


def train_on_two_ranks(settings: list[str]) -> None:
    """Train a run of the recipe tiny with these settings by `biogpt train`, or go on where it was."""
    command = [sys.executable, "-m", "launch.cli", "train", "tiny", *settings, "--ranks", "2"]
    subprocess.run(command, cwd=ROOT, check=True)


def _kept(point: P, folder: Path, measure: Callable[[P, Path], Figures]) -> Figures:
    result = folder / "results" / f"{point.name}.json"
    if not result.is_file():
        _use_one_core()
        figures = measure(point, folder)
        result.parent.mkdir(exist_ok=True)
        write_json(result, figures)
    return read_json(result)


def _use_one_core() -> None:
    """Keep this worker on a core of its own: a rank takes all cores that its process may use."""
    cores = sorted(os.sched_getaffinity(0))
    number = int(multiprocessing.current_process().name.split("-")[-1])
    os.sched_setaffinity(0, {cores[number % len(cores)]})
