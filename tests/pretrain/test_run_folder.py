"""The folder of a run: nothing that is not a run is written into, and a run is known from its first moment."""

import json
import shutil
from pathlib import Path

import pytest

from data.common.files import UserError, read_json, read_manifest, verify_files
from pretrain.run_folder import check_run_folder
from tests.golden.observe import describe
from tests.pretrain.runs import metrics, refused_case, run_case, settings
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
