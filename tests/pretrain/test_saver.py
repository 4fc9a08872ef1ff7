"""Saving by rule, falling back from damage, refusing what does not fit."""

import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from data.common.files import UserError, seal, write_json
from launch.cli import app
from pretrain.checkpoint import list_checkpoints, newest_checkpoint, prune, step_of
from pretrain.recipe import load_recipe
from tests.data.common.small_disk import small_disk
from tests.data.corpora import content
from tests.pretrain.runs import filled_case, metrics, refused_case, run_case, settings, write_checkpoint
from tests.ranks import Ranks

MORE = ["train.steps=9", "checkpoint.every_steps=3", "checkpoint.keep_last=3", "evaluate.max_blocks=4"]


@pytest.fixture(scope="module")
def run(two_ranks: Ranks, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saver") / "run"
    two_ranks.run(run_case, settings(sample_folder / "shards", folder, *MORE))
    return folder


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    run: Path, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """One flipped byte in any file, a missing file, a missing folder: the run ends as it did."""
    names = [path.name for path in (run / "checkpoints" / "step-0000009").iterdir()]
    assert len(names) == 5
    copy = run
    for damage in [*names, "missing file", "missing folder"]:
        copy = tmp_path / damage.replace(" ", "-")
        shutil.copytree(run, copy)
        newest = copy / "checkpoints" / "step-0000009"
        if damage == "missing folder":
            shutil.rmtree(newest)
        elif damage == "missing file":
            (newest / "exp_avg.safetensors").unlink()
        else:
            content = bytearray((newest / damage).read_bytes())
            content[len(content) // 3] ^= 4
            (newest / damage).write_bytes(content)
        checkpoint, faults = newest_checkpoint(copy)
        assert checkpoint == copy / "checkpoints" / "step-0000006" and len(faults) == 1 and "step-0000009" in faults[0]
    two_ranks.run(run_case, settings(sample_folder / "shards", copy, *MORE))
    assert metrics(copy, "train/loss") == metrics(run, "train/loss")
    assert newest_checkpoint(copy) == (copy / "checkpoints" / "step-0000009", [])


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for checkpoint in list_checkpoints(tmp_path / "run"):
        (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        newest_checkpoint(tmp_path / "run")


def test_a_kill_between_any_two_files_leaves_a_checkpoint_that_loads(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename, removal and creation of a folder while saving is made the last thing that happens."""
    tensors = {kind: written(run, kind) for kind in ("model", "exp_avg", "exp_avg_sq")}

    class Killed(BaseException):
        pass

    def save(folder: Path) -> None:
        write_checkpoint(folder, 12, tensors, {"step": 12, "held_out": {"loss": 1.0}})
        prune(folder, keep_last=1, keep_every_steps=0, keep_best=False)

    def count_down(original: Any, left: list[int]) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return original(*arguments, **more)

        return call

    survived, copy = [], run
    for calls in range(100):
        copy = tmp_path / str(calls)
        shutil.copytree(run, copy)
        left = [calls]
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "replace"), (Path, "mkdir"), (Path, "unlink"), (shutil, "rmtree")):
                patch.setattr(owner, name, count_down(getattr(owner, name), left))
            try:
                save(copy)
                finished = True
            except Killed:
                finished = False
        checkpoint, faults = newest_checkpoint(copy)
        assert checkpoint and not faults and step_of(checkpoint) in (9, 12)
        survived.append(step_of(checkpoint))
        if finished:
            break
    print(f"killed before each of {len(survived) - 1} file operations: newest checkpoints {survived}")
    assert survived[-1] == 12 and survived.count(9) > 5 and len(list_checkpoints(copy)) == 1


def written(run: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of one kind as they are in the run's last checkpoint."""
    return load_file(run / "checkpoints" / "step-0000009" / f"{kind}.safetensors")


def test_checkpoints_are_kept_by_rule(tmp_path: Path) -> None:
    losses = {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 3.6, 12: 3.7}
    for step, loss in losses.items():
        write_checkpoint(tmp_path, step, {}, {"step": step, "held_out": {"loss": loss}})
    prune(tmp_path, keep_last=2, keep_every_steps=6, keep_best=True)
    assert [step_of(checkpoint) for checkpoint in list_checkpoints(tmp_path)] == [12, 10, 6, 4]
    prune(tmp_path, keep_last=1, keep_every_steps=0, keep_best=False)
    assert [step_of(checkpoint) for checkpoint in list_checkpoints(tmp_path)] == [12]


def full_disk_case(chosen: list[str], free_after: int) -> str:
    """A run on a disk that is full after some looks at it."""
    looks = [0]

    def disk_usage(_: object) -> Any:
        looks[0] += 1
        return namedtuple("usage", "total used free")(0, 0, 10**12 if looks[0] <= free_after else 1000)

    before, shutil.disk_usage = shutil.disk_usage, disk_usage  # type: ignore[assignment]
    try:
        run_case(chosen)
    except UserError as error:
        return str(error)
    finally:
        shutil.disk_usage = before
    return ""


def test_a_disk_without_room_is_said_before_and_kept_whole_after(
    two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    chosen = settings(sample_folder / "shards", tmp_path / "none", *MORE)
    assert re.search(
        r"a checkpoint takes 2 MB, the disk /\S* has 0 MB free", two_ranks.run(full_disk_case, chosen, 0)[0]
    )
    assert not (tmp_path / "none").exists()
    # Room for the checkpoint of step 3 only: that of step 6 is left out, the last one is an error that names it.
    chosen = settings(sample_folder / "shards", tmp_path / "some", *MORE)
    said = two_ranks.run(full_disk_case, chosen, 2)
    assert all("step 9 is not saved" in text for text in said)
    assert newest_checkpoint(tmp_path / "some") == (tmp_path / "some" / "checkpoints" / "step-0000003", [])


@pytest.mark.parametrize(
    "pages", [pytest.param(0, marks=pytest.mark.slow), 45, pytest.param(80, marks=pytest.mark.slow), 106]
)
def test_a_disk_that_fills_up_while_saving_costs_that_checkpoint_alone(
    pages: int, run: Path, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """In each of its files. The run goes on; its last step ends in a line, and the rerun in the same bytes."""
    with small_disk(tmp_path / "disk") as disk:
        saved = disk / "run" / "checkpoints"
        chosen = settings(sample_folder / "shards", disk / "run", *MORE)
        (printed, said), other = two_ranks.run(filled_case, chosen, disk, 6, pages)
        assert printed.count("warning") == 1 and said == "" and other == ("", "")
        assert f"{saved}: cannot be written, the disk {disk} is full (" in printed
        assert sorted(path.name for path in saved.iterdir()) == ["step-0000003", "step-0000009"]
        shutil.rmtree(disk / "run")
        ends = two_ranks.run(filled_case, chosen, disk, 9, pages)
        assert ends[0][1] == ends[1][1] and f"the disk {disk} is full (" in ends[0][1]
        assert ends[0][1].endswith(f"; step 9 is not saved, {disk}/run/latest names step-0000006")
        assert sorted(path.name for path in saved.iterdir()) == ["step-0000003", "step-0000006"]
        assert newest_checkpoint(disk / "run") == (saved / "step-0000006", [])
        two_ranks.run(run_case, chosen)
        assert content(saved) == content(run / "checkpoints")


def test_other_shards_are_refused_by_name_unless_allowed(
    run: Path, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(sample_folder / "shards", tmp_path / "shards")
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    manifest["made_by"] = "somebody else"
    write_json(tmp_path / "shards" / "manifest.json", seal(manifest))
    chosen = settings(tmp_path / "shards", tmp_path / "run", *MORE, "train.steps=10")
    said = two_ranks.run(refused_case, chosen)
    assert all("has data shards = " in text and "data.allow_other=true" in text for text in said)
    assert two_ranks.run(run_case, [*chosen, "data.allow_other=true"]) == [10, 10]


def test_a_first_loss_other_than_recorded_is_an_error(
    run: Path, one_rank: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """A state that loads but is not the one that was saved."""
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-0000009"
    state = json.loads((newest / "state.json").read_text())
    state["probe"]["loss"] += 0.01
    shutil.rmtree(newest)
    tensors = {kind: written(run, kind) for kind in ("model", "exp_avg", "exp_avg_sq")}
    write_checkpoint(tmp_path / "run", 9, tensors, state)
    chosen = settings(sample_folder / "shards", tmp_path / "run", *MORE, "train.steps=10", "train.micro_batch_size=8")
    with pytest.raises(AssertionError, match="the weights did not come back"):
        one_rank.run(run_case, chosen)
    state["probe"]["loss"] -= 0.01
    write_checkpoint(tmp_path / "run", 9, tensors, state)
    assert one_rank.run(run_case, chosen) == [10]
    assert load_recipe("tiny", chosen).train.steps == 10


def test_a_checkpoint_that_reads_back_other_than_written_is_not_finished(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that lies: one byte of a file comes back changed."""
    sync = os.fsync

    def lying(number: int) -> None:
        sync(number)
        path = Path(f"/proc/self/fd/{number}").readlink()
        if path.name == "exp_avg.safetensors":
            content = bytearray(path.read_bytes())
            content[-3] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(os, "fsync", lying)
    with pytest.raises(RuntimeError, match=r"exp_avg\.safetensors: reads back differently than it was written"):
        write_checkpoint(tmp_path, 3, {"exp_avg": written(run, "exp_avg")}, {"step": 3})
    assert list_checkpoints(tmp_path) == [] and newest_checkpoint(tmp_path) == (None, [])


def test_checkpoints_are_listed_and_damage_is_exit_code_2(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    good = CliRunner().invoke(app, ["checkpoints", str(tmp_path / "run"), "--verify"])
    assert good.exit_code == 0 and good.output.count("whole") == 3 and good.output.count("latest") == 1
    rows = [line.split() for line in good.output.splitlines() if "whole" in line]
    assert [row[1] for row in rows] == ["9", "6", "3"]
    assert float(rows[0][3]) == pytest.approx(metrics(run, "validation/loss")[9], abs=1e-4)
    moments = tmp_path / "run" / "checkpoints" / "step-0000006" / "exp_avg.safetensors"
    moments.write_bytes(moments.read_bytes()[:-1] + b"!")
    bad = CliRunner().invoke(app, ["checkpoints", str(tmp_path / "run"), "--verify"])
    assert isinstance(bad.exception, UserError) and "1 damaged" in str(bad.exception)
    assert "exp_avg.safetensors" in bad.output and bad.output.count("whole") == 2


def test_a_damaged_shard_is_named_on_every_rank_before_anything_is_written(
    two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(sample_folder / "shards", tmp_path / "shards")
    shard = tmp_path / "shards" / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    said = two_ranks.run(refused_case, settings(tmp_path / "shards", tmp_path / "run", *MORE))
    assert said[0] == said[1] and "train-00000.bin: changed since it was written" in said[0]
    assert not (tmp_path / "run").exists()
