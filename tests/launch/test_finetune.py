"""`biogpt finetune`: what it writes, what it trains with, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data.common.files import UserError
from launch import model_commands
from pretrain.export.folder import export, write_hf_files
from pretrain.inference import evaluate_folder
from pretrain.objectives.kinds import make_objective
from tests.pretrain.runs import metrics, settings
from tests.pretrain.tasks.invented import write_pubmedqa


@pytest.fixture(scope="module")
def untrained(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with new weights, as an exported folder."""
    from pretrain.recipe import load_recipe

    folder = tmp_path_factory.mktemp("untrained")
    more = ["model.max_position_embeddings=128"]
    recipe = load_recipe("tiny", settings(sample_folder / "shards", folder / "run", *more))
    write_hf_files(folder, make_objective(recipe).build_model(), sample_folder / "tokenizer")
    return folder


def test_finetune_writes_the_records_and_trains_on_them(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pubmedqa(tmp_path)
    called: list[object] = []
    monkeypatch.setattr(model_commands, "train", lambda *arguments: called.append(arguments))
    run = tmp_path / "a run"
    model_commands.finetune("pubmedqa", untrained, tmp_path, [f"train.run={run}", "train.steps=3"], 2)
    records = tmp_path / "a run.records"
    given = [f'data.records="{records}"', f'model.weights="{untrained}"', f"train.run={run}", "train.steps=3"]
    assert called == [("finetune-pubmedqa", given, 2)]
    assert capsys.readouterr().out == f"{records}: 29 train, 1 validation, 30 test records\n"
    assert {path.stem for path in records.glob("*.jsonl")} == {"train", "validation", "test"}


def test_mistakes_are_named_before_anything_is_written(untrained: Path, tmp_path: Path) -> None:
    run = [f"train.run={tmp_path / 'run'}"]
    for task, model, data, said in (
        (
            "sorting",
            untrained,
            tmp_path,
            "sorting: there is no recipe to fine-tune on it; choose from bc5cdr-entities, bc5cdr-relations, hoc,"
            " pubmedqa",
        ),
        ("pubmedqa", tmp_path / "absent", tmp_path, f"model.weights = {tmp_path / 'absent'}: no such folder"),
        ("pubmedqa", untrained, tmp_path / "absent", f"{tmp_path / 'absent'}: holds neither ori_pqal.json nor"),
    ):
        with pytest.raises(UserError) as caught:
            model_commands.finetune(task, model, data, run)
        assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_finetune_trains_and_exports(untrained: Path, tmp_path: Path) -> None:
    """The whole way, as a user goes it."""
    write_pubmedqa(tmp_path)
    biogpt, run = [sys.executable, "-m", "launch.cli"], tmp_path / "run"
    quick = ["train.precision=fp32", "train.steps=8", "train.global_batch_examples=4", "train.micro_batch_size=4"]
    more = [*quick, f"train.run={run}", "optimizer.learning_rate=3e-3", "schedule.warmup_steps=2"]
    given = ["--model", str(untrained), "--data", str(tmp_path), "--ranks", "1"]
    subprocess.run([*biogpt, "finetune", "pubmedqa", *given, *more], check=True)
    losses = metrics(run, "validation/loss")
    assert losses[8] < losses[0] - 1
    assert export(run, tmp_path / "hf")["counts"]["held_out"]["loss"] == pytest.approx(losses[8], abs=1e-5)
    test = evaluate_folder(run, None, "test")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    lines = (tmp_path / "run.records" / "test.jsonl").read_text().splitlines()
    targets = [json.loads(line)["target"] for line in lines]
    assert len(targets) == 30 and test["tokens"] == sum(len(tokenizer(target)["input_ids"]) for target in targets)
