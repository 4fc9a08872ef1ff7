"""`biogpt benchmark`: scores of texts against transformers, one by one and without padding; tables; mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
)  # fmt: skip
from typer.testing import CliRunner

from data.common.files import UserError
from launch.cli import app
from pretrain.answers import Answer, Scoring, choose, encode_pairs, open_language_model, target_scores, write
from pretrain.benchmark import benchmark, scores_row
from pretrain.export.card import add_scores
from pretrain.tasks import TASKS
from pretrain.tasks.bc5cdr_relations import ChemicalDiseaseRelations
from pretrain.tasks.hoc import HallmarksOfCancer
from pretrain.tasks.pubmedqa import PubMedQA
from tests.pretrain.tasks.invented import WRITE
from tests.pretrain.test_bits_per_byte import save_biogpt, save_gpt2

CONTEXT = 64
PROMPTS = [
    "Does it help? Answer",
    "It is",
    "The question is whether Dravonin causes itch in rats. " * 3 + "It does, so",
]
TARGETS = ["no", "no effect", "no effect.", "yes.", "a rather long answer|and another."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of two kinds with random weights, and the invented files of all benchmarks."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "data").mkdir()
    for write_files in WRITE.values():
        write_files(folder / "data")
    return {
        "biogpt": save_biogpt(folder / "biogpt", fast=True, context=CONTEXT),
        "gpt2": save_gpt2(folder / "gpt2", context=CONTEXT),
        "blenderbot": save_blenderbot(folder / "blenderbot"),
        "data": folder / "data",
    }


def save_blenderbot(folder: Path) -> Path:
    """An encoder-decoder with BioGPT's tokenizer, as exports have it."""
    save_biogpt(folder, fast=True, context=CONTEXT)
    (folder / "model.safetensors").unlink()
    config = BlenderbotConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)), d_model=16, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=CONTEXT, init_std=0.5, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None, encoder_no_repeat_ngram_size=0,
    )  # fmt: skip
    BlenderbotForConditionalGeneration(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def plain_scores_of_encoder_decoder(folder: Path, prompt: str, scoring: Scoring) -> list[float]:
    """As `plain_scores`. The target has an end, which counts."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    source, scores = tokenizer(prompt)["input_ids"][:CONTEXT], []
    for target in TARGETS:
        ids = [*tokenizer(target, add_special_tokens=False)["input_ids"], 2]
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[2, *ids[:-1]]])).logits
        total = float(logits[0].double().log_softmax(-1)[range(len(ids)), ids].sum())
        scores.append(total if scoring == "sum" else total / len(ids))
    return scores


@torch.no_grad()
def plain_scores(folder: Path, prompt: str, scoring: Scoring) -> list[float]:
    """The score of each target: one row without padding, a token at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    before, *texts = (tokenizer(text)["input_ids"] for text in (prompt, *(f"{prompt} {each}" for each in TARGETS)))
    surplus = max(max(map(len, texts)) - 1 - CONTEXT, 0)
    begin = 1 if folder.name == "biogpt" else 0  # the beginning of a long prompt is left out, but not BioGPT's </s>
    scores = []
    for ids in texts:
        assert ids[: len(before)] == before
        rest = ids[:begin] + ids[begin + surplus :]
        log_probabilities = model(torch.tensor([rest[:-1]])).logits[0].double().log_softmax(-1)
        places = range(len(before) - surplus, len(rest))
        total = sum(float(log_probabilities[place - 1, rest[place]]) for place in places)
        scores.append(total if scoring == "sum" else total / len(places))
    return scores


@pytest.mark.parametrize("kind", ["biogpt", "gpt2", "blenderbot"])
def test_scores_equal_those_of_transformers_one_by_one(kind: str, folders: dict[str, Path]) -> None:
    """Also where one label is the beginning of another, and where a prompt is longer than the context."""
    model = open_language_model(folders[kind])
    plain = plain_scores_of_encoder_decoder if kind == "blenderbot" else plain_scores
    assert len(model.tokenizer(PROMPTS[2])["input_ids"]) > CONTEXT
    for scoring in ("sum", "mean"):
        scores = target_scores(model, PROMPTS, TARGETS, scoring)
        for prompt, row in zip(PROMPTS, scores, strict=True):
            assert row == pytest.approx(plain(folders[kind], prompt, scoring), abs=1e-4)
            assert len({round(score, 3) for score in row}) == len(TARGETS)
            if scoring == "sum" and kind != "blenderbot":  # its targets have an end
                assert row[0] > row[1] > row[2]  # each is the beginning of the next


def test_a_target_after_a_full_stop_leaves_the_prompt_as_it_is(folders: dict[str, Path]) -> None:
    """Moses would join the stop to its word before a small letter."""
    tokenizer = AutoTokenizer.from_pretrained(folders["biogpt"])
    ((prompt, target),) = encode_pairs(tokenizer, [("It ends.", "the rest.")])
    assert prompt == tokenizer("It ends.")["input_ids"] != tokenizer("It ends. the rest.")["input_ids"][: len(prompt)]
    assert target == tokenizer("the rest.", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("task_class", [PubMedQA, HallmarksOfCancer])
def test_the_likeliest_choice_is_taken(task_class: type, folders: dict[str, Path]) -> None:
    task, scored = task_class(folders["data"], "test"), []
    answers = choose(open_language_model(folders["gpt2"]), task, "mean", lambda: scored.append(1))
    assert len(answers) == len(task.items) and len(scored) == len(task.items) * len(task.choices())
    for item, answer in zip(task.items, answers, strict=True):
        best = max(task.choices(), key=lambda choice: answer.scores[task.target(choice)])
        assert answer.answers == best
        (row,) = target_scores(open_language_model(folders["gpt2"]), [item.prompt], list(answer.scores), "mean")
        assert row == pytest.approx(list(answer.scores.values()), abs=1e-4)
        break  # one is enough: the others went through the same batches
    if task_class is HallmarksOfCancer:
        assert ("inducing angiogenesis", "resisting cell death") in task.choices()


@pytest.mark.parametrize("kind", ["biogpt", "gpt2"])
def test_texts_are_written_as_transformers_writes_each_alone(kind: str, folders: dict[str, Path]) -> None:
    task = ChemicalDiseaseRelations(folders["data"], "test")
    answers = write(open_language_model(folders[kind]), task, lambda: None)
    model: Any = AutoModelForCausalLM.from_pretrained(folders[kind])
    tokenizer: Any = AutoTokenizer.from_pretrained(folders[kind])
    new_tokens = CONTEXT * 3 // 8
    for item, answer in zip(task.items, answers, strict=True):
        ids = tokenizer(item.prompt, return_tensors="pt")["input_ids"]
        assert ids.shape[1] <= CONTEXT + 1 - new_tokens
        written = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        assert answer.text == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert answer.answers == task.parse(answer.text)


def test_a_table_has_the_figures_of_the_written_answers(folders: dict[str, Path], tmp_path: Path) -> None:
    out, data, model = tmp_path / "answers.jsonl", folders["data"], folders["gpt2"]
    arguments = ["benchmark", "pubmedqa", str(model), "--data", str(data), "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [item.id for item in PubMedQA(data, "test").items]
    accuracy = 100 * sum(line["right"] == line["answers"] for line in lines) / len(lines)
    (row,) = (line for line in done.output.splitlines() if line.startswith(f"{model} "))
    assert row.split()[1:3] == ["(sum)", f"{accuracy:.1f}"]

    better = tmp_path / "better.jsonl"  # three of the wrong answers are put right
    for line in [line for line in lines if line["right"] != line["answers"]][:3]:
        line["answers"] = line["right"]
    better.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    header, _, *rows = benchmark("pubmedqa", better, data, "sum", out, None).splitlines()
    assert header == "pubmedqa: test split, 30 items"
    assert [row.split()[0] for row in rows] == [str(better), str(out), "difference"]
    assert rows[2].split()[1] == "+10.0" and rows[0].split()[1] == "(sum)"
    assert f"{model}: does not say whether these items were in its training text" in done.output
    same = benchmark("pubmedqa", out, data, "sum", out, None).splitlines()[-1]
    assert same.split() == ["difference", *(["+0.0", "+0.0", "to", "+0.0"] * 2)]


def test_the_figures_stand_in_the_model_card_each_task_once(folders: dict[str, Path], tmp_path: Path) -> None:
    """In front of the recipe, as in the table; whatever else the card says stays."""
    card = tmp_path / "README.md"
    card.write_text("# Model\n\nText with | bars.\n\n## Recipe\n\n{}\n")
    add_scores(card, [["hoc test", "315", "micro F1 1.0 (0.5 to 2.0)"]])
    for answer, accuracy in (("no", "0.0 (0.0 to 0.0)"), ("yes", "100.0 (100.0 to 100.0)")):
        task = PubMedQA(folders["data"], "test")
        task.items = [item for item in task.items if item.answers == ("yes",)]
        add_scores(card, [scores_row(task, [Answer((answer,), scoring="sum") for _ in task.items])])
        before, _, after = card.read_text().partition("\n\n## Scores\n\n")
        assert before == "# Model\n\nText with | bars." and after.endswith("\n\n## Recipe\n\n{}\n")
        header, _, first, second = after.partition("\n\n## Recipe")[0].splitlines()
        assert header == "| benchmark | items | figures in percent, 95 % interval |"
        assert first == "| hoc test | 315 | micro F1 1.0 (0.5 to 2.0) |"
        assert second.startswith(f"| pubmedqa test, sum | {len(task.items)} | accuracy {accuracy}, macro F1 ")
    card.write_text("# Mine\n")
    with pytest.raises(UserError, match="has no section Recipe"):
        add_scores(card, [])
    with pytest.raises(UserError, match=r"--card: .* has no README.md"):
        benchmark("pubmedqa", folders["gpt2"], folders["data"], "sum", None, None, card=True)


def test_mistakes_are_named_before_work_starts(folders: dict[str, Path], tmp_path: Path) -> None:
    data, model, absent = folders["data"], folders["gpt2"], tmp_path / "absent"
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "7", "right": ["yes"], "answers": ["no"]}\n' * 30)
    short = tmp_path / "short.jsonl"
    short.write_text('{"id": "100", "right": ["yes"], "answers": ["no"]}\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text("")
    for arguments, culprit in (
        (("music", model, data, "sum", None, None), "music: no such benchmark; choose from pubmedqa, hoc"),
        (("pubmedqa", model, data, "median", None, None), "--score median: choose from sum, mean"),
        (("pubmedqa", model, absent, "sum", None, None), f"{absent}: holds neither ori_pqal.json"),
        (("pubmedqa", absent, data, "sum", None, None), str(absent)),
        (("pubmedqa", absent, data, "sum", other, None), f"{other}: line 1: is not item 100 of pubmedqa"),
        (("pubmedqa", short, data, "sum", None, None), f"{short}: holds 1 items, but pubmedqa has 30"),
        (("pubmedqa", model, data, "sum", None, absent / "out.jsonl"), f"--out {absent / 'out.jsonl'}"),
        (("pubmedqa", tmp_path / "run", data, "sum", None, None), "is a run; export it first"),
        (
            ("bc5cdr-entities", model, data, "sum", None, None),
            "is a GPT2LMHeadModel, which cannot do bc5cdr-entities",
        ),
        (
            ("bc5cdr-relations", folders["blenderbot"], data, "sum", None, None),
            "is a BlenderbotForConditionalGeneration, which cannot do bc5cdr-relations",
        ),
    ):
        with pytest.raises(UserError) as error:
            benchmark(*arguments)
        assert culprit in str(error.value) and "\n" not in str(error.value)


def test_every_task_says_its_name() -> None:
    assert all(name == task.name for name, task in TASKS.items())
