"""A trained run and its export, made once for all tests of the room; runs that a test starts."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pretrain.export.folder import export
from tests.pretrain.runs import trained_run
from tests.pretrain.started import Started
from tests.ranks import Ranks


@pytest.fixture(scope="session")
def run(one_rank: Ranks, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run in fp32 at ZeRO 1."""
    return trained_run(one_rank, sample_folder / "shards", tmp_path_factory.mktemp("export"), "fp32", 1)


@pytest.fixture(scope="session")
def hf(run: Path) -> Path:
    """The export of that run."""
    export(run, run.parent / "hf")
    return run.parent / "hf"


@pytest.fixture
def started() -> Iterator[list[Started]]:
    """Runs that the test starts; whatever is left of them is killed."""
    runs: list[Started] = []
    yield runs
    for run in runs:
        if run.process.poll() is None:
            for process in psutil.Process(run.process.pid).children(recursive=True):
                process.kill()
            run.process.kill()
