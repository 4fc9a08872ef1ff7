"""data/archive/download.py against a local server that cuts connections, lies about md5 and lacks files."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.archive import download as download_module
from data.archive.download import download
from data.common.errors import DiskFull
from data.common.files import TasksFailed, UserError, read_manifest, verify_files
from data.common.lease import hold
from data.corpus.build import list_files
from tests.data.archive.server import NAMES, Archive
from tests.data.common.small_disk import room, small_disk
from tests.shared import ROOT


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Archive]:
    monkeypatch.setattr(download_module, "PAUSE", 0.001)
    server = Archive()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def get(archive: Archive, out: Path, updates: bool = False, **more: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"year": None, "files": None, "connections": 3} | more
    return download(out, updates, base_url=archive.url, **chosen)


def whole(archive: Archive, out: Path, names: list[str]) -> None:
    """These files, the manifest, and nothing else."""
    assert {path.name for path in out.iterdir()} == {*names, "manifest.json"}
    assert all((out / name).read_bytes() == archive.content[name] for name in names)


def test_baseline_and_updates(archive: Archive, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "raw"
    size = sum(len(archive.content[name]) for name in NAMES[:3])
    assert get(archive, out)["counts"] == {"files": 3, "bytes": size, "others": 0}
    whole(archive, out, NAMES[:3])
    get(archive, out, updates=True)
    whole(archive, out, NAMES)
    assert get(archive, out)["counts"] == {"files": 3, "bytes": size, "others": 2}  # which were not compared now
    manifest = read_manifest(out, "raw")
    verify_files(out, manifest)
    assert "NLM's terms apply" in manifest["request"]["terms"] and "copyright" in manifest["request"]["terms"]
    assert [path.name for path in list_files([out])] == NAMES


def test_what_is_there_is_not_fetched_again(archive: Archive, tmp_path: Path) -> None:
    first = get(archive, tmp_path)
    (tmp_path / NAMES[1]).write_bytes(b"damaged since")
    archive.sent.clear()
    assert get(archive, tmp_path) == first and list(archive.sent) == [NAMES[1]]
    whole(archive, tmp_path, NAMES[:3])


def test_chosen_numbers_and_another_year(archive: Archive, tmp_path: Path) -> None:
    get(archive, tmp_path, updates=True, files=(2, 4), year=2026)
    whole(archive, tmp_path, NAMES[1:4])
    with pytest.raises(UserError, match="holds the files of 2026, not of 2025"):
        get(archive, tmp_path / "other", year=2025)
    with pytest.raises(UserError, match="no file that was asked for"):
        get(archive, tmp_path / "other", files=(7, 9))
    assert not (tmp_path / "other").exists()


def test_a_server_that_cuts_connections(archive: Archive, tmp_path: Path) -> None:
    """Each answer breaks off after 50 kB: what is there is not sent twice."""
    archive.cut_after = 50_000
    get(archive, tmp_path)
    whole(archive, tmp_path, NAMES[:3])
    assert archive.sent == {name: len(archive.content[name]) for name in NAMES[:3]}


def test_a_server_that_ignores_ranges(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / f".{NAMES[0]}.partial").write_bytes(archive.content[NAMES[0]][:1234])
    archive.ranges = False
    get(archive, tmp_path)
    whole(archive, tmp_path, NAMES[:3])


def test_a_server_that_ignores_ranges_and_cuts_is_given_up(archive: Archive, tmp_path: Path) -> None:
    archive.ranges, archive.cut_after = False, 50_000
    with pytest.raises(TasksFailed) as caught:
        get(archive, tmp_path, files=(1, 1))
    assert caught.value.failures[0].startswith(f"{archive.url}baseline/{NAMES[0]}: ")
    assert [path.name for path in tmp_path.iterdir()] == [f".{NAMES[0]}.partial"]


@pytest.mark.parametrize("left", [b"wrong bytes", b"x" * 500_000])
def test_a_partial_file_of_other_bytes_is_started_over(left: bytes, archive: Archive, tmp_path: Path) -> None:
    (tmp_path / f".{NAMES[0]}.partial").write_bytes(left)
    get(archive, tmp_path)
    whole(archive, tmp_path, NAMES[:3])


def test_what_is_unfinished_stands_in_no_manifest(archive: Archive, tmp_path: Path) -> None:
    """A download of all was killed, one of the first file ends well: the rest may go on later."""
    (tmp_path / f".{NAMES[2]}.partial").write_bytes(archive.content[NAMES[2]][:1234])
    assert list(get(archive, tmp_path, files=(1, 1))["files"]) == NAMES[:1]
    assert len((tmp_path / f".{NAMES[2]}.partial").read_bytes()) == 1234


def test_errors_and_wrong_checksums_pass(archive: Archive, tmp_path: Path) -> None:
    archive.errors[NAMES[0]], archive.wrong_md5[NAMES[1]] = 3, 2
    get(archive, tmp_path)
    whole(archive, tmp_path, NAMES[:3])


def test_pauses_double_until_it_gets_further(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(download_module.time, "sleep", lambda seconds: pauses.append(seconds) if seconds else None)
    archive.wrong_md5[NAMES[0]] = 1_000
    with pytest.raises(TasksFailed):
        get(archive, tmp_path, files=(1, 1))
    assert pauses == [0.001, 0.002, 0.004, 0.008, 0.016]
    pauses.clear()
    archive.wrong_md5.clear()
    archive.cut_after = 100_000  # of 400,000 bytes: each try gets further
    get(archive, tmp_path, files=(1, 1))
    assert set(pauses) == {0.001}


def test_failures_are_named_and_the_rest_is_there(archive: Archive, tmp_path: Path) -> None:
    archive.missing.add(NAMES[0])
    archive.wrong_md5[NAMES[1]] = 1_000
    with pytest.raises(TasksFailed) as caught:
        get(archive, tmp_path)
    first, second = caught.value.failures
    assert first.startswith(f"{archive.url}baseline/{NAMES[0]}: ") and "404" in first
    assert f"{NAMES[1]}: its md5 is not {hashlib.md5(b'x').hexdigest()}" in second
    assert not any("\n" in failure for failure in caught.value.failures)
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[2]]


def test_a_full_disk_is_seen_before(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=download_module.SPARE_DISK + 1_000_000)
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="the disk is too small"):
        get(archive, tmp_path / "raw")
    assert list((tmp_path / "raw").iterdir()) == [] and not archive.sent


def test_no_archive_at_all(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/baseline/: cannot be listed"):
        download(tmp_path / "raw", False, None, None, 1, "http://127.0.0.1:9/")
    with pytest.raises(UserError, match=r"cannot be listed \(.*404[^\n]*$"):
        download(tmp_path / "raw", False, None, None, 1, archive.url.replace("pubmed", "nothing"))
    assert not (tmp_path / "raw").exists()


def test_a_url_that_is_none_is_named(tmp_path: Path) -> None:
    for url in ("ftp/", "http://[bad/", "file:///etc/"):
        with pytest.raises(UserError, match="cannot be listed"):
            download(tmp_path / "raw", False, None, None, 1, url)


def test_a_full_disk_ends_the_download_at_once(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the attempts of a broken connection. What has arrived stays, and the next command goes on from it."""
    monkeypatch.setattr(download_module, "SPARE_DISK", -(1 << 30))
    monkeypatch.setattr(download_module, "PAUSE", 1000.0)
    with small_disk(tmp_path / "disk") as disk:
        for pages in (0, 3, 100):
            with pytest.raises(DiskFull, match=rf"the disk {disk} is full") as caught, room(disk, pages):
                get(archive, disk / "raw")
            assert "\n" not in str(caught.value)
        archive.sent.clear()
        get(archive, disk / "raw")
        whole(archive, disk / "raw", NAMES[:3])
        assert sum(archive.sent.values()) < sum(len(archive.content[name]) for name in NAMES[:3])


def test_two_downloads_never_write_one_folder(archive: Archive, tmp_path: Path) -> None:
    with hold(tmp_path / "raw"), pytest.raises(UserError, match="raw: it is being written by process"):
        get(archive, tmp_path / "raw")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ['{"kind": "corpus"}', "{}", "[]", "a user's notes"])
def test_a_manifest_that_is_not_a_downloads_is_not_replaced(content: str, archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: is no manifest of a download"):
        get(archive, tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("manifest.json", content)]


def test_killed_and_run_again(archive: Archive, tmp_path: Path) -> None:
    """kill -9 of the command in the middle of files; the next one goes on, and no byte is sent twice but what was
    on its way."""
    archive.wait = 0.02
    command = [sys.executable, "-m", "launch.cli", "download", "--out", str(tmp_path / "raw"), "--updates",
               "--base-url", archive.url]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ)
    deadline = time.monotonic() + 60
    while sum(path.stat().st_size for path in tmp_path.glob("raw/.*.partial")) < 600_000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    archive.wait = 0.0
    assert not (tmp_path / "raw" / "manifest.json").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("raw: 5 files, 0.0 GB, all match NLM's md5\n")
    whole(archive, tmp_path / "raw", NAMES)
    assert json.loads((tmp_path / "raw" / "manifest.json").read_text())["counts"]["files"] == 5
