"""data/common/files.py: folders and files that appear whole or not at all, and manifests that are checked."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.common.files import (
    CARD,
    UserError,
    input_files,
    make_folder,
    read_json,
    read_manifest,
    sha256,
    verify_files,
    whole_file,
    write_json,
)


def fill(folder: Path) -> dict[str, int]:
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "sub" / "b.txt").write_text("two")
    return {"files": 2}


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# Files


def test_sha256_equals_hashlib(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 1000)
    assert sha256(tmp_path / "a") == hashlib.sha256(bytes(range(256)) * 1000).hexdigest()


def test_a_file_appears_only_when_the_block_has_ended_well(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with whole_file(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert not path.exists()
    assert path.read_bytes() == b"new" and listing(tmp_path) == ["a.bin"]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole_file(path) as stream:
            stream.write(b"half")
            raise error
    assert path.read_bytes() == b"old" and listing(tmp_path) == ["a.bin"]


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    content = {"α</w>": 4, "list": [1, 2.5, None, "x\n"]}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content == json.loads((tmp_path / "a.json").read_bytes())


@pytest.mark.parametrize("damage", [b'{"a": 1', b"", b'{"a": "\xff"}'])
def test_damaged_json_is_refused_by_name(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"a\.json: not JSON") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json")


def test_input_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.xml").write_text(folder)
    assert input_files([tmp_path / "x" / "a.xml"]) == {"a.xml": hashlib.sha256(b"x").hexdigest()}
    with pytest.raises(UserError, match="second input file of this name"):
        input_files([tmp_path / "x" / "a.xml", tmp_path / "y" / "a.xml"])


# Folders


def test_a_folder_is_made_with_its_manifest(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    manifest = make_folder(out, "corpus", {"setting": 1}, fill)
    assert listing(out) == ["a.txt", "manifest.json", "sub", "sub/b.txt"] and listing(tmp_path / "deep")[0] == "out"
    assert manifest == json.loads((out / "manifest.json").read_text()) == read_manifest(out, "corpus")
    assert manifest["counts"] == {"files": 2} and manifest["request"] == {"setting": 1}
    assert manifest["files"] == {
        "a.txt": {"bytes": 3, "sha256": hashlib.sha256(b"one").hexdigest()},
        "sub/b.txt": {"bytes": 3, "sha256": hashlib.sha256(b"two").hexdigest()},
    }


@pytest.mark.parametrize("error", [UserError("raw/x.xml: damaged"), ValueError("a bug"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, int]:
        fill(folder)
        raise error

    with pytest.raises(type(error)):
        make_folder(tmp_path / "out", "corpus", {}, fail)
    assert listing(tmp_path) == []


def test_a_killed_run_leaves_no_folder_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from data.common.files import make_folder\n"
        "def fill(folder):\n"
        "    (folder / 'half.txt').write_text('half')\n"
        f"    os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "make_folder(Path(sys.argv[1]), 'corpus', {}, fill)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert "half.txt" in {path.name for path in tmp_path.rglob("*")}  # it was killed in the middle
    make_folder(tmp_path / "out", "corpus", {}, fill)
    assert listing(tmp_path) == ["out", "out/a.txt", "out/manifest.json", "out/sub", "out/sub/b.txt"]


def test_the_same_request_is_not_done_twice(tmp_path: Path) -> None:
    first = make_folder(tmp_path / "out", "corpus", {"setting": 1}, fill)
    inode = (tmp_path / "out" / "a.txt").stat().st_ino

    def never(folder: Path) -> dict[str, int]:
        raise AssertionError

    assert make_folder(tmp_path / "out", "corpus", {"setting": 1}, never) == first
    assert (tmp_path / "out" / "a.txt").stat().st_ino == inode
    with pytest.raises(UserError, match="other inputs or settings"):
        make_folder(tmp_path / "out", "corpus", {"setting": 2}, never)
    with pytest.raises(UserError, match="is a corpus folder; expected a shards folder"):
        make_folder(tmp_path / "out", "shards", {"setting": 1}, never)
    assert (tmp_path / "out" / "a.txt").stat().st_ino == inode


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_folder(tmp_path / "empty", "corpus", {}, fill)  # an empty folder may be filled
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("full", "file", "file/below"):
        with pytest.raises(UserError, match=f"{tmp_path / name}: "):
            make_folder(tmp_path / name, "corpus", {}, fill)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize("name", [".", ".."])
def test_a_folder_without_a_name_is_refused(name: str) -> None:
    """It could not be renamed into place."""
    with pytest.raises(UserError, match="name of its own"):
        make_folder(Path(name), "corpus", {}, fill)


# Manifests


def test_manifests_of_another_kind_a_newer_version_or_none_are_refused(tmp_path: Path) -> None:
    def refused(folder: Path, reason: str) -> None:
        with pytest.raises(UserError, match=reason) as caught:
            read_manifest(folder, "corpus")
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "no such folder")
    (tmp_path / "out").mkdir()
    refused(tmp_path / "out", "holds no manifest.json")
    (tmp_path / "out").rmdir()
    manifest = make_folder(tmp_path / "out", "corpus", {}, fill)
    path = tmp_path / "out" / "manifest.json"
    path.write_text(json.dumps(manifest | {"kind": "shards"}))
    refused(tmp_path / "out", "is a shards folder; expected a corpus folder")
    path.write_text(json.dumps(manifest | {"version": 3}))
    refused(tmp_path / "out", "format 3; .* newer")
    for foreign in ("[]", "{}", '{"kind": "corpus"}', "12"):
        path.write_text(foreign)
        refused(tmp_path / "out", "not a manifest of this program")
    path.write_text("{")
    refused(tmp_path / "out", "not JSON")


def test_changed_and_missing_files_are_named(tmp_path: Path) -> None:
    manifest = make_folder(tmp_path / "out", "corpus", {}, fill)
    verify_files(tmp_path / "out", manifest)
    (tmp_path / "out" / CARD).write_text("a model card may be edited")
    verify_files(tmp_path / "out", manifest | {"files": manifest["files"] | {CARD: {"bytes": 1, "sha256": ""}}})
    for content in (b"ona", b"on", b""):  # changed, shorter, empty
        (tmp_path / "out" / "a.txt").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.txt: changed"):
            verify_files(tmp_path / "out", manifest)
    (tmp_path / "out" / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt: missing"):
        verify_files(tmp_path / "out", manifest)
