"""data/corpus/build.py: the whole command; the same bytes on one worker, many, and after a kill; faults."""

import shutil
import threading
from pathlib import Path

import psutil
import pytest

from data.common.files import ShareDone, TasksFailed, UserError, verify_files
from data.common.workers import Cluster, JobArray
from data.corpus.build import list_files, make_corpus
from tests.data.citations import citation, write_file
from tests.data.corpora import build, content
from tests.data.killed import kill_at_call
from tests.shared import NLM, needs_shared


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0), (0, 1.0), (0.5, 0.5), (float("nan"), 0)])
def test_fractions_out_of_bounds_are_refused(validation: float, test: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fraction"):
        build(tmp_path, [[citation(1)]], validation, test)
    assert not (tmp_path / "corpus").exists()


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


@pytest.mark.slow  # a cluster starts; test_workers.py has a fast one
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
        ("data.corpus.build.select_rows", 1),
        ("data.corpus.output.write_output", 1),
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
        monkeypatch.setattr("data.corpus.output.write_output", lambda *_: 1 / 0)
    make_corpus([again / "raw"], again / "corpus", 0.2, 0.2, workers=1)
    assert content(again / "corpus") == content(tmp_path / "corpus")
    assert sorted(path.name for path in again.iterdir()) == ["corpus", "corpus.parts", "raw"]


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
