"""Fixtures shared by the rooms, made once: ranks, shards of the embedded sample, a short run and its export."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/, corpus/, tokenizer/ and shards/ of a small embedded sample."""
    from tests.pretrain.runs import make_sample

    folder = tmp_path_factory.mktemp("sample")
    make_sample(folder)
    return folder


@pytest.fixture(scope="session")
def run(one_rank: Ranks, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run in fp32 at ZeRO 1."""
    from tests.pretrain.runs import trained_run

    return trained_run(one_rank, sample_folder / "shards", tmp_path_factory.mktemp("export"), "fp32", 1)


@pytest.fixture(scope="session")
def hf(run: Path) -> Path:
    """The export of that run."""
    from pretrain.export.folder import export

    export(run, run.parent / "hf")
    return run.parent / "hf"
