"""Two commands on one folder: the second one is told who holds it, whatever the command."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.archive.sample import write_sample
from data.common.lease import hold
from data.corpus.build import make_corpus
from tests.data.corpora import content
from tests.launch.test_inputs import mistake
from tests.paths import ROOT


def test_every_command_that_writes_takes_the_lease(
    sample_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, corpus, tokenizer = (str(sample_folder / name) for name in ("raw", "corpus", "tokenizer"))
    out = str(tmp_path / "out")
    biogpt = tmp_path / "biogpt"
    biogpt.mkdir()
    (biogpt / "bpecodes").write_text("a b</w> 1\n")
    (biogpt / "dict.txt").write_text("ab 1\n")
    whole = [
        ["sample", "--out", out],
        ["corpus", raw, "--out", out],
        ["tokenizer", corpus, "--out", out],
        ["tokenizer", "--from-biogpt", str(biogpt), "--out", out],
        ["shards", corpus, "--tokenizer", tokenizer, "--out", out],
    ]
    parts = [[*command, "--part", "2/3"] for command in whole if command[0] in ("corpus", "shards")]
    with hold(tmp_path / "out"):
        for command in (*whole, *parts):
            said = mistake(command, capsys, monkeypatch)
            assert f"{out}: it is being written by process {os.getpid()} on " in said, said
    with hold(tmp_path / "out", (1, 3)):
        for command in whole:
            said = mistake(command, capsys, monkeypatch)
            assert f"{out}: part 1 of 3 is being written by process {os.getpid()} on " in said, said
    with hold(tmp_path / "out", (2, 3)):
        for command in parts:
            mistake(command, capsys, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["biogpt"]


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True)


def test_two_real_commands_at_once(tmp_path: Path) -> None:
    """One of them makes the corpus, and the other one says so or finds it finished."""
    write_sample(tmp_path / "raw", 500)
    make_corpus([tmp_path / "raw"], tmp_path / "expected", 0.1, 0.1, 1)
    arguments = ("--out", "corpus", "--validation-fraction", "0.1", "--test-fraction", "0.1")
    refused = 0
    for _ in range(2):
        both = [start(tmp_path, "corpus", "raw", *arguments, "--workers", "2") for _ in range(2)]
        errors = [process.communicate()[1] for process in both]
        codes = sorted(process.returncode for process in both)
        assert codes in ([0, 0], [0, 2]) and "Traceback" not in "".join(errors), errors
        refused += codes == [0, 2]
        assert codes == [0, 0] or sum("corpus: it is being written by process" in error for error in errors) == 1
        assert content(tmp_path / "corpus") == content(tmp_path / "expected")
        shutil.rmtree(tmp_path / "corpus")
        shutil.rmtree(tmp_path / "corpus.parts")
    assert refused and sorted(path.name for path in tmp_path.iterdir()) == ["expected", "expected.parts", "raw"]


def test_all_elements_of_a_job_array_at_once(tmp_path: Path) -> None:
    for number in range(3):
        write_sample(tmp_path / f"some{number}", 100 + number)
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / f"some{number}" / "pubmed26n0001.xml.gz").rename(tmp_path / "raw" / f"pubmed26n000{number}.xml.gz")
    make_corpus([tmp_path / "raw"], tmp_path / "expected", 0.002, 0.002, 1)
    elements = [start(tmp_path, "corpus", "raw", "--out", "corpus", "--part", f"{k}/3") for k in (1, 2, 3)]
    errors = [process.communicate()[1] for process in elements]
    assert [process.returncode for process in elements] == [0, 0, 0], errors
    last = start(tmp_path, "corpus", "raw", "--out", "corpus")
    assert last.communicate()[1] and last.returncode == 0
    assert content(tmp_path / "corpus") == content(tmp_path / "expected")
    assert not list(tmp_path.glob(".*"))
