"""Inputs that a command cannot read, or that it would write over: one line, before any work."""

import gzip
import os
import shutil
import sys
from pathlib import Path

import pytest

from data.archive.medline import read_medline
from data.archive.sample import write_sample
from launch.cli import main
from tests.data.citations import citation, write_file


def mistake(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The only line on stderr of a command that a user got wrong, without even the line of the checksums."""
    monkeypatch.setattr(sys, "argv", ["biogpt", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("biogpt: error: "), lines
    return lines[0]


def everything(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_special_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO would block the command for ever. A link to nowhere in a folder is a file that would be missed."""
    (tmp_path / "raw").mkdir()
    write_file(tmp_path / "raw" / "pubmed26n0001.xml", [citation(1)])
    os.mkfifo(tmp_path / "pipe.xml")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "raw" / "pubmed26n0002.xml.gz").symlink_to(tmp_path / "nowhere")
    out, absent = str(tmp_path / "out"), "is neither a file nor a folder"
    for given in ("pipe.xml", "pipe"):
        said = mistake(["corpus", str(tmp_path / given), "--out", out], capsys, monkeypatch)
        assert str(tmp_path / given) in said and absent in said
    said = mistake(["corpus", "/dev/null", "--out", out], capsys, monkeypatch)
    assert f"/dev/null: {absent}" in said
    said = mistake(["corpus", str(tmp_path / "raw"), "--out", out], capsys, monkeypatch)
    assert "pubmed26n0002.xml.gz: is no file" in said
    (tmp_path / "raw" / "pubmed26n0002.xml.gz").unlink()
    os.mkfifo(tmp_path / "raw" / "pubmed26n0002.xml.gz")
    said = mistake(["corpus", str(tmp_path / "raw"), "--out", out], capsys, monkeypatch)
    assert "pubmed26n0002.xml.gz: is no file" in said
    pipe, sample = str(tmp_path / "pipe"), str(tmp_path / "raw" / "pubmed26n0001.xml")
    for arguments in (
        ["corpus", sample, f"corpus.exclude_pmids={pipe}", "--out", out],
        ["tokenizer", pipe, "--out", out],
        ["tokenizer", "--from-biogpt", pipe, "--out", out],
        ["shards", pipe, "--tokenizer", pipe, "--out", out],
        ["shards", "--verify", pipe],
        ["export", pipe, "--out", out],
    ):
        assert pipe in mistake(arguments, capsys, monkeypatch)
    said = mistake(["corpus", sample, "corpus.exclude_pmids=/dev", "--out", out], capsys, monkeypatch)
    assert "corpus.exclude_pmids = '/dev': is no file" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "pipe.xml", "raw"]


def test_out_on_an_input_is_refused_before_any_work(
    sample_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On it, inside it, around it, by a link, or where the parts are kept. No input is hashed for that."""
    shutil.copytree(sample_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: 1 / 0)
    commands = {
        "raw": (["corpus", "raw"], ["corpus", "raw", "raw/pubmed26n0001.xml.gz"]),
        "corpus": (["tokenizer", "corpus"], ["shards", "corpus", "--tokenizer", "tokenizer"]),
        "tokenizer": (["shards", "corpus", "--tokenizer", "tokenizer"], ["tokenizer", "--from-biogpt", "tokenizer"]),
        "run": (["export", "run"],),
    }
    for given, lines in commands.items():
        for line in lines:
            for out, reason in (
                (given, "is the input"),
                (f"link/{given}", "is the input"),
                (f"{given}/below", "lies inside the input"),
                (f"link/{given}/deep/below", "lies inside the input"),
                (str(tmp_path), "holds the input"),
            ):
                assert reason in mistake([*line, "--out", out], capsys, monkeypatch)
    file = "raw/pubmed26n0001.xml.gz"
    assert "is the input" in mistake(["corpus", file, "--out", file], capsys, monkeypatch)
    assert "holds the input" in mistake(["corpus", file, "--out", "raw"], capsys, monkeypatch)
    assert everything(tmp_path) == before


def test_raw_files_where_the_parts_are_kept_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sample(tmp_path / "c3.parts", 50)
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path)
    for given in ("c3.parts", "c3.parts/pubmed26n0001.xml.gz"):
        said = mistake(["corpus", given, "--out", "c3"], capsys, monkeypatch)
        assert said == f"biogpt: error: {given}: is where the parts of --out c3 are kept; choose another --out"
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["corpus.minimum_words=9"], "of 2 records 'short' removed 2"),
        (["corpus.first_year=2030"], "of 2 records 'other year' removed 2"),
    ],
)
def test_a_corpus_without_a_citation_names_the_filter_that_took_most(
    settings: list[str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_file(tmp_path / "raw" / "pubmed26n0001.xml", [citation(1, "One", "two"), citation(2, "Two", "three")])
    monkeypatch.setattr(
        sys, "argv", ["biogpt", "corpus", str(tmp_path / "raw"), *settings, "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert reason in said and "{" not in said, said


def test_a_file_that_a_browser_unpacked_is_read(tmp_path: Path) -> None:
    """It is plain XML, and its name still ends in .xml.gz. A damaged gzip file stays one."""
    write_sample(tmp_path, 50)
    zipped = tmp_path / "pubmed26n0001.xml.gz"
    expected, packed = list(read_medline(zipped)), zipped.read_bytes()
    for mark in (b"", b"\xef\xbb\xbf"):
        zipped.write_bytes(mark + gzip.decompress(packed))
        assert list(read_medline(zipped)) == expected
    for damaged in (b"", packed[:-9], b"x" + packed):
        zipped.write_bytes(damaged)
        with pytest.raises(Exception, match=r"pubmed26n0001\.xml\.gz: "):
            list(read_medline(zipped))


def test_the_sample_replaces_no_other_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NLM's files have the same names."""
    (tmp_path / "pubmed26n0002.xml.gz").write_bytes(b"NLM's")
    said = mistake(["sample", "--out", str(tmp_path)], capsys, monkeypatch)
    assert "pubmed26n0002.xml.gz: is there already and is no sample" in said
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"NLM's"]
    (tmp_path / "pubmed26n0002.xml.gz").unlink()
    assert write_sample(tmp_path) == write_sample(tmp_path)
