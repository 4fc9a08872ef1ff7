"""Sequence to sequence with a BERT's folder as the encoder: training, resume, export, and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, BertModel, EncoderDecoderModel

from data.common.files import UserError
from model.bert_generation import BertEncoderDecoder
from pretrain.checkpoint import newest_checkpoint
from pretrain.export.folder import export
from pretrain.generate import Decoding, Prompt, generate
from pretrain.objectives.bert_source import BertSource
from pretrain.objectives.kinds import make_objective
from pretrain.recipe import load_recipe
from tests.pretrain.berts import save_bert
from tests.pretrain.runs import metrics
from tests.pretrain.test_bits_per_byte import save_biogpt
from tests.pretrain.tuning import RECIPE, prompts_and_targets, tuning_case, write_records
from tests.ranks import Ranks

STEPS = 6
SHORT = ['objective.kind="source_target"', f"train.steps={STEPS}", "checkpoint.every_steps=3", "model.layerdrop=0.2"]


def sources_and_targets(seed: int, count: int) -> list[dict[str, str]]:
    """Sources that name a drug and a disease, one of them with a special token of BERT's as text, and the targets."""
    found = [
        {"source": each["prompt"], "target": each["target"].replace(" type 2 ", " ").split()[-1][:4]}
        for each in prompts_and_targets(seed, count)
    ]
    found[0]["source"] += " [PAD] [SEP]"
    return found


def write_given(folder: Path) -> Path:
    """The folders that a run is made of: records, bert/ and biogpt/, whose decoder is less wide."""
    (folder / "records").mkdir(parents=True)
    for seed, (split, count) in enumerate({"train": 24, "validation": 7}.items()):
        write_records(folder / "records" / f"{split}.jsonl", sources_and_targets(seed, count))
    save_bert(folder / "bert")
    save_biogpt(folder / "biogpt", fast=True, context=48)
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_given(tmp_path_factory.mktemp("given") / "folders")


def chosen(given: Path, run: Path, *more: str) -> tuple[str, list[str]]:
    """A very small run: its recipe, in a file beside the run, and its settings."""
    path = run.parent / "seq2seq.toml"
    path.write_text(RECIPE)
    folders = [f"data.records={given / 'records'}", f"model.encoder={given / 'bert'}", f"train.run={run}"]
    return str(path), [*SHORT, *folders, f"model.weights={given / 'biogpt'}", *more]


@pytest.fixture(scope="module")
def trained(two_ranks: Ranks, given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("bert-source") / "run"
    two_ranks.run(tuning_case, *chosen(given, run))
    return run


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    export(trained, trained.parent / "hf")
    return trained.parent / "hf"


class Started(BertSource):
    """Its model has the weights that a new run starts with."""

    def build_model(self) -> BertEncoderDecoder:
        model = super().build_model()
        self.load_encoder(model)
        self.load_weights(model, Path(self._recipe.model.weights or ""))
        return model


def test_a_run_starts_from_both_folders(given: Path, tmp_path: Path) -> None:
    """The encoder's hidden states for the ids of a record are those of transformers' BertModel."""
    objective = Started(load_recipe(*chosen(given, tmp_path / "run")))
    ids, labels = objective.held_out()["records"].batch(range(7), 8)
    of_source = AutoTokenizer.from_pretrained(given / "bert")
    of_target = AutoTokenizer.from_pretrained(given / "biogpt")
    bert, real = BertModel.from_pretrained(given / "bert").eval(), ids != 0
    for row, record in enumerate(sources_and_targets(1, 7)):
        source = of_source(record["source"], split_special_tokens=True)["input_ids"][1:-1][:48]  # no [CLS], no [SEP]
        assert ids[row].tolist() == [*source, *[0] * (ids.shape[1] - len(source))]
        target = [*of_target(record["target"], add_special_tokens=False)["input_ids"], 2]
        assert labels[row].tolist() == [*target, *[-100] * (labels.shape[1] - len(target))]
    assert not real[7].any() and (labels[7] == -100).all()
    found = objective.build_model().eval().encoder(ids[:7], real[:7])
    expected = bert(ids[:7], attention_mask=real[:7].long()).last_hidden_state
    assert torch.allclose(found[real[:7]], expected[real[:7]], atol=1e-5, rtol=0)


def test_the_export_gives_transformers_the_recorded_loss_by_the_tokenizers_in_it(trained: Path, exported: Path) -> None:
    model: Any = EncoderDecoderModel.from_pretrained(exported).eval()
    of_source = AutoTokenizer.from_pretrained(exported, subfolder="encoder")
    of_target = AutoTokenizer.from_pretrained(exported)
    total, count = 0.0, 0
    for record in sources_and_targets(1, 7):
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_tensors": "pt"}
        source = of_source(record["source"], truncation=True, max_length=48, **options)
        labels = torch.tensor([[*of_target(record["target"], add_special_tokens=False)["input_ids"], 2]])
        with torch.no_grad():
            logits = model(source["input_ids"], attention_mask=source["attention_mask"], labels=labels).logits
        total += F.cross_entropy(logits[0], labels[0], reduction="sum").item()
        count += labels.numel()
    assert total / count == pytest.approx(metrics(trained, "validation/loss")[STEPS], abs=1e-5)
    assert sorted(path.name for path in (exported / "encoder").iterdir()) == [
        "config.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]


def test_the_lines_of_the_card_run(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (exported / "README.md").read_text()
    assert str(exported.parent) not in card
    monkeypatch.chdir(exported)
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out


def test_the_export_generates_the_same_with_its_cache_as_without(exported: Path) -> None:
    model: Any = EncoderDecoderModel.from_pretrained(exported)
    of_source = AutoTokenizer.from_pretrained(exported / "encoder")
    texts = [record["source"] for record in sources_and_targets(1, 7)]
    options: dict[str, Any] = {"truncation": True, "max_length": 48, "padding": True, "return_tensors": "pt"}
    source = of_source(texts, add_special_tokens=False, **options)
    given = {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"]}
    for beams in (1, 2):
        made = (model.generate(**given, use_cache=cache, max_new_tokens=8, num_beams=beams) for cache in (True, False))
        assert torch.equal(*made)


def test_biogpt_generate_writes_the_same_with_the_run_and_with_its_export(trained: Path, exported: Path) -> None:
    """As transformers does with the two tokenizers, one source at a time."""
    texts = ["Kalitinib causes fever. Which?", "Which [SEP] asthma", "?"]
    model: Any = EncoderDecoderModel.from_pretrained(exported)
    of_source, of_target = (AutoTokenizer.from_pretrained(folder) for folder in (exported / "encoder", exported))
    expected = []
    for text in texts:
        ids = of_source(text, add_special_tokens=False, split_special_tokens=True, return_tensors="pt")["input_ids"]
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
        expected.append(of_target.decode(made[0], skip_special_tokens=True))
    for folder in (trained, exported):
        prompts = [Prompt(text, "the prompt") for text in texts]
        assert generate(folder, prompts, Decoding(max_new_tokens=8)) == expected


def test_a_resumed_run_gives_the_same_bits_without_the_folders_that_it_started_from(
    two_ranks: Ranks, trained: Path, given: Path, tmp_path: Path
) -> None:
    two_ranks.run(tuning_case, *chosen(given, tmp_path / "run", "train.stop_after_minutes=0.0000001"))
    assert newest_checkpoint(tmp_path / "run")[0] == tmp_path / "run" / "checkpoints" / "step-0000001"
    for name in ("bert", "biogpt"):
        (given / name).rename(given / f"{name}-away")
    try:
        two_ranks.run(tuning_case, str(tmp_path / "run" / "recipe.toml"), ["train.stop_after_minutes=0"])
    finally:
        for name in ("bert", "biogpt"):
            (given / f"{name}-away").rename(given / name)
    for name in ("model", "exp_avg", "exp_avg_sq"):
        paths = (
            run / "checkpoints" / f"step-000000{STEPS}" / f"{name}.safetensors" for run in (tmp_path / "run", trained)
        )
        one, other = (path.read_bytes() for path in paths)
        assert one == other


def test_another_tokenizer_or_encoder_is_refused_at_a_resume(
    one_rank: Ranks, trained: Path, given: Path, tmp_path: Path
) -> None:
    recipe, settings = chosen(given, trained)
    save_bert(tmp_path / "bert")
    with pytest.raises(AssertionError, match="has given encoder"):
        one_rank.run(tuning_case, recipe, [*settings, f"model.encoder={tmp_path / 'bert'}"])
    vocabulary = given / "bert" / "vocab.txt"
    before = vocabulary.read_text()
    vocabulary.write_text(before.replace("kalitinib", "dravonol"))
    try:
        with pytest.raises(AssertionError, match="has data source_tokenizer"):
            one_rank.run(tuning_case, recipe, settings)
    finally:
        vocabulary.write_text(before)


def mistake_of(given: Path, folder: Path, *more: str) -> str:
    with pytest.raises(UserError) as caught:
        make_objective(load_recipe(*chosen(given, folder / "run", *more))).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_one_line(given: Path, tmp_path: Path) -> None:
    assert 'model.encoder: objective.kind = "prompt_target" does not use it' in mistake_of(
        given, tmp_path, 'objective.kind="prompt_target"'
    )
    for key in ("num_encoder_layers=2", "share_layers=true"):
        said = f"model.{key.split('=')[0]}: the folder model.encoder decides the encoder's layers"
        assert said in mistake_of(given, tmp_path, f"model.{key}")
    assert "absent: no such folder" in mistake_of(given, tmp_path, f"model.encoder={tmp_path / 'absent'}")
    short = save_bert(tmp_path / "short", max_position_embeddings=40)
    said = mistake_of(given, tmp_path, f"model.encoder={short}")
    assert said.startswith("train.context_length = 48: longer than the max_position_embeddings 40 of model.encoder")
    records = tmp_path / "records"
    records.mkdir()
    write_records(records / "train.jsonl", [{"source": "asthma", "target": "b"}, {"source": " ", "target": "b"}])
    said = mistake_of(given, tmp_path, f"data.records={records}")
    assert said.startswith(f"{records / 'train.jsonl'}: line 2: the source has no token by the tokenizer of")


def test_a_bert_generation_folder_and_drawn_weights_of_the_decoder(given: Path, tmp_path: Path) -> None:
    """`data.tokenizer` instead of `model.weights`; the encoder is as wide as the decoder."""
    folder = save_bert(tmp_path / "bert", generation=True, hidden_size=16, num_attention_heads=2)
    path, settings = chosen(given, tmp_path / "run", f"model.encoder={folder}", f"data.tokenizer={given / 'biogpt'}")
    small = ["hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=32"]
    small = [f"model.{each}" for each in [*small, "max_position_embeddings=48"]]
    recipe = load_recipe(path, [each for each in [*settings, *small] if "model.weights" not in each])
    objective: Any = make_objective(recipe)
    model = objective.build_model()
    objective.load_encoder(model)
    loss = model(*objective.batch(range(4)))
    loss.backward()
    assert loss.isfinite() and json.loads(json.dumps(model.hf_config()))["encoder"]["hidden_size"] == 16
    assert model.encoder.layers[0].qkv_proj.weight.grad.abs().sum() > 0
