"""Which checkpoint of a run is used: an earlier one, the best, one to return to; and a start with nothing to do."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data.common.files import UserError
from launch.cli import app
from pretrain.checkpoint import choose_checkpoint, list_checkpoints, newest_checkpoint, read_state, return_to, step_of
from pretrain.export.folder import export
from pretrain.inference import evaluate_folder
from tests.golden.observe import describe
from tests.pretrain.runs import metrics, run_case, settings
from tests.pretrain.test_train import said_case
from tests.ranks import Ranks

MORE = ["checkpoint.every_steps=2", "checkpoint.keep_every_steps=2", "evaluate.max_blocks=4"]
SCHEDULE = ["schedule.kind=cosine", "schedule.warmup_steps=1"]


@pytest.fixture(scope="module")
def run(one_rank: Ranks, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2, 4 and 6; that of step 4 is the best by its record."""
    folder = tmp_path_factory.mktemp("choosing") / "run"
    one_rank.run(run_case, settings(sample_folder / "shards", folder, *MORE, *SCHEDULE, "train.steps=6"))
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_a_step_or_the_best_is_exported_and_evaluated(copy: Path, sample_folder: Path, tmp_path: Path) -> None:
    losses = {step_of(each): read_state(each)["held_out"]["loss"] for each in list_checkpoints(copy)}
    best = min(losses, key=lambda step: losses[step])
    for step, expected in {"2": 2, "4": 4, "best": best, "": 6}.items():
        out = tmp_path / f"hf-{step}"
        counts = export(copy, out, None, step)["counts"]
        assert counts["step"] == expected and counts["recorded_loss"] == losses[expected]
        results = [evaluate_folder(copy, sample_folder / "shards", "test", step)]
        results.append(evaluate_folder(out, sample_folder / "shards", "test"))
        assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-5)
    with pytest.raises(UserError, match="has no checkpoint of step 5; there are 2, 4, 6"):
        export(copy, tmp_path / "none", None, "5")
    (copy / "checkpoints" / "step-0000004" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.safetensors.*an older checkpoint.*the newest whole one is of step 6"):
        choose_checkpoint(copy, "4")


def test_a_run_is_returned_to_an_earlier_step(copy: Path, one_rank: Ranks, sample_folder: Path, run: Path) -> None:
    later = {path.name: describe(path) for path in list_checkpoints(copy)[:2]}
    result = CliRunner().invoke(app, ["checkpoints", str(copy), "--return-to", "2"])
    assert result.exit_code == 0 and result.output.count("set aside:") == 2 and "latest" in result.output
    assert newest_checkpoint(copy) == (copy / "checkpoints" / "step-0000002", [])
    chosen = settings(sample_folder / "shards", copy, *MORE, *SCHEDULE)
    one_rank.run(run_case, [*chosen, "train.steps=6"])
    assert metrics(copy, "train/loss") == metrics(run, "train/loss")
    aside = {path.name.split(".")[0]: describe(path) for path in (copy / "checkpoints").glob("*.aside-1")}
    assert aside == later
    assert len(return_to(copy, "4")) == 1 and list((copy / "checkpoints").glob("step-0000006.aside-2"))


def test_checkpoints_after_latest_are_neither_counted_nor_removed(
    copy: Path, one_rank: Ranks, sample_folder: Path
) -> None:
    """As an edit of `latest` by hand leaves them."""
    (copy / "latest").write_text("step-0000002")
    chosen = settings(sample_folder / "shards", copy, *SCHEDULE, "checkpoint.every_steps=1", "evaluate.max_blocks=4")
    one_rank.run(run_case, [*chosen, "train.steps=4", "checkpoint.keep_last=1", "checkpoint.keep_best=false"])
    assert {path.name for path in list_checkpoints(copy)} == {"step-0000004", "step-0000006"}
    assert newest_checkpoint(copy) == (copy / "checkpoints" / "step-0000004", [])


def test_the_best_is_marked_in_the_list(copy: Path) -> None:
    output = CliRunner().invoke(app, ["checkpoints", str(copy)]).output
    losses = {step_of(each): read_state(each)["held_out"]["loss"] for each in list_checkpoints(copy)}
    best = min(losses, key=lambda step: losses[step])
    (line,) = [line for line in output.splitlines() if "best" in line]
    assert line.split()[1] == str(best) and output.count("latest") == 1


def test_a_start_with_nothing_to_do_writes_nothing(copy: Path, one_rank: Ranks, sample_folder: Path) -> None:
    before = describe(copy)
    for steps, said in ((6, "is at step 6\n"), (4, "is at step 6, past train.steps = 4\n")):
        chosen = settings(sample_folder / "shards", copy, *MORE, *SCHEDULE, f"train.steps={steps}")
        printed = one_rank.run(said_case, [*chosen, "evaluate.max_blocks=1", "log.every_steps=7"])[0]
        assert printed == f"done: {copy} {said}"
        assert describe(copy) == before


def test_an_export_uses_what_the_recorded_loss_was_measured_on(
    copy: Path, one_rank: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """The recipe of the folder says another number of blocks by now."""
    recipe = copy / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("max_blocks = 4", "max_blocks = 2"))
    assert export(copy, tmp_path / "hf")["counts"]["held_out"]["tokens"] == 4 * 64


def test_a_jump_of_the_learning_rate_is_named(copy: Path, one_rank: Ranks, sample_folder: Path) -> None:
    chosen = settings(sample_folder / "shards", copy, *MORE, *SCHEDULE)
    printed = one_rank.run(said_case, [*chosen, "train.steps=8"])[0]
    assert "the learning rate jumps from 0.00e+00 to" in printed and "at step 6" in printed
