"""data/corpus/output.py: the files of the corpus, their rows, sizes and row groups."""

import errno
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from data.common.parquet import SPLITS
from data.corpus import schema
from data.corpus.build import make_corpus
from tests.data.citations import citation
from tests.data.corpora import build, content, rows


def test_fields_of_a_row(tmp_path: Path) -> None:
    build(tmp_path, [[citation(5, "On <i>E. coli</i>.", "It grew.", version=2)]], 0, 0)
    assert rows(tmp_path / "corpus")["train"] == [
        {"pmid": 5, "version": 2, "title": "On E. coli.", "abstract": "It grew.", "text": "On E. coli. It grew.",
         "year": 2001, "journal": "J", "source_file": "pubmed26n0001.xml"}]  # fmt: skip


def test_datasets_reads_the_corpus(tmp_path: Path) -> None:
    """By folder, as a user does: the splits are found by the names of the files."""
    build(tmp_path, [[citation(pmid, f"Title {pmid}.") for pmid in range(1, 60)]], 0.3, 0.2)
    corpus = tmp_path / "corpus"
    loaded = load_dataset("parquet", data_dir=str(corpus), cache_dir=str(tmp_path / "cache"))
    assert {split: list(loaded[split]) for split in SPLITS} == rows(corpus)
    assert min(len(loaded[split]) for split in SPLITS) > 0
    files = {"held_out": str(corpus / "validation-*.parquet")}
    alone = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert list(alone["held_out"]) == rows(corpus)["validation"]


def test_datasets_reads_a_corpus_with_an_empty_split(tmp_path: Path) -> None:
    """It refuses a file without rows, so there is none; the manifest still counts 0."""
    counts = build(tmp_path, [[citation(pmid, f"Title {pmid}.") for pmid in range(1, 60)]], 0.3, 0.0)["counts"]
    loaded = load_dataset("parquet", data_dir=str(tmp_path / "corpus"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(loaded[split]) for split in loaded} == {
        "train": counts["train"], "validation": counts["validation"]}  # fmt: skip
    assert counts["test"] == 0 and counts["train"] + counts["validation"] == 59


def test_large_splits_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [[citation(pmid, f"T{pmid}") for pmid in range(start, start + 40)] for start in (1, 41, 81)]
    build(tmp_path / "one", files, 0.1, 0.1)
    monkeypatch.setattr(schema, "ROWS_PER_FILE", 25)
    monkeypatch.setattr(schema, "ROWS_PER_GROUP", 10)
    build(tmp_path / "many", files, 0.1, 0.1)
    assert rows(tmp_path / "many" / "corpus") == rows(tmp_path / "one" / "corpus")
    sizes = [pq.read_table(path).num_rows for path in sorted((tmp_path / "many" / "corpus").glob("train-*"))]
    assert len(sizes) == 3 and min(sizes) >= 25  # whole input files together
    assert len(list((tmp_path / "many" / "corpus").glob("validation-*"))) == 1


def test_groups_of_long_texts_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups are what is held in memory: of parts, of what is written of them, of files that are joined."""
    records = [[citation(pmid, f"T{pmid}", f"{pmid} word " * 1_000) for pmid in range(start, start + 30)]
               for start in (1, 31)]  # fmt: skip
    build(tmp_path / "one", records, 0.3, 0.0)
    monkeypatch.setattr(schema, "CHARACTERS_PER_GROUP", 40_000)  # of some 9,000 each
    build(tmp_path / "many", records, 0.3, 0.0)
    assert rows(tmp_path / "many" / "corpus") == rows(tmp_path / "one" / "corpus")
    files = [*tmp_path.glob("many/corpus.parts/*/part.parquet"), *tmp_path.glob("many/corpus/*.parquet")]
    assert len(files) == 4
    for file in map(pq.ParquetFile, files):
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        assert len(sizes) >= 2 and max(sizes) <= 8


def test_a_file_system_without_hard_links_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Path) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    build(tmp_path, [[citation(1), citation(2, "Two")]])
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    make_corpus([tmp_path / "raw"], tmp_path / "other", 0.0, 0.0, workers=1)
    assert content(tmp_path / "other") == content(tmp_path / "corpus")
    assert not list(tmp_path.glob("other.parts/.pieces"))
