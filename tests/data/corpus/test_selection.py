"""data/corpus/selection.py against a simple reference with dicts, on generated streams and on NLM's files."""

import gzip
import random
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data.common.parquet import SPLITS
from data.corpus.build import make_corpus
from data.corpus.cleaning import RULES
from data.corpus.filters import FILTERS
from data.corpus.selection import funnel
from tests.data.citations import Record, citation, deletion, read_with_elementtree
from tests.data.corpora import PLAIN, build, rows, splits, texts
from tests.data.reference import splitmix64
from tests.shared import NLM, needs_shared


def slow_corpus(files: Sequence[list[Record]], validation: float, test: float) -> tuple[dict[str, Any], dict[str, int]]:
    """Split -> {(pmid, version): text}, and the counts, by walking through all records with dicts."""
    records: dict[int, list[tuple[int, int, int, Record]]] = {}
    deleted = 0
    for number, file in enumerate(files):
        for place, record in enumerate(file):
            of_pmid = records.setdefault(record.pmid, [])
            if record.deleted:
                staying = [each for each in of_pmid if each[3].version != record.version]
                deleted += len(of_pmid) - len(staying)
                records[record.pmid] = staying
            else:
                of_pmid.append((number, record.version, place, record))
    newest = {pmid: max(of_pmid)[3] for pmid, of_pmid in records.items() if of_pmid}
    complete = {pmid: record for pmid, record in newest.items() if record.title and record.abstract}
    kept: dict[str, Record] = {}
    for pmid in sorted(complete):
        folded = unicodedata.normalize("NFKC", text_of(complete[pmid])).casefold()
        kept.setdefault(re.sub(r"[\x00-/:-@\[-`{-\x7f]", "", folded), complete[pmid])
    chosen: dict[str, dict[tuple[int, int], str]] = {split: {} for split in SPLITS}
    for record in kept.values():
        share = splitmix64(record.pmid) / 2**64
        split = "test" if share < test else "validation" if share < test + validation else "train"
        chosen[split][record.pmid, record.version] = text_of(record)
    citations = sum(not record.deleted for file in files for record in file)
    return chosen, {
        "records": citations,
        "deletions": sum(len(file) for file in files) - citations,
        "deleted": deleted,
        "superseded": citations - deleted - len(newest),
        "without_title_or_abstract": len(newest) - len(complete),
        "duplicates": len(complete) - len(kept),
        "near_duplicates": 0,
        "words": sum(text_of(record).count(" ") + 1 for record in kept.values()),
        **{split: len(chosen[split]) for split in SPLITS},
    }


def text_of(record: Record) -> str:
    return f"{record.title} {record.abstract}"


def assert_equals_slow(corpus: Path, manifest: dict[str, Any], files: Sequence[list[Record]]) -> None:
    request = manifest["request"]
    expected, counts = slow_corpus(files, request["validation_fraction"], request["test_fraction"])
    found = {split: {(row["pmid"], row["version"]): row["text"] for row in part}
             for split, part in rows(corpus).items()}  # fmt: skip
    assert found == expected
    assert counts.items() <= manifest["counts"].items()
    others = {name: count for name, count in manifest["counts"].items() if name not in (*counts, "not_read")}
    assert not any(others.pop("publication_types", {}).values())
    expected_names = {each.name for each in (*FILTERS, *RULES)} - {"publication_types", *counts}
    assert set(others.values()) == {0} and set(others) == expected_names


def test_in_a_file_the_highest_version_wins_wherever_it_stands(tmp_path: Path) -> None:
    build(tmp_path, [[citation(1, "Second", version=2), citation(2), citation(1, "First", version=1)]])
    assert texts(tmp_path / "corpus")[1] == "Second An abstract."


def test_a_later_file_wins_over_a_higher_version(tmp_path: Path) -> None:
    build(tmp_path, [[citation(1, "Second", version=2), citation(2)], [citation(1, "First", version=1)]])
    assert texts(tmp_path / "corpus")[1] == "First An abstract."


def test_a_deletion_withdraws_its_version_alone(tmp_path: Path) -> None:
    files = [[citation(1, "First"), citation(2)], [citation(1, "Second", version=2)], [deletion(1, 1)]]
    build(tmp_path / "a", files)
    assert texts(tmp_path / "a" / "corpus")[1] == "Second An abstract."
    build(tmp_path / "b", [*files, [deletion(1, 2)]])
    assert set(texts(tmp_path / "b" / "corpus")) == {2}


def test_of_one_version_the_later_file_wins(tmp_path: Path) -> None:
    build(tmp_path, [[citation(1, "Old")], [citation(1, "New")]])
    assert texts(tmp_path / "corpus") == {1: "New An abstract."}


def test_a_deletion_deletes_and_a_later_revision_comes_back(tmp_path: Path) -> None:
    gone = [[citation(1, "One"), citation(2, "Two"), citation(3, "Three")], [deletion(1), deletion(2)]]
    build(tmp_path / "a", gone)
    assert texts(tmp_path / "a" / "corpus") == {3: "Three An abstract."}
    build(tmp_path / "b", [*gone, [citation(1, "Back")]])
    assert texts(tmp_path / "b" / "corpus") == {1: "Back An abstract.", 3: "Three An abstract."}


def test_an_old_version_does_not_stand_in_for_a_newest_without_abstract(tmp_path: Path) -> None:
    for number, (title, abstract) in enumerate((("New", ""), ("", "New"))):
        folder = tmp_path / str(number)
        build(folder, [[citation(1, "Old"), citation(2, "Other")], [citation(1, title, abstract, version=2)]])
        assert texts(folder / "corpus") == {2: "Other An abstract."}


@pytest.mark.parametrize("seed", range(250))
def test_random_streams_equal_the_reference(seed: int, tmp_path: Path) -> None:
    """Few PMIDs, versions and texts, so that everything meets everything; up to five files."""
    rng = random.Random(seed)

    def random_record() -> Record:
        pmid, version = rng.randint(1, 12), rng.choice((1, 1, 1, 2, 3))
        if rng.random() < 0.2:
            return deletion(pmid, version)
        title, abstract = rng.choice(("", *"ABCDEF")), rng.choice(("", *"GHIJK"))
        return citation(pmid, title, abstract, version)

    files = [[random_record() for _ in range(rng.randint(1, 15))] for _ in range(rng.randint(1, 5))]
    files = [sorted(file, key=lambda record: record.deleted) for file in files]  # deletions stand at a file's end
    always = next(pmid for pmid in range(100, 200) if splitmix64(pmid) > 2**63)  # training must not be empty
    files[0].insert(0, citation(always, "Always", "there"))
    assert_equals_slow(tmp_path / "corpus", build(tmp_path, files, validation=0.25, test=0.1), files)


@needs_shared
@pytest.mark.parametrize(
    "names",
    [["updates/pubmed20n0001", "updates/pubmed20n0002", "updates/pubmed20n1203", "pubmed21n0001",
      "updates/pubmed21n1016_excerpt_original", "updates/pubmed21n1016_excerpt_partially_changed",
      "updates/pubmed22n1115", "updates/pubmed22n1313"],
     ["updates/versions_and_deletions", "cases/comments_and_deletions"],
     ["medsamp2010", "medsamp2011", "medsamp2012", "medsamp2014", "medsamp2017", "medline16n0902"]],
    ids=["updates", "versions", "samples"],
)  # fmt: skip
def test_real_files_equal_the_reference(names: list[str], tmp_path: Path) -> None:
    """NLM's revisions, read by the standard library and chosen with dicts; MathML-free records only."""
    paths = [NLM / f"{name}.xml.gz" for name in names]
    order = {path.name: index for index, path in enumerate(paths)}
    manifest = make_corpus(paths[::-1], tmp_path / "corpus", 0.1, 0.1, 1, PLAIN)
    in_order = sorted(paths, key=lambda path: order[path.name] + 100 * path.name.startswith(("medline", "pubmed2")))
    read = [list(read_with_elementtree(gzip.decompress(path.read_bytes()))) for path in in_order]
    assert not any(math for file in read for _, math in file)
    assert_equals_slow(tmp_path / "corpus", manifest, [[record for record, _ in file] for file in read])
    print(f"{sum(map(len, read))} records and deletions compared, {manifest['counts']}")


@needs_shared
def test_real_deletions_withdraw_real_records(tmp_path: Path) -> None:
    paths = [NLM / f"{name}.xml.gz" for name in ("assembled_3693", "medsamp2014")]  # in the order of their names
    stays: dict[tuple[int, int], bool] = {}
    for path in paths:
        for record, _ in read_with_elementtree(gzip.decompress(path.read_bytes())):
            if not record.deleted or (record.pmid, record.version) in stays:
                stays[record.pmid, record.version] = not record.deleted
    gone = {pmid for (pmid, _), left in stays.items() if not left} - {pmid for (pmid, _), left in stays.items() if left}
    counts = make_corpus(paths, tmp_path / "corpus", 0, 0, 1)["counts"]
    assert counts["deleted"] == len(gone) == 7 and gone.isdisjoint(texts(tmp_path / "corpus"))


@needs_shared
def test_a_real_revision_is_the_text_that_stays(tmp_path: Path) -> None:
    original, changed = sorted((NLM / "updates").glob("pubmed21n1016*"))
    make_corpus([original], tmp_path / "old", 0, 0, workers=1)
    make_corpus([changed, original], tmp_path / "new", 0, 0, workers=1)
    make_corpus([changed], tmp_path / "only", 0, 0, workers=1)
    assert texts(tmp_path / "new") == texts(tmp_path / "only") != texts(tmp_path / "old")


def test_the_funnel_adds_up(tmp_path: Path) -> None:
    files = [[citation(1), citation(2, "B"), citation(3, "C", ""), citation(4, "B")], [citation(1, "D"), deletion(2)]]
    table = dict(funnel(build(tmp_path, files)["counts"]))
    assert table["records read"] == 5 and table["kept"] == 2 == table["  train"]
    assert table["records read"] - sum(count for name, count in table.items() if name[0] == "-") == table["kept"]


# Splits


def test_a_record_never_changes_sides(tmp_path: Path) -> None:
    """When PubMed grows, is revised and loses records, whatever is in both corpora is in the same split."""
    first = [citation(pmid, f"Title {pmid}.") for pmid in range(1, 400)]
    second = [citation(pmid, f"Revised {pmid}.") for pmid in range(300, 900)]
    build(tmp_path / "small", [first], 0.2, 0.2)
    build(tmp_path / "large", [first, [*second, *map(deletion, range(1, 50))]], 0.2, 0.2)
    small, large = splits(tmp_path / "small" / "corpus"), splits(tmp_path / "large" / "corpus")
    assert len(small) == 399 and len(large) == 850
    assert all(large[pmid] == split for pmid, split in small.items() if pmid in large)


def test_fractions_are_about_right(tmp_path: Path) -> None:
    counts = build(tmp_path, [[citation(pmid, f"{pmid}") for pmid in range(1, 4_001)]], 0.2, 0.05)["counts"]
    assert abs(counts["validation"] - 800) < 80 and abs(counts["test"] - 200) < 45
    assert counts["train"] + counts["validation"] + counts["test"] == 4_000
