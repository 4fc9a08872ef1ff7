"""data/common/ownership.py: what is not proven to be this program's stays where it is, and is named."""

import json
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from data.archive.sample import write_sample
from data.common import ownership
from data.common.files import UserError, make_folder, write_manifest
from data.common.ownership import MARKER, make_marked, remove_own, remove_parts
from data.common.workers import Task, run_tasks
from data.corpus.build import make_corpus
from data.shards.build import make_shards
from data.text.train import train_tokenizer


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def put(path: Path, content: str = "years of work") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def never(*_: Any) -> dict[str, Any]:
    raise AssertionError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/, corpus/, corpus.parts/, tokenizer/ and shards/ of a small sample."""
    folder = tmp_path_factory.mktemp("made")
    write_sample(folder / "raw", 200)
    make_all(folder)
    return folder


def make_all(folder: Path) -> None:
    make_corpus([folder / "raw"], folder / "corpus", 0.1, 0.1, workers=1)
    train_tokenizer(folder / "corpus", folder / "tokenizer", merges=50, min_count=1, workers=1)
    make_shards(folder / "corpus", folder / "tokenizer", folder / "shards", workers=1)


@pytest.mark.parametrize("stage", ["tokenizer", "shards"])
def test_a_users_file_in_the_folder_of_parts_stays_and_is_named(
    stage: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both when the command has nothing to do and when it makes the folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    thesis = put(tmp_path / f"{stage}.parts" / "thesis.tex")
    inner = put(tmp_path / f"{stage}.parts" / "train-00000.parquet" / "notes.txt")
    for again in (False, True):
        if again:
            shutil.rmtree(tmp_path / stage)
        make_all(tmp_path)
        assert thesis.read_text() == "years of work" and (tmp_path / stage / "manifest.json").is_file()
        if stage == "shards" or not again:
            assert inner.read_text() == "years of work"
            assert (error := capsys.readouterr().err).count(f"{stage}.parts: kept, because") == 1, error
            assert "and 1 more" in error
        if stage == "tokenizer":  # its part needs that name
            break
    shutil.rmtree(tmp_path / f"{stage}.parts")


def test_a_part_folder_that_is_not_ours_is_named_and_stays(made: Path, tmp_path: Path) -> None:
    """The other parts are made."""
    shutil.copytree(made / "corpus", tmp_path / "corpus")
    notes = put(tmp_path / "tokenizer.parts" / "train-00000.parquet" / "notes.txt")
    with pytest.raises(Exception, match=r"notes\.txt: is no file of this program, .* move it away"):
        train_tokenizer(tmp_path / "corpus", tmp_path / "tokenizer", merges=50, min_count=1, workers=1)
    assert notes.read_text() == "years of work" and not (tmp_path / "tokenizer").exists()


def test_parts_of_other_names_are_kept_though_they_have_a_receipt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy that a user made of a part is the user's."""
    for name in ("train-00000.parquet", "train-00000.parquet-backup"):
        put(tmp_path / "parts" / name / "words.json", "{}")
        write_manifest(tmp_path / "parts" / name, "tokenizer part", {}, {})
    remove_parts(tmp_path / "parts", "tokenizer part")
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["train-00000.parquet-backup"]
    assert "train-00000.parquet-backup is no part" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["corpus", "tokenizer", "shards", "hf"])
@pytest.mark.parametrize("name", ["thesis.tex", "manifest.json", "sub/train-00000.parquet", "config.json.bak"])
def test_a_partial_folder_of_the_users_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    mine = put(tmp_path / ".out.partial" / name)
    with pytest.raises(UserError, match=rf"{name}: is no file of this program, .* move it away") as caught:
        make_folder(tmp_path / "out", kind, {}, never)
    assert mine.read_text() == "years of work" and not (tmp_path / "out").exists() and "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / ".out.partial")
    mine = put(tmp_path / ".out.partial")  # a file
    with pytest.raises(UserError, match="move it away"):
        make_folder(tmp_path / "out", kind, {}, never)
    assert mine.read_text() == "years of work"
    mine.rename(tmp_path / "elsewhere")
    mine.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="move it away"):
        make_folder(tmp_path / "out", kind, {}, never)
    assert mine.is_symlink()


def test_a_manifest_of_another_kind_proves_nothing(tmp_path: Path) -> None:
    put(tmp_path / "run" / "model.safetensors")
    write_manifest(tmp_path / "run", "checkpoint", {}, {})
    with pytest.raises(UserError, match=r"manifest\.json: is no file of this program"):
        remove_own(tmp_path / "run", "hf")
    assert listing(tmp_path / "run") == ["manifest.json", "model.safetensors"]


def test_what_killed_commands_left_is_removed(tmp_path: Path) -> None:
    """With a marker whatever it holds; without one, as earlier versions left it, by its files' names or its receipt."""
    make_marked(tmp_path / "marked", tmp_path)
    put(tmp_path / "marked" / "a" / "b")
    assert (tmp_path / "marked" / MARKER).is_file()
    remove_own(tmp_path / "marked", "corpus")
    left = {
        "corpus": ("train-00000.parquet", "validation-00000.parquet", ".manifest.json.partial"),
        "tokenizer": ("vocab.json", "merges.txt", ".tokenizer.json.partial"),
        "shards": ("train-00000.bin", "train-00000.idx", ".train-00000.bytes.npy.partial", "tokenizer/vocab.json"),
        "hf": ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"),
        "corpus part": ("part.parquet", "bands.npy", ".rows.npy.partial", "test.parquet"),
        "tokenizer part": (".words.json.partial",),
        "shards part": ("part.bin", "part.idx", "part.bytes.npy", "part.pmids.npy"),
    }
    for kind, names in left.items():
        for name in names:
            put(tmp_path / "left" / name)
        remove_own(tmp_path / "left", kind)
    (tmp_path / "left").mkdir()  # killed before its first file
    remove_own(tmp_path / "left", "corpus")
    put(tmp_path / "left" / "of a later version")
    write_manifest(tmp_path / "left", "corpus", {}, {})
    manifest = json.loads((tmp_path / "left" / "manifest.json").read_text())
    put(tmp_path / "left" / "manifest.json", json.dumps(manifest | {"counts": "damaged"}))
    remove_own(tmp_path / "left", "corpus")
    put(tmp_path / "left" / "part.parquet")
    put(tmp_path / "left" / "manifest.json", "{ damaged")
    remove_own(tmp_path / "left", "corpus part")
    assert list(tmp_path.iterdir()) == []


def test_the_names_of_each_kind_are_those_that_it_writes(made: Path, sample_folder: Path) -> None:
    """So that what a killed command of an earlier version left is recognised."""
    for kind in ("corpus", "tokenizer", "shards"):
        assert ownership._foreign(made / kind, kind) == []
        (made / kind / "manifest.json").rename(made / "manifest")
        assert ownership._foreign(made / kind, kind) == []
        (made / "manifest").rename(made / kind / "manifest.json")
    for part in (made / "corpus.parts").iterdir():
        (part / "manifest.json").unlink()
        assert ownership._foreign(part, "corpus part") == []


def leave(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    put(folder / "part.bin")
    raise KeyboardInterrupt


def test_an_interrupted_task_leaves_no_half_written_part(tmp_path: Path) -> None:
    task = Task("shards part", put(tmp_path / "in"), "0", tmp_path / "parts" / "in", {})
    with pytest.raises(KeyboardInterrupt):
        run_tasks(leave, [task], 1, "leaving")
    assert listing(tmp_path) == ["in"]


def test_a_folder_where_a_killed_commands_worker_still_writes_is_removed_once_it_ends(tmp_path: Path) -> None:
    make_marked(tmp_path / "left", tmp_path)
    ended = time.monotonic() + 1

    def write() -> None:
        number = 0
        while time.monotonic() < ended:
            with suppress(FileNotFoundError):
                (tmp_path / "left" / f"{(number := number + 1)}").touch()

    thread = threading.Thread(target=write)
    thread.start()
    remove_own(tmp_path / "left", "corpus")
    thread.join()
    assert not (tmp_path / "left").exists()
