"""Export: what transformers loads is what was trained, or no folder appears."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BioGptForCausalLM, BioGptTokenizer

from data.common.files import UserError, read_manifest
from data.shards.blocks import TokenStream
from data.text.tokenizer import Tokenizer
from model import decoder as decoder_module
from pretrain import load
from pretrain.checkpoint import newest_checkpoint, read_state
from pretrain.export.folder import export
from pretrain.inference import evaluate_folder, generate
from tests.pretrain.runs import metrics, run_case, settings, zero_3_settings
from tests.ranks import Ranks

LAYOUTS = [
    ("fp32", 1, 1e-4),
    ("bf16", 3, 2e-2),
    *(pytest.param("fp32", stage, 1e-4, marks=pytest.mark.slow) for stage in (0, 2, 3)),
    pytest.param("bf16", 1, 2e-2, marks=pytest.mark.slow),
]


def trained(ranks: Ranks, shards: Path, folder: Path, precision: str, stage: int) -> Path:
    run = folder / "run"
    chosen = zero_3_settings(folder) if stage == 3 else [f"deepspeed.stage={stage}"]
    ranks.run(run_case, settings(shards, run, "train.steps=6", f"train.precision={precision}", *chosen))
    return run


@pytest.fixture(scope="module")
def run(one_rank: Ranks, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(one_rank, sample_folder / "shards", tmp_path_factory.mktemp("export"), "fp32", 1)


@pytest.fixture(scope="module")
def hf(run: Path) -> Path:
    export(run, run.parent / "hf")
    return run.parent / "hf"


def plain_loss(hf: Path, shards: Path) -> float:
    """The held-out loss by plain transformers over the same blocks, in nats a token."""
    model = BioGptForCausalLM.from_pretrained(hf).eval()
    stream = TokenStream(shards, read_manifest(shards, "shards"), "validation")
    tokens, total = [2, *stream.read(0, len(stream)).tolist()], 0.0
    for start in range(0, len(stream), 64):
        piece = torch.tensor([tokens[start : start + 65]])
        with torch.no_grad():
            loss = model(piece[:, :-1]).logits.log_softmax(-1).gather(2, piece[:, 1:, None])
        total -= loss.sum().item()
    return total / len(stream)


@pytest.mark.parametrize(("precision", "stage", "bound"), LAYOUTS)
def test_transformers_finds_the_loss_that_the_run_recorded(
    precision: str, stage: int, bound: float, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    run = trained(two_ranks, sample_folder / "shards", tmp_path, precision, stage)
    export(run, tmp_path / "hf")
    recorded = metrics(run, "validation/loss")[6]
    difference = abs(plain_loss(tmp_path / "hf", sample_folder / "shards") - recorded)
    print(f"{precision} stage {stage}: held-out loss differs by {difference:.2e}")
    assert difference <= bound


def test_the_folder_loads_by_auto_classes_and_gives_the_shards_ids(hf: Path, sample_folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hf), AutoTokenizer.from_pretrained(hf)
    assert type(model) is BioGptForCausalLM and tokenizer.is_fast
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 64
    assert model.config.vocab_size == len(tokenizer)
    text = "Velmab improves survival in mice (P < 0.001)."
    assert tokenizer(text).input_ids == [2, *Tokenizer(sample_folder / "tokenizer").encode(text)]
    assert model.generation_config.eos_token_id == 2 and model.generation_config.pad_token_id == 1


def test_the_model_card_tells_data_recipe_and_losses(hf: Path, run: Path, sample_folder: Path) -> None:
    card = (hf / "README.md").read_text()
    counts = read_manifest(sample_folder / "shards", "shards")["counts"]
    assert f"{counts['train']['documents']:,}" in card and f"{metrics(run, 'validation/loss')[6]:.4f}" in card
    assert '"learning_rate": 0.003' in card
    assert str(run.parent) not in card  # no path of the machine it was made on
    assert read_manifest(hf, "hf")["files"].keys() >= {"config.json", "model.safetensors", "vocab.json", "README.md"}


def test_a_tokenizer_longer_than_the_vocabulary_is_said_in_the_card(hf: Path, run: Path, tmp_path: Path) -> None:
    """As with BioGPT's published tokenizer."""
    assert "above the model's vocabulary" not in (hf / "README.md").read_text()
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {"qqx": len(content["model"]["vocab"]), "qqy": len(content["model"]["vocab"]) + 1}
    path.write_text(json.dumps(content))
    export(tmp_path / "run", tmp_path / "hf")
    assert "`len(tokenizer)` is 2 above the model's vocabulary" in (tmp_path / "hf" / "README.md").read_text()


def test_a_wrong_map_of_weights_is_found_and_nothing_appears(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q and k exchanged: the shapes fit, the model is another."""
    right = decoder_module.to_hf

    def exchanged(state: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
        names = {"q_proj": "v_proj", "v_proj": "q_proj"}
        return {
            next((name.replace(a, b) for a, b in names.items() if a in name), name): tensor
            for name, tensor in right(state, vocab_size).items()
        }

    monkeypatch.setattr(decoder_module, "to_hf", exchanged)
    with pytest.raises(RuntimeError, match="logits differ"):
        export(run, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_was_not_recorded_is_found(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = read_state(newest_checkpoint(run)[0] or tmp_path)
    state["held_out"]["loss"] += 2e-4
    monkeypatch.setattr(load, "read_state", lambda _: state)
    with pytest.raises(RuntimeError, match="held-out loss is"):
        export(run, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_run_stopped_between_evaluations_is_compared_by_its_probe(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = read_state(newest_checkpoint(run)[0] or tmp_path)
    state["held_out"]["step"] = 3
    monkeypatch.setattr(load, "read_state", lambda _: state)
    counts = export(run, tmp_path / "hf")["counts"]
    assert counts["recorded_loss"] == state["probe"]["loss"] and counts["held_out"]["tokens"] == 8 * 64
    state["probe"]["loss"] += 2e-4
    with pytest.raises(RuntimeError, match="held-out loss is"):
        export(run, tmp_path / "other")


def test_export_again_does_nothing_and_mistakes_are_named(run: Path, hf: Path, tmp_path: Path) -> None:
    before = (hf / "model.safetensors").stat().st_mtime_ns
    export(run, hf)
    assert (hf / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="not a run folder"):
        export(hf, tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a finished hf folder"):
        export(run, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_evaluate_agrees_on_run_folder_shards_and_corpus(run: Path, hf: Path, sample_folder: Path) -> None:
    shards, corpus = sample_folder / "shards", sample_folder / "corpus"
    results = [
        evaluate_folder(run, shards, None, "test"),
        evaluate_folder(hf, shards, None, "test"),
        evaluate_folder(hf, None, corpus, "test"),
    ]
    assert results[0]["tokens"] == read_manifest(shards, "shards")["counts"]["test"]["tokens"]
    for result in results[1:]:
        assert result["tokens"] == results[0]["tokens"]
        assert math.isclose(result["loss"], results[0]["loss"], abs_tol=1e-5)
        assert math.isclose(result["bits_per_byte"], results[0]["bits_per_byte"], abs_tol=1e-5)


def test_evaluate_refuses_shards_of_another_tokenizer(hf: Path, sample_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "hf"
    shutil.copytree(hf, other)
    vocabulary = json.loads((other / "vocab.json").read_text())
    (other / "vocab.json").write_text(json.dumps(vocabulary))  # the same content, other bytes
    (other / "manifest.json").unlink()
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate_folder(other, sample_folder / "shards", None, "test")


def test_a_damaged_or_incomplete_folder_is_named(hf: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "vocab.json", "config.json"):
        copy = tmp_path / name
        shutil.copytree(hf, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: changed since it was written"):
            generate(copy, "The", 3, sample=False, seed=1)
        (copy / "manifest.json").unlink()
        (copy / name).unlink()
        with pytest.raises(UserError, match=name):
            generate(copy, "The", 3, sample=False, seed=1)


def test_generation_is_transformers_own(hf: Path) -> None:
    model: Any = BioGptForCausalLM.from_pretrained(hf)
    tokenizer = BioGptTokenizer.from_pretrained(hf)
    output = model.generate(**tokenizer("The role of", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert generate(hf, "The role of", 12, sample=False, seed=1) == tokenizer.decode(
        output[0], skip_special_tokens=True
    )
    assert generate(hf, "The role of", 12, sample=True, seed=1) == generate(hf, "The role of", 12, sample=True, seed=1)
    with pytest.raises(UserError, match="the prompt has"):
        generate(hf, "word " * 80, 12, sample=False, seed=1)
