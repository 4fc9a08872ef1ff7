"""A run that diverges: nothing of it is saved, the last good checkpoint stays, and a lower rate goes on from it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.common.files import UserError, read_json, seal, write_json, write_manifest
from pretrain.checkpoint import list_checkpoints, newest_checkpoint, prune, step_of
from pretrain.engine import init_distributed
from pretrain.evaluate import Evaluator
from pretrain.export.folder import export
from pretrain.objectives.kinds import make_objective
from pretrain.recipe import load_recipe
from pretrain.saver import first_not_finite
from pretrain.train import build
from pretrain.weights import load_weights
from tests.golden.observe import describe
from tests.pretrain.runs import metrics, refused_case, run_case, settings, stage_settings, write_checkpoint
from tests.ranks import Ranks

MORE = ["checkpoint.every_steps=2", "evaluate.max_blocks=2", "checkpoint.keep_last=1"]
POISON = ["optimizer.learning_rate=1e30", "schedule.initial_learning_rate=1e30", "optimizer.gradient_clipping=0"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_diverging_run_keeps_its_good_checkpoint_and_goes_on_from_it(
    stage: int, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    layout = stage_settings(tmp_path, stage)
    run, good = tmp_path / "run", tmp_path / "good"
    chosen = settings(sample_folder / "shards", run, *MORE, *layout)
    two_ranks.run(run_case, [*chosen, "train.steps=2"])
    before = describe(run / "checkpoints")
    for steps in (4, 6):
        said = two_ranks.run(refused_case, [*chosen, *POISON, f"train.steps={steps}"])
        assert said[0] == said[1] and f"{run}: diverged: at step" in said[0] and "step-0000002, is untouched" in said[0]
        assert "lower optimizer.learning_rate" in said[0] and "\n" not in said[0]
        assert describe(run / "checkpoints") == before and (run / "latest").read_text() == "step-0000002"
    two_ranks.run(run_case, [*chosen, "train.steps=4"])
    whole = settings(sample_folder / "shards", good, *MORE, *layout)
    two_ranks.run(run_case, [*whole, "train.steps=2"])
    two_ranks.run(run_case, [*whole, "train.steps=4"])
    assert metrics(run, "train/loss") == metrics(good, "train/loss")


def test_numbers_that_are_not_finite_are_found(tmp_path: Path) -> None:
    good = ("a", 0, torch.tensor([3e38, -3e38, 0.0]))
    assert not first_not_finite([good, ("empty", 0, torch.zeros(0))])
    for value in (math.nan, math.inf, -math.inf):
        assert first_not_finite([good, ("b", 5, torch.tensor([0.0, value, 1.0]))]) == "b"


def poison(checkpoint: Path, name: str) -> None:
    """Make a checkpoint as an earlier version would have saved it after a run had diverged."""
    if name == "state.json":
        state = json.loads((checkpoint / name).read_text())
        state["probe"]["loss"] = state["held_out"]["loss"] = math.nan
        write_json(checkpoint / name, state)
    else:
        tensors = load_file(checkpoint / name)
        tensors["biogpt.layer_norm.weight"][1] = math.nan
        save_file(tensors, checkpoint / name, metadata={"format": "pt"})
    write_manifest(checkpoint, "checkpoint", {}, {"step": step_of(checkpoint)})


@pytest.mark.parametrize(
    "name", ["state.json", "model.safetensors", pytest.param("exp_avg_sq.safetensors", marks=pytest.mark.slow)]
)
def test_folders_of_earlier_versions_fall_back_to_the_newest_good_checkpoint(
    name: str, one_rank: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    chosen = settings(sample_folder / "shards", run, *MORE, "checkpoint.keep_last=3", "train.steps=4")
    one_rank.run(run_case, chosen)
    losses = metrics(run, "train/loss")
    poison(run / "checkpoints" / "step-0000004", name)
    found, faults = newest_checkpoint(run)
    assert found and found.name == "step-0000002" and "had diverged" in faults[0]
    assert export(run, tmp_path / "hf")["counts"]["step"] == 2
    one_rank.run(run_case, chosen)
    assert metrics(run, "train/loss") == losses and newest_checkpoint(run)[1] == []


def test_pruning_never_takes_nan_for_the_best(tmp_path: Path) -> None:
    for step, loss in enumerate((1.0, 2.0, math.nan, math.nan, math.nan), start=1):
        write_checkpoint(tmp_path, step, {}, {"step": step, "held_out": {"loss": loss}})
    prune(tmp_path, keep_last=3, keep_every_steps=0, keep_best=True)
    assert [step_of(checkpoint) for checkpoint in list_checkpoints(tmp_path)] == [5, 4, 3, 1]


def best_case(chosen: list[str]) -> tuple[float, float]:
    """The best loss after an evaluation, where the best before was NaN and where it was lower."""
    run = build(load_recipe("tiny", chosen), init_distributed())

    class Silent:
        def say(self, *_: object, **__: object) -> None: ...

    evaluator, found = Evaluator(Silent()), []  # type: ignore[arg-type]
    for best in (math.nan, 1.0):
        run.best, run.held_out = {"loss": best, "step": 0}, {}
        evaluator.evaluate(run)
        found.append(run.best["loss"])
    return found[0], found[1]


def test_an_evaluation_replaces_a_best_of_nan(one_rank: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    after_nan, after_lower = one_rank.run(best_case, settings(sample_folder / "shards", tmp_path / "run", *MORE))[0]
    assert math.isfinite(after_nan) and after_nan > 1.0 and after_lower == 1.0


def test_given_weights_with_nan_are_refused_by_name(run: Path, hf: Path, sample_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors["biogpt.layers.1.fc1.bias"][5] = math.nan
    save_file(tensors, tmp_path / "bad.safetensors")
    recipe = load_recipe("tiny", settings(sample_folder / "shards", tmp_path / "run"))
    objective = make_objective(recipe)
    with pytest.raises(UserError, match=r"bad\.safetensors: biogpt\.layers\.1\.fc1\.bias holds numbers that are not"):
        load_weights(objective.build_model(), tmp_path / "bad.safetensors", sample_folder / "shards" / "tokenizer")


def test_other_files_in_the_folder_of_checkpoints_are_left_alone(
    one_rank: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    chosen = settings(sample_folder / "shards", run, *MORE)
    one_rank.run(run_case, [*chosen, "train.steps=2"])
    shutil.copytree(run / "checkpoints" / "step-0000002", run / "checkpoints" / "step-0000002-backup")
    (run / "checkpoints" / ".DS_Store").write_text("finder")
    (run / "checkpoints" / ".git").mkdir()
    (run / "checkpoints" / "notes.txt").write_text("mine")
    keep_all = ["checkpoint.keep_every_steps=2", "train.steps=6"]
    one_rank.run(run_case, [*chosen, *keep_all])
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names >= {"step-0000002-backup", ".DS_Store", ".git", "notes.txt", "step-0000002", "step-0000006"}
    assert [step_of(checkpoint) for checkpoint in list_checkpoints(run)] == [6, 4, 2]


def test_ten_million_steps_are_newer_than_nine(tmp_path: Path) -> None:
    for step in (9_999_999, 10_000_000):
        write_checkpoint(tmp_path, step, {}, {"step": step, "held_out": {"loss": 1.0}})
        path = list_checkpoints(tmp_path)[0]
        manifest = read_json(path / "manifest.json")
        write_json(path / "manifest.json", seal(manifest))
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoints" / "step-10000000", [])
