"""Fixtures shared by the rooms: ranks that are started once, shards of the embedded sample made once."""

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
