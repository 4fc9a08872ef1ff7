"""A Ray cluster for the tests of the data room."""

import os
import sys
from collections.abc import Iterator

import pytest

from tests.shared import ROOT


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[str]:
    """The address of a Ray cluster of this machine with two workers that import what the tests do."""
    ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    with pytest.MonkeyPatch.context() as environment:  # the workers inherit it
        environment.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield "auto"
    ray.shutdown()
