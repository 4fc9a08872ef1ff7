"""data/common/disk.py: a full disk ends a command in one line, leaves nothing half-written, and the rerun goes on."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from data.archive.sample import write_sample
from data.common.disk import disk_full, disk_full_named, is_full
from data.common.errors import DiskFull, ShareDone, UserError
from data.common.files import make_folder
from data.common.workers import JobArray
from tests.data.common.small_disk import STAGES, room, small_disk
from tests.data.corpora import content
from tests.paths import ROOT


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as place:
        yield place


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/, corpus/, tokenizer/ and shards/ of a small sample, with the folders of parts that the stages began with."""
    folder = tmp_path_factory.mktemp("made")
    write_sample(folder / "raw", 300)
    for stage in STAGES.values():
        stage(folder, folder, 1)
    return folder


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_on_a_full_disk(stage: str, workers: int, made: Path, disk: Path) -> None:
    """With a little more room each time, until there is enough: it fails at every kind of file that the stage writes.

    Whole parts stay, and nothing else: no file is listed by no receipt.
    """
    expected, failures = content(made / stage), []
    for pages in range(0, 400, 3 if workers == 1 else 9):
        try:
            with room(disk, pages):
                STAGES[stage](made, disk, workers)
            break
        except DiskFull as error:
            failures.append(str(error))
            assert "\n" not in str(error) and f"the disk {disk} is full (" in str(error) and " MB free)" in str(error)
        left = {path.relative_to(disk).as_posix() for path in disk.rglob("*") if path.is_file()}
        receipts = {path.parent for path in disk.glob(f"{stage}.parts/**/manifest.json")}
        bare = {name for name in left if (disk / name).parent not in receipts} - {"corpus.parts/.chosen.npy"}
        assert not bare and not any(".partial" in name for name in left), (pages, left)
        if pages % 5:  # some go on with the parts that they find
            shutil.rmtree(disk / f"{stage}.parts", ignore_errors=True)
    else:
        raise AssertionError(failures)
    print(f"{stage}, {workers} workers: {len(failures)} failures, {len(set(failures))} lines")
    assert content(disk / stage) == expected and len(failures) >= 2
    named = {line.removeprefix(f"{disk}/").split(":")[0].split("/")[0] for line in failures}
    assert workers == 2 or named == {stage, f"{stage}.parts"}


def test_an_element_of_a_job_array_on_a_full_disk(made: Path, disk: Path) -> None:
    with pytest.raises(DiskFull), room(disk, 8):
        STAGES["shards"](made, disk, JobArray(1, 2))
    for element in (1, 2):
        with pytest.raises(ShareDone):
            STAGES["shards"](made, disk, JobArray(element, 2))
    STAGES["shards"](made, disk, 1)
    assert content(disk / "shards") == content(made / "shards")


@pytest.mark.parametrize(
    "pages", [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(10, marks=pytest.mark.slow)]
)
def test_the_command_ends_in_one_line_and_code_2(pages: int, made: Path, disk: Path) -> None:
    for arguments in (
        ["corpus", str(made / "raw"), "--out", "corpus", "--workers", "2"],
        ["tokenizer", str(made / "corpus"), "--out", "tokenizer", "--workers", "2"],
        ["shards", str(made / "corpus"), "--tokenizer", str(made / "tokenizer"), "--out", "shards"],
        ["sample", "--out", "raw"],
    ):
        with room(disk, pages):
            done = biogpt(disk, *arguments)
            lines = [line for line in done.stderr.splitlines() if " of " not in line]
            assert done.returncode == 2 and len(lines) == 1, done.stderr
            assert lines[0].startswith("biogpt: error: ") and f"the disk {disk} is full (" in lines[0]
    assert [path.name for path in disk.iterdir() if not path.name.endswith(".parts")] in ([], ["raw"])
    assert biogpt(disk, "sample", "--out", "raw").returncode == 0


def biogpt(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


def test_the_errors_of_all_writers_are_known(disk: Path) -> None:
    """Python, numpy, pyarrow and safetensors, each in its own words."""
    data = np.random.default_rng(1).integers(0, 1 << 60, 1 << 20)

    def with_stream() -> None:
        with (disk / "file").open("wb") as stream:
            np.save(stream, data)

    writers: list[Callable[[], Any]] = [
        lambda: (disk / "file").write_bytes(data.tobytes()),
        lambda: np.save(disk / "file.npy", data),
        with_stream,
        lambda: pq.write_table(pa.table({"a": data}), disk / "file"),
        lambda: save_file({"a": data}, disk / "file"),
        lambda: shutil.copyfile(big, disk / "file"),
    ]
    (big := disk.parent / "big").write_bytes(data.tobytes())
    for write in writers:
        expected = pytest.raises(DiskFull, match=rf"out: cannot be written, the disk {disk} is full \(")
        with expected, disk_full_named(disk / "not" / "yet", "out"):
            write()
        for left in disk.iterdir():
            left.unlink()


def test_a_folder_of_weights_on_a_full_disk(disk: Path) -> None:
    """As `biogpt export` makes it; safetensors writes the weights."""

    def fill(folder: Path) -> dict[str, Any]:
        save_file({"a": np.zeros(1 << size, np.uint8)}, folder / "model.safetensors")
        return {}

    for size in (23, 20):
        with pytest.raises(DiskFull) if size == 23 else contextlib.nullcontext():
            make_folder(disk / "hf", "hf", {}, fill)
        assert [path.name for path in disk.iterdir()] == ([] if size == 23 else ["hf"])


def test_other_errors_stay_what_they_are() -> None:
    for error in (PermissionError(errno.EACCES, "denied"), ValueError("File"), KeyError("x")):
        with pytest.raises(type(error)), disk_full_named(Path(), "out"):
            raise error
        assert not is_full(error)
    with pytest.raises(UserError, match="No space left on device"), disk_full_named(Path(), "out"):
        raise UserError("a file named No space left on device")
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert is_full(OSError(number, "")) and str(disk_full(Path("/"), "out")).startswith("out: cannot be written")
