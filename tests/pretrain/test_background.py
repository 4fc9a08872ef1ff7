"""Checkpoints that are written while the run goes on."""

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from data.common.files import UserError, read_manifest
from pretrain import saver
from pretrain import train as program
from pretrain.checkpoint import list_checkpoints, newest_checkpoint, step_of
from pretrain.run import Run
from pretrain.saver import Saver
from tests.pretrain.runs import metrics, refused_case, run_case, settings, stage_settings
from tests.ranks import Ranks

MORE = ["train.steps=8", "checkpoint.every_steps=3", "evaluate.max_blocks=4", "model.layerdrop=0.3"]


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_both_ways_give_the_same_bytes(stage: int, two_ranks: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    layout = stage_settings(tmp_path, stage)
    files = []
    for background in ("true", "false"):
        run = tmp_path / background
        chosen = settings(sample_folder / "shards", run, *MORE, *layout, f"checkpoint.background={background}")
        assert two_ranks.run(run_case, chosen) == [8, 8]
        assert [step_of(each) for each in list_checkpoints(run)] == [8, 6, 3]
        files.append([read_manifest(each, "checkpoint")["files"] for each in list_checkpoints(run)])
    assert files[0] == files[1]
    assert metrics(tmp_path / "true", "train/loss") == metrics(tmp_path / "false", "train/loss")


def slow_disk_case(chosen: list[str]) -> list[tuple[int, str]]:
    """A run whose checkpoint of step 3 takes until step 6; step -> `latest`, as it is after each step."""
    reached, seen, merge, after_step = threading.Event(), [], saver._merge, Saver.after_step

    def slow(*arguments: Any) -> Any:
        assert reached.wait(60)
        return merge(*arguments)

    def watched(self: Saver, run: Run, report: dict[str, Any]) -> None:
        if run.step == 6:
            reached.set()
        after_step(self, run, report)
        pointer = run.folder / "latest"
        seen.append((run.step, pointer.read_text() if pointer.exists() else ""))

    saver._merge, Saver.after_step = slow, watched  # type: ignore[method-assign]
    try:
        run_case(chosen)
    finally:
        saver._merge, Saver.after_step = merge, after_step  # type: ignore[method-assign]
    return seen


def test_the_loop_goes_on_while_a_checkpoint_is_written(two_ranks: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    """`latest` moves when the file is whole; the next checkpoint waits for it; the last one is waited for."""
    chosen = settings(sample_folder / "shards", tmp_path / "run", *MORE, "deepspeed.stage=1")
    seen = dict(two_ranks.run(slow_disk_case, chosen)[0])
    assert [seen[step] for step in (3, 4, 5)] == ["", "", ""]
    assert seen[6] == "step-0000003" and seen[8] == "step-0000008"
    assert len(metrics(tmp_path / "run", "checkpoint/seconds")) >= 2


def full_disk_case(chosen: list[str], rank: str, failures: int) -> str:
    """A run of which one rank's first writes of a share or a file find the disk full."""
    name = "write_share" if rank == "1" else "_merge"
    write, left = getattr(saver, name), [failures]

    def full(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            with saver.disk_full_named(Path("/"), "run", "make room"):
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    if os.environ["RANK"] == rank:
        setattr(saver, name, full)
    try:
        return refused_case(chosen)
    finally:
        setattr(saver, name, write)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_full_disk_of_any_rank_costs_that_checkpoint_only(
    rank: str, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    chosen = settings(sample_folder / "shards", tmp_path / "run", *MORE, "deepspeed.stage=1")
    assert two_ranks.run(full_disk_case, chosen, rank, 1) == ["", ""]
    assert [step_of(each) for each in list_checkpoints(tmp_path / "run")] == [8, 6]
    shutil.rmtree(tmp_path / "run")
    said = two_ranks.run(full_disk_case, chosen, rank, 9)
    assert all("is full" in text and "step 8 is not saved" in text for text in said)
    assert newest_checkpoint(tmp_path / "run") == (None, [])
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def broken_case(chosen: list[str]) -> str:
    """A run whose rank 1 has a bug in writing its share; how it ends."""
    write = saver.write_share

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("a bug")

    if os.environ["RANK"] == "1":
        saver.write_share = broken
    try:
        run_case(chosen)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        saver.write_share = write
    return ""


def test_a_bug_of_one_rank_ends_all_and_keeps_its_name(two_ranks: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    chosen = settings(sample_folder / "shards", tmp_path / "run", *MORE, "deepspeed.stage=1")
    said = two_ranks.run(broken_case, chosen)
    assert said[0] == "Exception: rank 1: ZeroDivisionError: a bug" and said[1] == "ZeroDivisionError: a bug"


def lost_case(chosen: list[str]) -> str:
    """A run whose lease is taken over by another process while a checkpoint is being merged."""

    class Lost:
        def check(self) -> None:
            raise UserError("run: taken over by another process")

    made = program.build

    def with_lost_lease(*arguments: Any) -> Run:
        run = made(*arguments)
        run.lease = Lost()  # type: ignore[assignment]
        return run

    program.build = with_lost_lease
    try:
        return refused_case(chosen)
    finally:
        program.build = made


def test_a_lease_lost_ends_every_rank_and_renames_nothing(
    two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    chosen = settings(sample_folder / "shards", tmp_path / "run", *MORE, "deepspeed.stage=1")
    assert two_ranks.run(lost_case, chosen) == ["run: taken over by another process"] * 2
    assert not list_checkpoints(tmp_path / "run")
