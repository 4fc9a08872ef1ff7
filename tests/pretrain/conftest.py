"""Runs that a test starts."""

from collections.abc import Iterator

import psutil
import pytest

from tests.pretrain.started import Started


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
