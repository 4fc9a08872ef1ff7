"""Small corpora for tests: make one, read one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data.common.parquet import SPLITS
from data.corpus.build import make_corpus
from data.corpus.cleaning import RULES
from data.corpus.settings import load_corpus_settings
from tests.data.citations import Record, write_file

PLAIN = load_corpus_settings(
    None,
    [*(f"corpus.{rule.name}=false" for rule in RULES), "corpus.drop_publication_types=", "corpus.drop_withdrawn=false"],
)


def build(
    folder: Path, files: Sequence[list[Record]], validation: float = 0.0, test: float = 0.0, *settings: str
) -> dict[str, Any]:
    """A corpus at `folder`/corpus of update files with these records; returns its manifest."""
    for number, records in enumerate(files, start=1):
        write_file(folder / "raw" / f"pubmed26n{number:04d}.xml", records)
    chosen = load_corpus_settings(None, settings)
    return make_corpus([folder / "raw"], folder / "corpus", validation, test, 1, chosen)


def rows(corpus: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split, file after file."""
    found: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for path in sorted(corpus.glob("*.parquet")):
        found[path.name.split("-")[0]] += pq.read_table(path).to_pylist()
    return found


def texts(corpus: Path) -> dict[int, str]:
    """PMID -> text of all splits; no PMID twice."""
    pairs = [(row["pmid"], row["text"]) for part in rows(corpus).values() for row in part]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def splits(corpus: Path) -> dict[int, str]:
    return {row["pmid"]: split for split, part in rows(corpus).items() for row in part}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
