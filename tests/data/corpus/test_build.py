"""data/corpus/build.py against a slow reading with dicts, on generated streams and on NLM's own update files."""

import gzip
import json
import random
import re
import shutil
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from data.common.files import ShareDone, TasksFailed, UserError, verify_files
from data.common.parquet import SPLITS
from data.common.workers import Cluster, JobArray
from data.corpus import build as build_module
from data.corpus.build import list_files, make_corpus
from data.corpus.cleaning import CLEAN, cleaning_switches, load_corpus_settings
from data.corpus.selection import FILTERS, funnel
from tests.bench.corpus import peak
from tests.data.citations import Record, citation, citation_xml, deletion, read_with_elementtree, write_file
from tests.data.killed import kill_at_call
from tests.data.reference import splitmix64
from tests.shared import NLM, needs_shared

PLAIN = load_corpus_settings(None, [f"corpus.{rule}=false" for rule in (*cleaning_switches(CLEAN), "drop_retracted")])


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
    others = {name: count for name, count in manifest["counts"].items() if name not in counts}
    assert set(others.values()) == {0} and set(others) == {*FILTERS, *cleaning_switches(CLEAN)} - set(counts)


# Which record stays


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


def test_exact_duplicates_go_before_the_split(tmp_path: Path) -> None:
    """One copy of each text is left, whichever splits the copies' PMIDs would fall into: the lowest PMID's."""
    build(tmp_path, [[citation(pmid, f"Title {pmid % 10}.") for pmid in range(40, 0, -1)]], 0.3, 0.3)
    assert sorted(texts(tmp_path / "corpus")) == list(range(1, 11))
    assert len(set(splits(tmp_path / "corpus").values())) > 1


@pytest.mark.parametrize("seed", range(250))
def test_random_streams_equal_the_slow_reading(seed: int, tmp_path: Path) -> None:
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
def test_real_files_equal_the_slow_reading(names: list[str], tmp_path: Path) -> None:
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


def test_fields_of_a_row(tmp_path: Path) -> None:
    build(tmp_path, [[citation(5, "On <i>E. coli</i>.", "It grew.", version=2)]], 0, 0)
    assert rows(tmp_path / "corpus")["train"] == [
        {"pmid": 5, "version": 2, "title": "On E. coli.", "abstract": "It grew.", "text": "On E. coli. It grew.",
         "year": 2001, "journal": "J", "source_file": "pubmed26n0001.xml"}]  # fmt: skip


# Filters


def made(folder: Path, xml: str, *settings: str) -> tuple[set[int], dict[str, Any]]:
    """The PMIDs kept of a file with these MedlineCitations, and the counts; PMID 1000 is added and always stays."""
    (folder / "raw").mkdir(exist_ok=True)
    always = citation_xml(citation(1000, "T" * 9, "word " * 200)).replace("2001", "1990")
    always = always.replace("</Article>", "<Language>eng</Language></Article>")
    (folder / "raw" / "a.xml").write_text(f"<MedlineCitationSet>{xml}{always}</MedlineCitationSet>")
    shutil.rmtree(folder / "corpus", ignore_errors=True)
    counts = make_corpus([folder / "raw"], folder / "corpus", 0, 0, 1, load_corpus_settings(None, settings))["counts"]
    return set(texts(folder / "corpus")) - {1000}, counts


def test_each_filter_drops_and_counts_its_own(tmp_path: Path) -> None:
    def record(pmid: int, year: str = "1990", more: str = "<Language>eng</Language>", abstract: str = "A b c.") -> str:
        xml = citation_xml(citation(pmid, f"Title {pmid}", abstract)).replace("<Year>2001</Year>", year and
                                                                            f"<Year>{year}</Year>")  # fmt: skip
        return xml.replace("</Article>", f"{more}</Article>")

    retracted = "<PublicationTypeList><PublicationType>Retracted Publication</PublicationType></PublicationTypeList>"
    two = "<Language>fre</Language><Language>eng</Language>"
    xml = (
        record(1) + record(2, "2001") + record(3, "") + record(4, more="<Language>fre</Language>") + record(5, more=two)
    )
    xml += (
        record(6, more=f"<Language>eng</Language>{retracted}") + record(7, abstract="") + record(8, abstract="B " * 20)
    )
    everything = {1, 2, 3, 4, 5, 6, 7, 8}

    def dropped(*settings: str) -> tuple[set[int], dict[str, int]]:
        kept, counts = made(tmp_path, xml, *settings)
        return everything - kept, {name: counts[name] for name in FILTERS if counts[name]}

    both, off = "without_title_or_abstract", "corpus.drop_retracted=false"
    assert dropped() == ({6, 7}, {both: 1, "retracted": 1})
    assert dropped(off) == ({7}, {both: 1})
    assert dropped(off, "corpus.title_and_abstract=false") == (set(), {})
    assert dropped(off, 'corpus.languages=["eng"]') == ({4, 7}, {both: 1, "other_language": 1})
    assert dropped(off, 'corpus.languages=["eng", "fre"]') == ({7}, {both: 1})
    assert dropped(off, "corpus.last_year=2000") == ({2, 3, 7}, {both: 1, "other_year": 2})
    assert dropped(off, "corpus.first_year=1990") == ({3, 7}, {both: 1, "other_year": 1})
    assert dropped(off, "corpus.minimum_words=10") == (everything - {8}, {both: 1, "short": 6})
    (tmp_path / "pmids").write_text("2\n8\n77\n")
    assert dropped(off, f"corpus.exclude_pmids={tmp_path / 'pmids'}") == ({2, 7, 8}, {both: 1, "excluded": 2})


@pytest.mark.parametrize("duplicates", ["true", "false"])
def test_the_text_of_an_excluded_pmid_stays_out_under_another(duplicates: str, tmp_path: Path) -> None:
    (tmp_path / "pmids").write_text("10\n30\n")
    records = [citation(5, "Of the benchmark"), citation(10, "Of the benchmark"), citation(20, "OF THE BENCHMARK.")]
    records += [citation(30, "Without abstract", ""), citation(40, "Without abstract"), citation(50)]
    given = (f"corpus.exclude_pmids={tmp_path / 'pmids'}", f"corpus.drop_duplicates={duplicates}")
    counts = build(tmp_path, [records], 0, 0, *given)["counts"]
    assert set(texts(tmp_path / "corpus")) == {40, 50}
    assert (counts["excluded"], counts["without_title_or_abstract"], counts["duplicates"]) == (3, 1, 0)


def test_filters_change_without_parsing_again_and_cleaning_parses_again(tmp_path: Path) -> None:
    build(tmp_path, [[citation(1, "One"), citation(2, "Two &amp;lt; three")]])
    part = tmp_path / "corpus.parts" / "pubmed26n0001.xml" / "manifest.json"
    before = part.stat().st_mtime_ns
    shutil.rmtree(tmp_path / "corpus")
    build(tmp_path, [], 0, 0, "corpus.minimum_words=5")
    assert part.stat().st_mtime_ns == before and texts(tmp_path / "corpus") == {2: "Two < three An abstract."}
    shutil.rmtree(tmp_path / "corpus")
    counts = build(tmp_path, [], 0, 0, "corpus.unescape_entities=false")["counts"]
    assert part.stat().st_mtime_ns > before and counts["unescape_entities"] == 0
    assert texts(tmp_path / "corpus")[2] == "Two &lt; three An abstract."


def test_an_update_file_is_added_without_parsing_the_old_ones(tmp_path: Path) -> None:
    files = [[citation(pmid, f"Title {pmid}.") for pmid in range(start, start + 50)] for start in (1, 40)]
    update = [citation(3, "New"), deletion(5)]
    build(tmp_path / "grown", files, 0.1, 0.1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "grown" / "corpus.parts").glob("*/manifest.json")}
    shutil.rmtree(tmp_path / "grown" / "corpus")
    write_file(tmp_path / "grown" / "raw" / "pubmed26n0003.xml", update)
    make_corpus([tmp_path / "grown" / "raw"], tmp_path / "grown" / "corpus", 0.1, 0.1, workers=1)
    assert len(before) == 2 and all(path.stat().st_mtime_ns == when for path, when in before.items())
    build(tmp_path / "whole", [*files, update], 0.1, 0.1)
    assert content(tmp_path / "grown" / "corpus") == content(tmp_path / "whole" / "corpus")


def test_duplicates_are_kept_where_the_switch_is_off(tmp_path: Path) -> None:
    records = [citation(1, "The IL-2 Receptor."), citation(2, "the IL2 receptor")]
    assert build(tmp_path / "a", [records])["counts"]["duplicates"] == 1
    assert set(texts(tmp_path / "a" / "corpus")) == {1}
    build(tmp_path / "b", [records], 0, 0, "corpus.drop_duplicates=false")
    assert set(texts(tmp_path / "b" / "corpus")) == {1, 2}


@needs_shared
def test_filters_on_nlms_sample(tmp_path: Path) -> None:
    """The data sheet counts 177 records, 109 abstracts, 3 retracted, 7 empty titles, 26 not English."""
    path = NLM / "pubmedsample18n0001.xml.gz"
    raw = gzip.decompress(path.read_bytes()).decode().split("<MedlineCitation ")[1:]
    other = {record for record in raw if "<Language>eng<" not in record}
    empty = {record for record in raw if "<AbstractText" not in record and not re.search(r"<ArticleTitle>\S", record)}
    retracted = {record for record in raw if ">Retracted Publication<" in record}
    assert (len(raw), len(empty), len(retracted)) == (177, 7, 3)
    assert len(other | {record for record in raw if record.count("<Language>") > 1}) == 26
    one_suffices = ["corpus.title_and_abstract=false", "corpus.drop_duplicates=false"]
    settings = load_corpus_settings(None, [*one_suffices, 'corpus.languages=["eng"]'])
    counts = make_corpus([path], tmp_path / "a", 0, 0, 1, settings)["counts"]
    assert (counts["records"], counts["without_title_or_abstract"]) == (177, 7)
    assert counts["other_language"] == len(other - empty) and counts["retracted"] == len(retracted - empty - other)
    assert counts["train"] == len(set(raw) - empty - other - retracted)
    counts = make_corpus([path], tmp_path / "b", 0, 0, 1, PLAIN)["counts"]
    assert counts["without_title_or_abstract"] == 177 - 109


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


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0), (0, 1.0), (0.5, 0.5), (float("nan"), 0)])
def test_fractions_out_of_bounds_are_refused(validation: float, test: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fraction"):
        build(tmp_path, [[citation(1)]], validation, test)
    assert not (tmp_path / "corpus").exists()


# The files


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
    monkeypatch.setattr(build_module, "ROWS_PER_FILE", 25)
    monkeypatch.setattr(build_module, "ROWS_PER_GROUP", 10)
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
    monkeypatch.setattr(build_module, "CHARACTERS_PER_GROUP", 40_000)  # of some 9,000 each
    build(tmp_path / "many", records, 0.3, 0.0)
    assert rows(tmp_path / "many" / "corpus") == rows(tmp_path / "one" / "corpus")
    files = [*tmp_path.glob("many/corpus.parts/*/part.parquet"), *tmp_path.glob("many/corpus/*.parquet")]
    assert len(files) == 4
    for file in map(pq.ParquetFile, files):
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        assert len(sizes) >= 2 and max(sizes) <= 8


def test_a_workers_memory_is_bounded_by_characters_not_rows(tmp_path: Path) -> None:
    """300 texts of 1 MB, a gzip file of 1 MB: held together they would take 2 GB."""
    text = " ".join(f"word{number}" for number in range(110_000))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", compresslevel=1) as stream:
        for number in range(300):
            stream.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    code = "import sys; from pathlib import Path; from data.corpus.build import make_corpus\n"
    code += "make_corpus([Path(sys.argv[1])], Path(sys.argv[2]), 0, 0, 1)"
    assert peak(code, str(tmp_path / "a.jsonl.gz"), str(tmp_path / "corpus")) < 1e9


def test_the_same_bytes_with_two_workers_and_in_any_order(tmp_path: Path) -> None:
    files = [[citation(pmid, f"Title {pmid} of {number}.") for pmid in range(number, 90, number)]
             for number in (1, 2, 3)]  # fmt: skip
    build(tmp_path, files, 0.2, 0.2)
    raw = sorted((tmp_path / "raw").iterdir())
    make_corpus([raw[2], raw[0], raw[1]], tmp_path / "shuffled", 0.2, 0.2, workers=1)
    make_corpus([tmp_path / "raw"], tmp_path / "parallel", 0.2, 0.2, workers=2)
    assert content(tmp_path / "shuffled") == content(tmp_path / "corpus") == content(tmp_path / "parallel")


def test_files_come_in_nlms_order(tmp_path: Path) -> None:
    """By year, then number: baseline and update files of a year share one numbering."""
    names = ["pubmed25n1274.xml.gz", "pubmed26n0001.xml", "medline16n0902.xml.gz", "pubmed26n1335.xml.gz", "extra.xml"]
    for name in (*names, "README.txt", "pubmed26n0002.xml.gz.md5"):
        (tmp_path / name).touch()
    (tmp_path / "folder.xml").mkdir()
    assert [path.name for path in list_files([tmp_path])] == [names[index] for index in (4, 2, 0, 1, 3)]


def test_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, reason in ((tmp_path / "nowhere", "no such file or folder"), (tmp_path / "empty", "holds no .xml")):
        with pytest.raises(UserError, match=f"{path}: {reason}"):
            make_corpus([path], tmp_path / "corpus", 0, 0, workers=1)
    with pytest.raises(UserError, match="no citation is left for training"):
        build(tmp_path, [[citation(1, "No abstract", "")]])
    assert not (tmp_path / "corpus").exists()
    with pytest.raises(UserError, match="needs a name of its own"):
        make_corpus([tmp_path / "raw"], Path(), 0, 0, workers=1)


@pytest.mark.parametrize("elements", [3, 7])
def test_a_job_array_gives_the_same_bytes(elements: int, tmp_path: Path) -> None:
    files = [[citation(pmid, f"Title {pmid} of {number}.") for pmid in range(number, 90, number)]
             for number in (1, 2, 3, 4)]  # fmt: skip
    build(tmp_path / "whole", files, 0.2, 0.2)
    shutil.copytree(tmp_path / "whole" / "raw", tmp_path / "array" / "raw")
    corpus = tmp_path / "array" / "corpus"
    for element in range(elements, 0, -1):
        with pytest.raises(ShareDone):
            make_corpus([tmp_path / "array" / "raw"], corpus, 0.2, 0.2, JobArray(element, elements))
        assert not corpus.exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("array/corpus.parts/*/manifest.json")}
    make_corpus([tmp_path / "array" / "raw"], corpus, 0.2, 0.2, 2)
    assert len(before) == 4 and all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert content(corpus) == content(tmp_path / "whole" / "corpus")


def test_a_ray_cluster_gives_the_same_bytes_though_a_worker_is_killed(ray_cluster: str, tmp_path: Path) -> None:
    files = [[citation(pmid, f"Title {pmid} of {number}.", "word <i>x</i> " * 300) for pmid in range(4_000)]
             for number in range(4)]  # fmt: skip
    build(tmp_path, files, 0.2, 0.2)
    killed = threading.Event()

    def kill_a_worker() -> None:
        while not killed.is_set():
            for process in psutil.process_iter(["cmdline"]):
                if "ray::perform" in "".join(process.info["cmdline"] or []) and not killed.is_set():
                    process.kill()
                    killed.set()

    thread = threading.Thread(target=kill_a_worker)
    thread.start()
    make_corpus([tmp_path / "raw"], tmp_path / "cluster", 0.2, 0.2, Cluster(ray_cluster))
    assert killed.is_set()
    thread.join()
    assert content(tmp_path / "cluster") == content(tmp_path / "corpus")


# Text that is not PubMed's


def write_texts(folder: Path, texts: list[str | None]) -> list[Path]:
    """The same texts as every kind of file, under another column than the default (plain lines have no columns)."""
    table = pa.table({"id": list(range(len(texts))), "body": texts})
    lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(table, folder / "c.parquet")
    pyarrow.csv.write_csv(table, folder / "d.csv")
    (folder / "e.json").write_text(json.dumps(table.to_pylist()))
    (folder / "f.txt").write_text("".join(f"{text or ''}\n" for text in texts))
    return [folder / name for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.csv", "e.json", "f.txt")]


@pytest.mark.parametrize("index", range(6))
def test_other_text_enters_by_the_same_door(index: int, tmp_path: Path) -> None:
    """Cleaned, counted and split like the rest; an empty one is dropped, of equal ones one stays."""
    other = write_texts(tmp_path, ["A note &lt; another.", "A second note.", None, "", "a second  note", "Cité, “ça”."])
    write_file(tmp_path / "raw" / "pubmed26n0001.xml", [citation(1)])
    settings = load_corpus_settings(None, ["corpus.text_column=body"])
    manifest = make_corpus([other[index], tmp_path / "raw"], tmp_path / "corpus", 0, 0, 1, settings)
    kept = rows(tmp_path / "corpus")["train"]
    one_of = {row["text"] for row in kept if row["pmid"] < 0} - {"A note < another.", "Cité, “ça”."}
    assert one_of in ({"A second note."}, {"a second  note"})
    assert len(kept) == 4 and {row["title"] for row in kept if row["pmid"] < 0} == {""}
    assert manifest["counts"]["unescape_entities"] == 1 and manifest["counts"]["duplicates"] == 1
    assert {row["source_file"] for row in kept} == {other[index].name, "pubmed26n0001.xml"}


def test_lines_and_words_of_other_text_stay_apart(tmp_path: Path) -> None:
    lines = ["First line.\nSecond\tline.\r\n\r\n  Third.", "word " * 70_000]
    (tmp_path / "my[notes]*.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    counts = make_corpus([tmp_path / "my[notes]*.jsonl"], tmp_path / "corpus", 0, 0, 1)["counts"]
    assert set(texts(tmp_path / "corpus").values()) == {"First line. Second line. Third.", ("word " * 70_000).strip()}
    assert counts["words"] == 5 + 70_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.txt"])
def test_an_empty_file_of_other_text_has_no_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    write_file(tmp_path / "raw" / "pubmed26n0001.xml", [citation(1)])
    counts = make_corpus([tmp_path / name, tmp_path / "raw"], tmp_path / "corpus", 0, 0, 1)["counts"]
    assert (counts["records"], counts["train"]) == (1, 1)


def test_other_text_gives_way_to_pubmeds_and_passes_filters_of_what_it_has_not(tmp_path: Path) -> None:
    notes = ["Title 1. An abstract.", "A note.", "A note.", ""]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in notes))
    write_file(tmp_path / "raw" / "pubmed26n0001.xml", [citation(1, "Title 1."), citation(2)])
    both = [tmp_path / "notes.jsonl", tmp_path / "raw"]
    counts = make_corpus(both, tmp_path / "a", 0, 0, 1)["counts"]
    assert sorted(texts(tmp_path / "a").values()) == ["A note.", "A title. An abstract.", "Title 1. An abstract."]
    assert {1, 2} < set(texts(tmp_path / "a"))
    assert (counts["superseded"], counts["without_title_or_abstract"], counts["duplicates"]) == (0, 1, 2)
    filters = ["corpus.profile=biogpt", "corpus.languages=eng"]
    counts = make_corpus(both, tmp_path / "b", 0, 0, 1, load_corpus_settings(None, filters))["counts"]
    kept = [row["text"] for row in rows(tmp_path / "b")["train"]]
    assert sorted(kept) == ["A note.", "A note.", "Title 1. An abstract."] and counts["other_language"] == 2


def test_other_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (good, bad, *_) = write_texts(tmp_path, ["A note."])
    (tmp_path / "broken.jsonl").write_text('{"body": "x"}\n{"body": \n')
    (tmp_path / "numbers.jsonl").write_text('{"body": 5}\n')
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "c.parquet").read_bytes()[:-30])
    paths = [good, *(tmp_path / name for name in ("broken.jsonl", "numbers.jsonl", "cut.parquet"))]
    settings = load_corpus_settings(None, ["corpus.text_column=body"])
    with pytest.raises(TasksFailed) as caught:
        make_corpus(paths, tmp_path / "corpus", 0, 0, 1, settings)
    assert [failure.split(": ")[0] for failure in caught.value.failures] == sorted(map(str, paths[1:]))
    assert not any("\n" in failure for failure in caught.value.failures)
    with pytest.raises(TasksFailed, match="has no column 'text' but id, body; see"):
        make_corpus([bad], tmp_path / "corpus", 0, 0, 1)
    (tmp_path / "a.docx").touch()
    with pytest.raises(UserError, match=r"a\.docx: neither \.xml"):
        make_corpus([tmp_path / "a.docx"], tmp_path / "corpus", 0, 0, 1)


# Faults


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_input_is_named_and_the_rest_goes_on(workers: int, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_file(tmp_path / "raw" / f"pubmed26n000{number}.xml.gz", [citation(pmid) for pmid in range(1, 200)])
    bad = tmp_path / "raw" / "pubmed26n0002.xml.gz"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-40])
    with pytest.raises(TasksFailed) as caught:
        make_corpus([tmp_path / "raw"], tmp_path / "corpus", 0.1, 0.1, workers)
    (failure,) = caught.value.failures
    assert failure.startswith(f"{bad}: damaged or truncated gzip") and "\n" not in failure
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.parts", "raw"]
    done = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("corpus.parts/*/manifest.json")}
    assert sorted(done) == ["pubmed26n0001.xml.gz", "pubmed26n0003.xml.gz"]
    bad.write_bytes(whole)
    make_corpus([tmp_path / "raw"], tmp_path / "corpus", 0.1, 0.1, workers)
    after = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("corpus.parts/*/manifest.json")}
    assert len(after) == 3 and after.items() > done.items()


@needs_shared
@pytest.mark.parametrize("name", sorted(path.name for path in (NLM / "malformed").glob("*")))
def test_malformed_real_files_are_named_and_make_no_corpus(name: str, tmp_path: Path) -> None:
    with pytest.raises(TasksFailed, match=name):
        make_corpus([NLM / "malformed" / name], tmp_path / "corpus", 0, 0, workers=1)
    assert not (tmp_path / "corpus").exists() and not list(tmp_path.glob("*/*/manifest.json"))


@pytest.mark.parametrize(
    ("step", "call"),
    [
        ("data.corpus.build.write_part", 2),
        ("data.corpus.build.choose_rows", 1),
        ("data.corpus.build.write_piece", 1),
        ("data.common.files.write_manifest", 1),
    ],
)
def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(
    step: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [[citation(pmid, f"Title {pmid}.") for pmid in range(start, start + 50)] for start in (1, 30, 60)]
    build(tmp_path, files, 0.2, 0.2)
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "raw", again / "raw")
    code = "from data.corpus.build import make_corpus; make_corpus([Path('raw')], Path('corpus'), 0.2, 0.2, workers=1)"
    kill_at_call(again, step, call, code)
    assert not (again / "corpus").exists() and list(again.glob("corpus.parts/*"))
    if step == "data.common.files.write_manifest":  # all is written by then, and not again
        monkeypatch.setattr(build_module, "write_piece", lambda *_: 1 / 0)
    make_corpus([again / "raw"], again / "corpus", 0.2, 0.2, workers=1)
    assert content(again / "corpus") == content(tmp_path / "corpus")
    assert sorted(path.name for path in again.iterdir()) == ["corpus", "corpus.parts", "raw"]


def test_a_file_system_without_hard_links_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Path) -> None:
        raise PermissionError("no links here")

    build(tmp_path, [[citation(1), citation(2, "Two")]])
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    make_corpus([tmp_path / "raw"], tmp_path / "other", 0.0, 0.0, workers=1)
    assert content(tmp_path / "other") == content(tmp_path / "corpus")
    assert not list(tmp_path.glob("other.parts/.pieces"))


def test_a_finished_corpus_is_left_alone_and_other_requests_are_refused(tmp_path: Path) -> None:
    manifest = build(tmp_path, [[citation(1, "One"), citation(2, "Two")]])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").iterdir()}
    assert build(tmp_path, []) == manifest
    with pytest.raises(UserError, match="other inputs or settings"):
        build(tmp_path, [], validation=0.3)
    with pytest.raises(UserError, match="other inputs or settings"):
        build(tmp_path, [[citation(1, "Changed"), citation(2, "Two")]])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").iterdir()}
    verify_files(tmp_path / "corpus", manifest)
