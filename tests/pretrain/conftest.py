"""Runs that a test starts."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data.shards.build import make_shards
from data.text.tokenizer import Tokenizer, read_merges
from data.text.train import with_reserved, write_tokenizer_files
from tests.pretrain.started import Started


@pytest.fixture(scope="session")
def reserved_shards(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of the sample by its own tokenizer with 8 reserved ids."""
    folder, plain = tmp_path_factory.mktemp("reserved"), sample_folder / "tokenizer"
    (folder / "tokenizer").mkdir()
    vocabulary = with_reserved(Tokenizer(plain).vocabulary, 8)
    write_tokenizer_files(folder / "tokenizer", vocabulary, read_merges(plain / "merges.txt"))
    make_shards(sample_folder / "corpus", folder / "tokenizer", folder / "shards", workers=1)
    return folder / "shards"


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
