"""data/corpus/benchmarks.py: what is found, left out and reported; the same bytes however the work is done."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.common.files import ShareDone, UserError, read_json, verify_files
from data.common.workers import Cluster, JobArray
from data.corpus.benchmarks import BenchmarkItem, Benchmarks
from data.corpus.build import make_corpus
from data.corpus.selection import funnel
from tests.data.citations import citation, deletion, write_file
from tests.data.corpora import content, splits, texts
from tests.data.killed import kill_at_call

SENTENCES = [
    f"{subject} {verb} the {kind} of {number} volunteers with a disease of the {organ} over {number + 3} weeks of care."
    for number, (subject, verb, kind, organ) in enumerate(
        zip(
            ("Dravonin", "Kalitinib", "Moderate exercise", "The new device", "A diet of plants", "Night work"),
            ("reduces", "hardly changes", "improves", "may worsen", "stabilises", "does not influence"),
            ("heart rate", "bone density", "quality of sleep", "muscle strength", "blood glucose", "reported pain"),
            ("kidney", "liver", "heart", "lung", "stomach", "brain"),
            strict=True,
        ),
        start=10,
    )
]
ITEMS = [
    BenchmarkItem(
        "questions", "test", "a", 10, "A text that is not the record's, though the PMID is the same as there."
    ),
    BenchmarkItem("questions", "test", "b", 11, f"{SENTENCES[0]} {SENTENCES[1]}"),
    BenchmarkItem("questions", "test", "c", 999, f"{SENTENCES[4]} {SENTENCES[4]} It is in no record, nor is the PMID."),
    BenchmarkItem("questions", "train", "a", None, SENTENCES[2].upper()),
    BenchmarkItem("sentences", "test", "1", None, SENTENCES[3].replace(" ", "  ")),
    BenchmarkItem("sentences", "test", "2", None, "A title."),
    BenchmarkItem("sentences", "test", "3", 60, "Deleted."),
]


def corpus_files(folder: Path) -> list[Path]:
    """Two of NLM's files and one of other text, which hold items in several ways."""
    first = [citation(pmid, f"Title {pmid}.") for pmid in range(100, 140)]
    first += [citation(10), citation(11, "Both.", f"{SENTENCES[0]} {SENTENCES[1]}"), citation(60, "Of the item.")]
    first += [citation(20, "Superseded.", SENTENCES[2]), citation(21, "No abstract.", "")]
    first += [citation(30, "A copy.", f"RESULTS: {SENTENCES[0].lower()} {SENTENCES[1]}")]
    second = [citation(20, "The newest.", SENTENCES[5]), citation(40, SENTENCES[2], SENTENCES[5]), deletion(60)]
    write_file(folder / "raw" / "pubmed26n0001.xml", first)
    write_file(folder / "raw" / "pubmed26n0002.xml", second)
    (folder / "notes.jsonl").write_text(json.dumps({"text": f"Other text. {SENTENCES[3]} Its end."}) + "\n")
    return [folder / "raw", folder / "notes.jsonl"]


def made(folder: Path, name: str, benchmarks: Benchmarks | None, workers: Any = 1) -> dict[str, Any]:
    return make_corpus(corpus_files(folder), folder / name, 0.2, 0.2, workers, benchmarks=benchmarks)


def reported(corpus: Path) -> list[tuple[str, str, str, int, str, str]]:
    """(benchmark, split, item, PMID, how it matched, where the record is) of each entry; -1 for other text."""
    return [
        (
            *(entry[name] for name in ("benchmark", "split", "item")),
            max(entry["pmid"], -1),
            *(entry[name] for name in ("matched_by", "record")),
        )
        for entry in read_json(corpus / "benchmarks.json")["records"]
    ]


def test_records_that_hold_items_are_left_out_and_reported(tmp_path: Path) -> None:
    """By PMID, by text, by both; not by superseded records, and not by deleted ones."""
    whole = texts_of(made(tmp_path, "whole", None), tmp_path / "whole")
    manifest = made(tmp_path, "corpus", Benchmarks(ITEMS))
    gone = whole.keys() - texts(tmp_path / "corpus").keys()
    assert {max(pmid, -1) for pmid in gone} == {10, 11, 30, 40, -1}
    assert {pmid: whole[pmid] for pmid in whole.keys() - gone} == texts(tmp_path / "corpus")
    assert sorted(reported(tmp_path / "corpus")) == [
        ("questions", "test", "a", 10, "pmid", "left out"),
        ("questions", "test", "b", 11, "pmid and text", "left out"),
        ("questions", "test", "b", 30, "text", "left out"),
        ("questions", "train", "a", 40, "text", "left out"),
        ("sentences", "test", "1", -1, "text", "left out"),
    ]
    entries = read_json(tmp_path / "corpus" / "benchmarks.json")["records"]
    files = {entry["pmid"]: entry["source_file"] for entry in entries}
    assert (files[10], files[40], files[min(files)]) == ("pubmed26n0001.xml", "pubmed26n0002.xml", "notes.jsonl")
    counts = manifest["counts"]
    assert counts["benchmarks"] == {
        "questions": {
            "test": {"items": 3, "not_searched": 0, "in_input": 2, "in_training": 0},
            "train": {"items": 1, "not_searched": 0, "in_input": 1, "in_training": 0},
        },
        "sentences": {"test": {"items": 3, "not_searched": 1, "in_input": 1, "in_training": 0}},
    }
    assert counts["in_benchmarks"] == 5 and ("- in benchmarks", 5) in funnel(counts)
    kept = sum(counts[split] for split in ("train", "validation", "test"))
    removed = sum(number for name, number in funnel(counts) if name.startswith("- "))
    assert counts["records"] == kept + removed
    assert read_json(tmp_path / "corpus" / "benchmarks.json")["counts"] == counts["benchmarks"]
    verify_files(tmp_path / "corpus", manifest)
    assert "benchmarks.json" in manifest["files"]


def texts_of(manifest: dict[str, Any], corpus: Path) -> dict[int, str]:
    """The texts of a corpus whose manifest says nothing of benchmarks."""
    assert "benchmarks" not in manifest["request"] and not {"benchmarks", "in_benchmarks"} & manifest["counts"].keys()
    assert not (corpus / "benchmarks.json").exists()
    return texts(corpus)


def test_kept_benchmarks_are_reported_and_stay(tmp_path: Path) -> None:
    made(tmp_path, "whole", None)
    counts = made(tmp_path, "kept", Benchmarks(ITEMS, keep=True))["counts"]
    whole, kept = content(tmp_path / "whole"), content(tmp_path / "kept")
    assert {name: kept[name] for name in whole if name != "manifest.json"} == {
        name: whole[name] for name in whole if name != "manifest.json"
    }
    split_of = {max(pmid, -1): split for pmid, split in splits(tmp_path / "kept").items()}
    entries = reported(tmp_path / "kept")
    assert {(pmid, where) for *_, pmid, _, where in entries} == {
        (pmid, split_of.get(pmid, "left out")) for pmid in (10, 11, 30, 40, -1)
    }
    assert {where for *_, where in entries} >= {"train"}
    in_training = {entry[:3] for entry in entries if entry[-1] == "train"}
    assert sum(c["in_training"] for of in counts["benchmarks"].values() for c in of.values()) == len(in_training)
    assert "in_benchmarks" not in counts


def test_other_items_make_another_corpus_and_parse_nothing_again(tmp_path: Path) -> None:
    made(tmp_path, "corpus", Benchmarks(ITEMS))
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.glob("corpus.parts/*/part.parquet")}
    matches = {path: path.stat().st_mtime_ns for path in tmp_path.glob("corpus.parts/.matches/*/matches.json")}
    other = [ITEMS[0]._replace(pmid=100), *ITEMS[1:]]
    for benchmarks in (None, Benchmarks(other), Benchmarks(ITEMS[:-1]), Benchmarks(ITEMS, keep=True)):
        with pytest.raises(UserError, match="made from other inputs or settings"):
            made(tmp_path, "corpus", benchmarks)
    shutil.rmtree(tmp_path / "corpus")
    made(tmp_path, "corpus", Benchmarks(ITEMS))
    assert len(parts) == len(matches) == 3 and all(path.stat().st_mtime_ns == when for path, when in matches.items())
    shutil.rmtree(tmp_path / "corpus")
    made(tmp_path, "corpus", Benchmarks(other))
    assert all(path.stat().st_mtime_ns == when for path, when in parts.items())
    assert 100 not in texts(tmp_path / "corpus") and 10 in texts(tmp_path / "corpus")
    assert sorted(path.name for path in (tmp_path / "corpus.parts").iterdir()) == [
        ".matches", "notes.jsonl", "pubmed26n0001.xml", "pubmed26n0002.xml",
    ]  # fmt: skip


def test_two_workers_and_a_job_array_give_the_same_bytes(tmp_path: Path) -> None:
    made(tmp_path, "corpus", Benchmarks(ITEMS))
    for element in (2, 1):
        with pytest.raises(ShareDone):
            made(tmp_path, "array", Benchmarks(ITEMS), JobArray(element, 2))
    made(tmp_path, "array", Benchmarks(ITEMS), 2)
    assert content(tmp_path / "array") == content(tmp_path / "corpus")


@pytest.mark.parametrize(
    ("step", "call"), [("data.corpus.benchmarks.find_items", 2), ("data.corpus.build.write_report", 1)]
)
def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(step: str, call: int, tmp_path: Path) -> None:
    made(tmp_path, "corpus", Benchmarks(ITEMS))
    code = (
        "from tests.data.corpus.test_benchmarks import ITEMS, Benchmarks, made\n"
        "made(Path('.'), 'again', Benchmarks(ITEMS))"
    )
    kill_at_call(tmp_path, step, call, code)
    assert not (tmp_path / "again").exists()
    made(tmp_path, "again", Benchmarks(ITEMS))
    assert content(tmp_path / "again") == content(tmp_path / "corpus")


def test_equal_texts_of_an_item_are_left_out_before_duplicates(tmp_path: Path) -> None:
    """Otherwise the copy under the lower PMID would stay in the place of the item's."""
    abstract = f"{SENTENCES[0]} {SENTENCES[1]}"
    write_file(tmp_path / "raw" / "a.xml", [citation(1, "B.", abstract), citation(11, "B.", abstract), citation(2)])
    items = [BenchmarkItem("questions", "test", "b", 11, abstract)]
    counts = make_corpus([tmp_path / "raw"], tmp_path / "corpus", 0, 0, 1, benchmarks=Benchmarks(items))["counts"]
    assert (counts["in_benchmarks"], counts["duplicates"]) == (2, 0) and set(texts(tmp_path / "corpus")) == {2}


def test_a_corpus_that_holds_nothing_but_items_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path / "raw" / "a.xml", [citation(10)])
    with pytest.raises(UserError, match="'in benchmarks' removed 1"):
        make_corpus([tmp_path / "raw"], tmp_path / "corpus", 0, 0, 1, benchmarks=Benchmarks(ITEMS))


@pytest.mark.slow  # a cluster starts
def test_a_ray_cluster_gives_the_same_bytes(ray_cluster: str, tmp_path: Path) -> None:
    made(tmp_path, "corpus", Benchmarks(ITEMS))
    made(tmp_path, "cluster", Benchmarks(ITEMS), Cluster(ray_cluster))
    assert content(tmp_path / "cluster") == content(tmp_path / "corpus")
