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
    """raw/, corpus/, tokenizer/ and shards/ of a small embedded sample: 400 citations, 300 merges."""
    from data.corpus import make_corpus
    from data.sample import write_sample
    from data.shards import make_shards
    from data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder / "raw", citations=400)
    make_corpus([folder / "raw"], folder / "corpus", 0.05, 0.05, workers=1)
    train_tokenizer(folder / "corpus", folder / "tokenizer", merges=300, min_count=1, workers=1)
    make_shards(folder / "corpus", folder / "tokenizer", folder / "shards", workers=1)
    return folder
