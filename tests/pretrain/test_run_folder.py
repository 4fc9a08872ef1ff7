"""The folder of a run: nothing that is not a run is written into, and a run is known from its first moment."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pretrain.train
from data.common.files import UserError, read_json, read_manifest, verify_files
from pretrain.run_folder import check_run_folder
from tests.data.common.small_disk import small_disk
from tests.golden.observe import describe
from tests.pretrain.runs import metrics, refused_case, run_case, settings, started_on_a_full_disk_case
from tests.ranks import Ranks

MORE = ["train.steps=2", "evaluate.max_blocks=2"]


def test_a_finished_corpus_is_not_written_into(one_rank: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(sample_folder / "corpus", corpus)
    before = describe(corpus)
    said = one_rank.run(refused_case, settings(sample_folder / "shards", corpus, *MORE))[0]
    assert f"train.run = {str(corpus)!r}: exists and is not a run" in said and "\n" not in said
    assert describe(corpus) == before
    verify_files(corpus, read_manifest(corpus, "corpus"))


def test_a_project_folder_is_not_written_into(one_rank: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    """With files and folders of the names that a run writes, and one of its own."""
    project = tmp_path / "project"
    (project / "tokenizer").mkdir(parents=True)
    for name in ("recipe.toml", "stop", "metrics.jsonl", "notes.txt", "tokenizer/vocab.json"):
        (project / name).write_text("mine")
    before = describe(project)
    assert "is not a run" in one_rank.run(refused_case, settings(sample_folder / "shards", project, *MORE))[0]
    assert describe(project) == before


def test_what_is_a_run_and_what_is_not(tmp_path: Path) -> None:
    check_run_folder(tmp_path / "absent")
    (tmp_path / "run").mkdir()
    check_run_folder(tmp_path / "run")
    (tmp_path / "run" / ".DS_Store").write_text("")
    check_run_folder(tmp_path / "run")
    (tmp_path / "run" / "recipe.toml").write_text("")  # of an earlier version, killed before its first checkpoint
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    check_run_folder(tmp_path / "run")
    (tmp_path / "run" / "recipe.toml").write_text("[dough]\nflour = 500\n")
    with pytest.raises(UserError, match="is not a run"):
        check_run_folder(tmp_path / "run")
    (tmp_path / "run" / "recipe.toml").write_text("")
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not a run"):
        check_run_folder(tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"kind": "run"}))
    check_run_folder(tmp_path / "run")
    for content in ("not JSON", "[]", '{"kind": "hf"}'):
        (tmp_path / "run" / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="is not a run"):
            check_run_folder(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        check_run_folder(tmp_path / "file")


def test_a_run_has_its_manifest_before_its_first_checkpoint(
    one_rank: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    refused = settings(sample_folder / "shards", run, *MORE, "checkpoint.every_steps=1", "optimizer.learning_rate=1e30")
    one_rank.run(refused_case, refused)
    assert read_json(run / "manifest.json")["kind"] == "run"


def test_read_only_shards_give_a_run_that_can_be_resumed(one_rank: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(sample_folder / "shards", shards)
    for path in shards.rglob("*"):
        if path.is_file():
            path.chmod(0o444)
    chosen = settings(shards, tmp_path / "run", *MORE)
    one_rank.run(run_case, chosen)
    copies = list((tmp_path / "run" / "tokenizer").iterdir())
    assert copies and all(path.stat().st_mode & 0o200 for path in copies)
    before = {path: path.stat().st_mtime_ns for path in copies}
    one_rank.run(run_case, [*chosen, "train.steps=3"])
    assert before == {path: path.stat().st_mtime_ns for path in copies}
    assert list(metrics(tmp_path / "run", "train/loss")) == [1, 2, 3]


def twice_case(chosen: list[str]) -> str:
    """What a second run of the same folder is told, while the first takes a step."""
    update, said = pretrain.train.update, []

    def during(*arguments: Any) -> Any:
        if not said:
            command = [sys.executable, "-m", "pretrain.train", "tiny", *chosen]
            alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
            result = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=120)
            said.append(f"{result.returncode} {result.stderr}")
        return update(*arguments)

    pretrain.train.update = during  # type: ignore[assignment]
    try:
        run_case(chosen)
    finally:
        pretrain.train.update = update
    return said[0]


def test_a_second_run_in_the_same_folder_is_refused(one_rank: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = one_rank.run(twice_case, settings(sample_folder / "shards", run, *MORE))[0]
    assert said.startswith("2 ") and f"{run}: it is being written by process" in said
    assert list(metrics(run, "train/loss")) == [1, 2] and [path.name for path in tmp_path.iterdir()] == ["run"]


def taken_over_case(chosen: list[str], lease: Path) -> str:
    """What a run says whose lease another process has taken over before its checkpoint."""
    update = pretrain.train.update

    def during(*arguments: Any) -> Any:
        lease.write_text('{"token": "another", "pid": 1, "host": "elsewhere"}\n00000000000000000007\n')
        return update(*arguments)

    pretrain.train.update = during  # type: ignore[assignment]
    try:
        return refused_case(chosen)
    finally:
        pretrain.train.update = update


def test_a_run_that_was_taken_over_writes_no_checkpoint(one_rank: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    chosen = settings(sample_folder / "shards", tmp_path / "run", *MORE)
    said = one_rank.run(taken_over_case, chosen, tmp_path / ".run.lease")[0]
    assert "was taken over by process 1 on elsewhere" in said
    assert not (tmp_path / "run" / "latest").exists() and not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("pages", [0, 1, pytest.param(2, marks=pytest.mark.slow), 4, 6])
def test_a_full_disk_at_the_start_is_one_line_and_nothing_is_half_written(
    pages: int, one_rank: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """A quota or a shortage of inodes, which the look for a checkpoint's room beforehand does not see."""
    with small_disk(tmp_path / "disk") as disk:
        chosen = settings(sample_folder / "shards", disk / "run", *MORE)
        said = one_rank.run(started_on_a_full_disk_case, chosen, disk, pages)[0]
        assert f"cannot be written, the disk {disk} is full (" in said and "\n" not in said
        left = {path for path in disk.rglob("*") if path.is_file()}
        tokenizer = {disk / "run" / "tokenizer" / path.name: path for path in (sample_folder / "tokenizer").iterdir()}
        assert all(path.read_bytes() == tokenizer[path].read_bytes() for path in left & tokenizer.keys())
        assert not any(".partial" in path.name or path.name.endswith(".lease") for path in left)
        assert one_rank.run(run_case, chosen) == [2]
