"""Fine-tuning on prompts and targets, against a plain loop over transformers' own model and tokenizer."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BioGptForCausalLM

from data.common.files import UserError
from data.shards.order import EpochOrder
from model.loss import IGNORE_INDEX
from pretrain.checkpoint import newest_checkpoint
from pretrain.export.folder import export
from pretrain.objectives.kinds import make_objective
from pretrain.recipe import load_recipe
from pretrain.schedule import learning_rate
from pretrain.training_data import read_stages, stages_of_run
from tests.pretrain.runs import metrics
from tests.pretrain.tuning import prompts_and_targets, tuning, tuning_case, write_folder, write_records
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("tuning") / "records")


@pytest.fixture(scope="module")
def tuned(two_ranks: Ranks, records: Path, hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps on two ranks, from an exported folder."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    two_ranks.run(tuning_case, *tuning(records, hf, run))
    return run


def plain_ids_and_labels(tokenizer: Any, record: dict[str, str]) -> tuple[list[int], list[int]]:
    """As one writes it for transformers: the prompt as it is tokenized at generation, then the target and `</s>`."""
    prompt = tokenizer(record["prompt"])["input_ids"]
    target = [*tokenizer(record["target"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return prompt + target, [-100] * len(prompt) + target


def plain_pair(hf: Path) -> Any:
    return partial(plain_ids_and_labels, AutoTokenizer.from_pretrained(hf))


def plain_mean_loss(model: Any, tokenizer: Any, records: list[dict[str, str]]) -> torch.Tensor:
    """The loss of a target's token by transformers' model, a record at a time."""
    total, count = torch.zeros(()), 0
    for record in records:
        ids, labels = plain_ids_and_labels(tokenizer, record)
        counted = sum(label != -100 for label in labels)
        total = total + model(torch.tensor([ids]), labels=torch.tensor([labels])).loss * counted
        count += counted
    return total / count


def load(folder: Path) -> tuple[Any, Any]:
    return BioGptForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def plain_losses(hf: Path, recipe: Any, steps: int) -> list[float]:
    """The training by torch's AdamW over transformers' model."""
    train = prompts_and_targets(0, 40)
    model, tokenizer = load(hf)
    model.eval()  # the recipe has no dropout
    optimizer = torch.optim.AdamW(model.parameters(), betas=recipe.optimizer.betas, weight_decay=0.01)
    order, losses = EpochOrder(len(train), recipe.train.seed), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = plain_mean_loss(model, tokenizer, [train[order.locate(step * 8 + row)[1]] for row in range(8)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_losses_are_those_of_a_plain_loop_over_transformers(tuned: Path, hf: Path) -> None:
    expected = plain_losses(hf, load_recipe(str(tuned / "recipe.toml")), 8)
    found = list(metrics(tuned, "train/loss").values())
    print(f"differs by {max(abs(a - b) for a, b in zip(found, expected, strict=True)):.1e}")
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] - 1


def test_the_held_out_loss_is_that_of_transformers_on_the_weights_it_starts_from(tuned: Path, hf: Path) -> None:
    with torch.no_grad():
        expected = plain_mean_loss(*load(hf), prompts_and_targets(1, 11))
    assert metrics(tuned, "validation/loss")[0] == pytest.approx(expected.item(), rel=1e-5)


def test_the_export_gives_transformers_the_recorded_loss(tuned: Path, tmp_path: Path) -> None:
    counts = export(tuned, tmp_path / "hf")["counts"]
    with torch.no_grad():
        found = plain_mean_loss(*load(tmp_path / "hf"), prompts_and_targets(1, 11))
    assert found.item() == pytest.approx(metrics(tuned, "validation/loss")[8], abs=1e-5)
    assert counts["held_out"]["loss"] == pytest.approx(found.item(), abs=1e-5)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "A BioGPT-shaped causal language model,\nfine-tuned with biogpt-pretrain" in card
    assert "8 of 8 records" in card and str(tuned.parent) not in card
    assert "### Stage 1: causal" in card and "### Stage 2: causal" in card and "| records read |" in card
    assert read_stages(tmp_path / "hf") == read_stages(tuned)


def test_a_resumed_run_gives_the_same_bits(
    two_ranks: Ranks, tuned: Path, records: Path, hf: Path, tmp_path: Path
) -> None:
    """Also if the folder that it started from is gone: the run has its own tokenizer, and knows its shape."""
    recipe, chosen = tuning(records, hf, tmp_path / "run", "train.stop_after_minutes=0.0000001")
    two_ranks.run(tuning_case, recipe, chosen)
    assert newest_checkpoint(tmp_path / "run")[0] == tmp_path / "run" / "checkpoints" / "step-0000001"
    path = tmp_path / "run" / "recipe.toml"
    moved = path.read_text().replace("stop_after_minutes = 1e-7", "stop_after_minutes = 0.0")
    (tmp_path / "resumed.toml").write_text(moved.replace(str(hf), str(tmp_path / "absent")))
    assert str(hf) in moved
    with pytest.raises(AssertionError, match="has given weights"):  # it says what it started from, which is another
        two_ranks.run(tuning_case, str(tmp_path / "resumed.toml"), [])
    hf.rename(hf.with_name("away"))
    try:
        two_ranks.run(tuning_case, str(path), ["train.stop_after_minutes=0"])
    finally:
        hf.with_name("away").rename(hf)
    for name in ("model", "exp_avg", "exp_avg_sq"):
        one, other = (run / "checkpoints" / "step-0000008" / f"{name}.safetensors" for run in (tmp_path / "run", tuned))
        assert one.read_bytes() == other.read_bytes()


def test_a_run_is_a_model_to_start_from(two_ranks: Ranks, tuned: Path, hf: Path, records: Path, tmp_path: Path) -> None:
    """A second fine-tuning begins at the loss at which the first ended."""
    recipe, chosen = tuning(records, tuned, tmp_path / "run", "train.steps=1")
    two_ranks.run(tuning_case, recipe, chosen)
    ended, begun = metrics(tuned, "validation/loss")[8], metrics(tmp_path / "run", "validation/loss")[0]
    assert begun == pytest.approx(ended, abs=1e-6)


# The batches


def objective_of(records: Path, hf: Path, folder: Path, *more: str) -> Any:
    return make_objective(load_recipe(*tuning(records, hf, folder / "run", *more)))


def test_a_batch_holds_the_ids_that_transformers_finds(records: Path, hf: Path, tmp_path: Path) -> None:
    objective, tokenizer = objective_of(records, hf, tmp_path), AutoTokenizer.from_pretrained(hf)
    ids, labels = objective.held_out()["records"].batch(range(11), 12)
    for row, record in enumerate(prompts_and_targets(1, 11)):
        expected, wanted = plain_ids_and_labels(tokenizer, record)
        length = len(expected) - 1  # the last id is only predicted
        assert ids[row].tolist() == [*expected[:-1], *[1] * (ids.shape[1] - length)]
        assert labels[row].tolist() == [*wanted[1:], *[IGNORE_INDEX] * (ids.shape[1] - length)]
    assert (labels[11] == IGNORE_INDEX).all()
    assert objective.held_out()["records"].counted_targets(range(11)) == (labels != IGNORE_INDEX).sum()


def test_targets_and_tokens_are_pure_functions_of_the_numbers(records: Path, hf: Path, tmp_path: Path) -> None:
    objective = objective_of(records, hf, tmp_path)
    for numbers in (range(3), range(36, 44), range(75, 130)):  # 40 records an epoch
        ids, labels = objective.batch(numbers)
        assert objective.counted_targets(numbers) == (labels != IGNORE_INDEX).sum()
        assert objective.tokens(numbers) == (ids != 1).sum()
    assert objective.epochs(100) == {"records": 2.5}


def test_records_are_encoded_some_at_a_time_as_they_are_all_at_once(
    records: Path, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = objective_of(records, hf, tmp_path).batch(range(40))
    monkeypatch.setattr("pretrain.objectives.records.AT_A_TIME", 7)
    some = objective_of(records, hf, tmp_path).batch(range(40))
    assert all(torch.equal(*pair) for pair in zip(whole, some, strict=True))


def test_a_record_that_is_too_long_loses_the_beginning_of_its_prompt_and_is_counted(hf: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "records")
    long = {"prompt": "Mesurafen was studied. " * 9 + "Dravonol causes", "target": "asthma"}
    write_records(folder / "validation.jsonl", [long, {"prompt": "Dravonol causes", "target": "asthma"}])
    objective, tokenizer = (
        objective_of(folder, hf, tmp_path, "train.context_length=16"),
        AutoTokenizer.from_pretrained(hf),
    )
    objective.check()
    ids, labels = objective.held_out()["records"].batch(range(2), 2)
    whole, _ = plain_ids_and_labels(tokenizer, long)
    assert ids.shape == (2, 16) and ids[0].tolist() == [2, *whole[:-1][-15:]]
    short = len(plain_ids_and_labels(tokenizer, {"prompt": "Dravonol causes", "target": "asthma"})[0]) - 1
    assert labels[0][labels[0] != IGNORE_INDEX].tolist() == labels[1][labels[1] != IGNORE_INDEX].tolist()
    assert ids[0, 16 - short + 1 :].tolist() == ids[1, 1:short].tolist()
    said = [line for line in objective.warnings() if "validation" in line]
    assert said == ["1 of 2 validation records are longer than train.context_length = 16 and were cut"]


# Mistakes


def mistake_of(*arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        objective_of(*arguments).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_one_line(records: Path, hf: Path, run: Path, tmp_path: Path) -> None:
    assert "missing.jsonl" not in mistake_of(tmp_path / "absent", hf, tmp_path)
    assert f"{tmp_path / 'absent' / 'train.jsonl'}: cannot be read" in mistake_of(tmp_path / "absent", hf, tmp_path)
    said = mistake_of(records, tmp_path / "absent", tmp_path)
    assert said == f"model.weights = {tmp_path / 'absent'}: no such folder; expected an exported folder or a run"
    (tmp_path / "empty").mkdir()
    assert "config.json: no such file" in mistake_of(records, tmp_path / "empty", tmp_path)
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"vocab_size": 9}))
    assert "has no hidden_size; a model to start from needs it" in mistake_of(records, tmp_path / "empty", tmp_path)
    said = mistake_of(records, hf, tmp_path, "train.context_length=65")
    assert "longer than the model's max_position_embeddings 64" in said
    folder = write_folder(tmp_path / "records")
    write_records(folder / "train.jsonl", [{"prompt": "a", "target": "b"}, {"prompt": "", "target": "role " * 70}])
    said = mistake_of(folder, hf, tmp_path)
    assert said.startswith(f"{folder / 'train.jsonl'}: line 2: the target has ") and "context_length = 64" in said


def test_a_run_says_what_the_weights_it_started_from_were_trained_on(tuned: Path, hf: Path, tmp_path: Path) -> None:
    """Whether those weights are an exported folder or a run. An export says the same."""
    (pretraining,) = read_stages(hf)
    assert pretraining["corpora"]["train"]["counts"]["train"] > 0
    first, own = read_stages(tuned)
    tokens = sum(len(ids) for ids, _ in map(plain_pair(hf), prompts_and_targets(0, 40))) - 40
    assert first == pretraining and own["figures"] == {"training records, tokens": f"40, {tokens:,}"}
    other = write_folder(tmp_path / "records", train=20)
    recipe = load_recipe(*tuning(other, tuned, tmp_path / "run"))
    stages = stages_of_run(tmp_path / "run", recipe, make_objective(recipe))
    assert stages[:2] == [first, own] and stages[2]["figures"] != own["figures"] and len(stages) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("data.shards=shards2", 'data.shards: objective.kind = "prompt_target" does not use it; remove it'),
        ("train.global_batch_tokens=64", "train.global_batch_tokens: objective.kind"),
        ('model.preset="tiny"', "model.preset: objective.kind"),
        ('model.boundaries="document"', "model.boundaries: objective.kind"),
        ('objective.kind="next_token"', 'data.records: objective.kind = "next_token" does not use it'),
        ("train.micro_batch_size=3", "does not divide over 1 ranks x micro_batch_size 3; 9 would"),
    ],
)
def test_keys_that_do_nothing_are_refused(given: str, said: str, records: Path, hf: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(*tuning(records, hf, tmp_path / "run", given)).gradient_accumulation_steps(1)
    assert said in str(caught.value)


def test_keys_that_are_needed_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[objective]\nkind = "prompt_target"\n')
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "a.toml"))
    for key in ("data.records", "train.global_batch_examples", "model.weights"):
        assert f'{key}: is missing; objective.kind = "prompt_target" needs it' in str(caught.value)


def test_perplexity_is_not_reported(tuned: Path) -> None:
    assert not metrics(tuned, "validation/perplexity")
    assert math.isfinite(metrics(tuned, "train/tokens")[8])
