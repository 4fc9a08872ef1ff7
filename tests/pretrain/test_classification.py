"""Fine-tuning to classify tokens and texts, against plain aligners, plain scores and transformers' own classes."""

import contextlib
import io
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BioGptConfig,
    BioGptForSequenceClassification,
    BioGptForTokenClassification,
    pipeline,
)

from data.common.files import UserError
from model.hf import to_hf
from model.loss import IGNORE_INDEX
from pretrain.checkpoint import choose_checkpoint, list_checkpoints, prune, read_state, step_of
from pretrain.export.folder import export
from pretrain.held_out import held_out_loss
from pretrain.objectives.kinds import make_objective
from pretrain.recipe import load_recipe
from tests.markdown import python_blocks
from tests.pretrain.runs import metrics, write_checkpoint
from tests.pretrain.tuning import DISEASES, DRUGS, tuning, tuning_case, write_records
from tests.ranks import Ranks

KINDS = {"tokens": "token_classification", "single": "sequence_classification", "multiple": "sequence_classification"}
EARLY = 5
LEARNING = ["train.steps=25", "train.micro_batch_size=4", "optimizer.learning_rate=1e-2", "evaluate.every_steps=5"]
LEARNING += ["checkpoint.every_steps=5", "checkpoint.keep_last=9"]


def sentences(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        before = " ".join(f"{draw.choice(DRUGS)} was studied." for _ in range(draw.randrange(3)))
        made.append(f"{before} {draw.choice(DRUGS)} causes {draw.choice(DISEASES)}.".strip())
    return made


def spans_of(text: str) -> list[dict[str, Any]]:
    """Where the names stand."""
    names = {"Drug": DRUGS, "Disease": DISEASES}
    return [
        {"start": found.start(), "end": found.end(), "label": label}
        for label, words in names.items()
        for found in re.finditer("|".join(words), text)
    ]


RECORD: dict[str, Callable[[str], dict[str, Any]]] = {
    "tokens": lambda text: {"text": text, "spans": spans_of(text)},
    "single": lambda text: {"text": text, "label": next(name for name in DISEASES if name in text)},
    "multiple": lambda text: {"text": text, "labels": [name for name in DRUGS if name in text]},
}


def write_folder(folder: Path, problem: str, train: int = 64, validation: int = 19) -> Path:
    folder.mkdir()
    for seed, (split, count) in enumerate({"train": train, "validation": validation}.items()):
        write_records(folder / f"{split}.jsonl", map(RECORD[problem], sentences(seed, count)))
    return folder


def chosen_for(problem: str, *arguments: Any) -> tuple[str, list[str]]:
    recipe, chosen = tuning(*arguments)
    return recipe, [*chosen, f"objective.kind={KINDS[problem]}"]


def objective_of(problem: str, *arguments: Any) -> Any:
    return make_objective(load_recipe(*chosen_for(problem, *arguments)))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of records for each problem."""
    folder = tmp_path_factory.mktemp("classification")
    return {problem: write_folder(folder / problem, problem) for problem in KINDS}


@pytest.fixture(scope="module")
def tagged(two_ranks: Ranks, records: dict[str, Path], hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 25 steps on two ranks that learns to find drugs and diseases."""
    run = tmp_path_factory.mktemp("tagged") / "run"
    two_ranks.run(tuning_case, *chosen_for("tokens", records["tokens"], hf, run, *LEARNING))
    return run


# Examples and losses


def test_labels_of_tokens_are_those_of_a_plain_aligner(records: dict[str, Path], hf: Path, tmp_path: Path) -> None:
    """By transformers' tokenizer: a character of a span makes its token a part of the span."""
    objective, tokenizer = (
        objective_of("tokens", records["tokens"], hf, tmp_path / "run"),
        AutoTokenizer.from_pretrained(hf),
    )
    names = ["O", "B-Disease", "I-Disease", "B-Drug", "I-Drug"]
    assert objective.config.labels == names
    ids, labels = objective.held_out()["records"].batch(range(19), 20)
    for row, text in enumerate(sentences(1, 19)):
        encoded = tokenizer(text, return_offsets_mapping=True)
        expected, before = [], None
        for start, end in encoded["offset_mapping"]:
            span = next((each for each in spans_of(text) if each["start"] < end and start < each["end"]), None)
            expected.append(f"{'I' if span == before else 'B'}-{span['label']}" if span else "O")
            before = span
        length = len(expected)
        assert ids[row, :length].tolist() == encoded["input_ids"] and (ids[row, length:] == 1).all()
        assert labels[row, 0] == IGNORE_INDEX and (labels[row, length:] == IGNORE_INDEX).all()
        assert [names[label] for label in labels[row, 1:length]] == expected[1:]
    assert (labels[19] == IGNORE_INDEX).all()


def test_long_texts_become_several_examples(records: dict[str, Path], hf: Path, tmp_path: Path) -> None:
    """Together they have all tokens, labels and spans of the record. Spans that cross into the next are counted."""
    whole, short = (
        objective_of("tokens", records["tokens"], hf, tmp_path / "run", f"train.context_length={length}")
        for length in (64, 9)
    )
    together = [(ids, label) for each in rows(whole) for ids, label in zip(each.ids[1:], each.labels[1:], strict=True)]
    apart = [(ids, label) for each in rows(short) for ids, label in zip(each.ids[1:], each.labels[1:], strict=True)]
    assert (
        apart == together
        and max(len(each.ids) for each in rows(short)) == 9
        and len(rows(short)) > 2 * len(rows(whole))
    )
    assert [span for each in rows(short) for span in each.answer.spans] == [
        span for each in rows(whole) for span in each.answer.spans
    ]
    assert whole.warnings() == []
    ends = [each.answer.offsets[-1][1] for each in rows(short)]
    crossing = sum(span.end > end for each, end in zip(rows(short), ends, strict=True) for span in each.answer.spans)
    total = sum(len(spans_of(text)) for text in sentences(1, 19))
    assert crossing > 0 and short.warnings() == [
        f"{crossing} of {total} validation spans cut a token or an example, so none can match exactly"
    ]


def rows(objective: Any) -> list[Any]:
    return list(objective.records("validation"))


@pytest.mark.parametrize("problem", KINDS)
def test_the_loss_is_that_of_transformers_on_the_same_batch(
    problem: str, records: dict[str, Path], hf: Path, tmp_path: Path
) -> None:
    """With the weights that a run starts from: those of the exported folder, and a new head."""
    objective = objective_of(problem, records[problem], hf, tmp_path / "run")
    model = objective.build_model()
    objective.load_weights(model, hf)
    theirs: Any = BioGptForTokenClassification if problem == "tokens" else BioGptForSequenceClassification
    twin = theirs(BioGptConfig(**model.hf_config())).eval()
    twin.load_state_dict(to_hf(model.state_dict(), model.config.vocab_size))
    pretrained: Any = BioGptForTokenClassification.from_pretrained(hf)  # its head is new too
    assert torch.equal(twin.biogpt.layers[1].fc1.weight, pretrained.biogpt.layers[1].fc1.weight)
    ids, labels = objective.batch(range(5, 13))
    given = labels.float() if problem == "multiple" else labels
    expected = twin(ids, attention_mask=(ids != 1).long(), labels=given).loss.item()
    assert model(ids, labels).item() / objective.counted_targets(range(5, 13)) == pytest.approx(expected, rel=1e-5)


# Runs


def f1(pairs: Any) -> float:
    """F1 in percent of pairs: whether an answer is right, and whether it is given."""
    return 200 * sum(right and given for right, given in pairs) / sum(right + given for right, given in pairs)


def plain_scores(problem: str, folder: Path) -> dict[str, float]:
    """The scores of an exported folder, by transformers alone: its Auto classes, and its pipeline for spans."""
    tokenizer, texts, pairs = AutoTokenizer.from_pretrained(folder), sentences(1, 19), []
    if problem == "tokens":
        model: Any = AutoModelForTokenClassification.from_pretrained(folder)
        find = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="simple")
        for text in texts:
            right = {(span["start"], span["end"], span["label"]) for span in spans_of(text)}
            groups: Any = find(text)
            given = {(group["start"], group["end"], group["entity_group"]) for group in groups}
            pairs += [(span in right, span in given) for span in right | given]
        return {"micro_f1": f1(pairs)}
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    several = model.config.problem_type == "multi_label_classification"
    assert several or model.config.problem_type == "single_label_classification"
    with torch.no_grad():
        logits = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    chosen = logits > 0 if several else logits == logits.amax(1, keepdim=True)
    names = list(model.config.label2id)
    for text, row in zip(texts, chosen.tolist(), strict=True):
        record = RECORD[problem](text)
        right = record["labels"] if several else [record["label"]]
        pairs.append([(name in right, given) for name, given in zip(names, row, strict=True)])
    of_names = [[row[index] for row in pairs] for index in range(len(names))]
    occurring = [each for each in of_names if any(right or given for right, given in each)]
    first = "micro_f1" if several else "accuracy"  # which is the F1 of single answers
    micro = f1([pair for each in of_names for pair in each])
    return {first: micro, "macro_f1": sum(map(f1, occurring)) / len(occurring)}


def check_learned(problem: str, run: Path, labels: list[str], folder: Path) -> None:
    """A run's recorded scores, early and at its end, are those of transformers on its exports; and it has learned."""
    for step in (EARLY, 25):
        out = folder / f"hf-{step}"
        counts = export(run, out, None, str(step))["counts"]
        for name, score in plain_scores(problem, out).items():
            assert metrics(run, f"validation/{name}")[step] == pytest.approx(score, abs=1e-9), (step, name)
            assert counts["held_out"][name] == metrics(run, f"validation/{name}")[step]
            print(f"{problem}: {name} by step: {metrics(run, f'validation/{name}')}")
            assert (score > 90) == (step == 25)
        config = json.loads((out / "config.json").read_text())
        assert config["id2label"] == {str(index): label for index, label in enumerate(labels)}
        assert config["label2id"] == {label: index for index, label in enumerate(labels)}
        check_usage(out, problem)


def check_usage(hf: Path, problem: str) -> None:
    """The usage in the model card runs in its folder and answers with the run's labels."""
    card, printed, names = (hf / "README.md").read_text(), io.StringIO(), dict[str, Any]()
    with contextlib.chdir(hf), contextlib.redirect_stdout(printed):
        (usage,) = python_blocks(card)
        exec(usage, names)
    task = "token-classification" if problem == "tokens" else "text-classification"
    assert ModelCard(card).data.to_dict()["pipeline_tag"] == names["classify"].task == task
    assert "fine-tuned with biogpt-pretrain" in card and printed.getvalue().startswith("[")


def test_a_run_learns_to_find_spans_and_its_export_finds_the_same(tagged: Path, tmp_path: Path) -> None:
    check_learned("tokens", tagged, ["O", "B-Disease", "I-Disease", "B-Drug", "I-Drug"], tmp_path)


@pytest.mark.parametrize("problem", ["single", pytest.param("multiple", marks=pytest.mark.slow)])
def test_a_run_learns_to_classify_texts(
    problem: str, one_rank: Ranks, records: dict[str, Path], hf: Path, tmp_path: Path
) -> None:
    one_rank.run(tuning_case, *chosen_for(problem, records[problem], hf, tmp_path / "run", *LEARNING))
    check_learned(problem, tmp_path / "run", sorted(DISEASES if problem == "single" else DRUGS), tmp_path)


def test_predictions_do_not_depend_on_the_number_of_ranks(
    one_rank: Ranks, two_ranks: Ranks, records: dict[str, Path], hf: Path, tmp_path: Path
) -> None:
    """Scores of weights that guess, on 19 examples in batches of 4: the last batches are not full, and one is empty."""
    arguments = chosen_for("multiple", records["multiple"], hf, tmp_path / "run")
    found = [ranks.run(scores_case, *arguments)[0] for ranks in (one_rank, two_ranks)]
    assert found[0] == found[1] and 0 < found[0]["micro_f1"] < 90


def scores_case(recipe: str, chosen: list[str]) -> dict[str, float]:
    objective = make_objective(load_recipe(recipe, chosen))
    return held_out_loss(objective.build_model().eval(), objective.held_out(), 4, torch.device("cpu"))


def test_a_resumed_run_gives_the_same_bits(
    two_ranks: Ranks, tagged: Path, records: dict[str, Path], hf: Path, tmp_path: Path
) -> None:
    shutil.copytree(tagged, tmp_path / "run")
    for checkpoint in list_checkpoints(tmp_path / "run")[:2]:
        shutil.rmtree(checkpoint)
    (tmp_path / "run" / "latest").write_text("step-0000015")
    two_ranks.run(tuning_case, *chosen_for("tokens", records["tokens"], hf, tmp_path / "run", *LEARNING))
    for name in ("model", "exp_avg", "exp_avg_sq"):
        one, other = (
            run / "checkpoints" / "step-0000025" / f"{name}.safetensors" for run in (tmp_path / "run", tagged)
        )
        assert one.read_bytes() == other.read_bytes()
    one, other = (read_state(run / "checkpoints" / "step-0000025") for run in (tmp_path / "run", tagged))
    assert one["best"] == other["best"] and one["best"]["score"] == "micro_f1"


# The best checkpoint


def test_the_best_checkpoint_has_the_highest_score(tmp_path: Path) -> None:
    """The loss decides between equal scores, and alone where nothing is scored."""
    scored = {2: (0.9, 50.0), 4: (0.5, 70.0), 6: (0.4, 70.0), 8: (0.1, 60.0), 10: (float("nan"), 90.0)}
    for step, (loss, f1) in scored.items():
        held_out = {"step": step, "score": "micro_f1", "loss": loss, "micro_f1": f1}
        write_checkpoint(tmp_path / "run", step, {"model": {"a": torch.zeros(2)}}, {"step": step, "held_out": held_out})
        plain = {"step": step, "loss": loss}
        write_checkpoint(tmp_path / "plain", step, {"model": {"a": torch.zeros(2)}}, {"step": step, "held_out": plain})
    assert step_of(choose_checkpoint(tmp_path / "run", "best")) == 6
    assert step_of(choose_checkpoint(tmp_path / "plain", "best")) == 8
    prune(tmp_path / "run", keep_last=1, keep_every_steps=0, keep_best=True)
    assert [step_of(each) for each in list_checkpoints(tmp_path / "run")] == [10, 6]


# Mistakes


@pytest.mark.parametrize(
    ("problem", "record", "said"),
    [
        (
            "tokens",
            {"text": "abc", "spans": [{"start": 1, "end": 9, "label": "X"}]},
            "the span 1 to 9 (X) is not inside",
        ),
        (
            "tokens",
            {"text": "abc", "spans": [{"start": 0, "end": 2, "label": "X"}, {"start": 1, "end": 3, "label": "Y"}]},
            "the spans 0 to 2 (X) and 1 to 3 (Y) overlap",
        ),
        ("tokens", {"text": "abc", "spans": [{"start": 0, "end": "2"}]}, 'a span must be {"start": 0, "end": 7,'),
        ("tokens", {"text": "abc", "spans": [3]}, 'a span must be {"start": 0, "end": 7,'),
        ("tokens", {"text": "abc"}, 'has no "spans"'),
        ("single", {"text": "abc", "labels": ["asthma"]}, 'needs "label", a text, as the first record'),
        ("multiple", {"text": "abc", "labels": "Dravonol"}, 'needs "labels", a list of texts, as the first record'),
        ("multiple", {"text": "abc", "labels": [1]}, 'needs "labels", a list of texts, as the first record'),
        ("multiple", {"labels": []}, 'has no "text"'),
    ],
)
def test_a_bad_record_is_one_line_that_names_it(
    problem: str, record: dict[str, Any], said: str, hf: Path, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "records", problem, 3, 3)
    with (folder / "train.jsonl").open("a") as stream:
        stream.write(json.dumps(record))
    with pytest.raises(UserError) as caught:
        objective_of(problem, folder, hf, tmp_path / "run").check()
    assert str(caught.value).startswith(f"{folder / 'train.jsonl'}: line 4: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("problem", "record"),
    [
        ("tokens", {"text": "abc", "spans": [{"start": 0, "end": 2, "label": "Gene"}]}),
        ("single", {"text": "abc", "label": "Gene"}),
        ("multiple", {"text": "abc", "labels": ["Gene"]}),
    ],
)
def test_a_label_that_training_lacks_is_named(problem: str, record: dict[str, Any], hf: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "records", problem)
    write_records(folder / "validation.jsonl", [record])
    with pytest.raises(UserError, match=r"validation.jsonl: line 1: no record of .*train.jsonl has the label 'Gene'"):
        objective_of(problem, folder, hf, tmp_path / "run").check()
    write_records(folder / "train.jsonl", [{"text": "abc", "spans": [], "labels": []}])
    if problem != "single":
        with pytest.raises(UserError, match=r"train.jsonl: its records have too few labels"):
            objective_of(problem, folder, hf, tmp_path / "run")
