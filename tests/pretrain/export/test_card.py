"""The model card."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import BioGptForCausalLM, BioGptTokenizer, pipeline

from data.archive.download import TERMS
from data.common.files import UserError, read_manifest
from pretrain.export.folder import export
from pretrain.hf_folder import check_hf
from pretrain.record import read_record
from pretrain.report import plot_curves
from pretrain.training_data import FILE
from tests.markdown import python_blocks
from tests.pretrain.runs import metrics


def test_the_model_card_tells_data_recipe_and_losses(hf: Path, run: Path, sample_folder: Path) -> None:
    card = (hf / "README.md").read_text()
    counts = read_manifest(sample_folder / "shards", "shards")["counts"]
    assert f"{counts['train']['documents']:,}" in card and f"{metrics(run, 'validation/loss')[6]:.4f}" in card
    corpus = read_manifest(sample_folder / "corpus", "corpus")["counts"]
    assert f"| records read | {corpus['records']:,} |" in card and f"|   train | {corpus['train']:,} |" in card
    assert TERMS in card and f"{len(list((sample_folder / 'raw').iterdir()))} of PubMed's XML" in card
    held_out = read_manifest(hf, "hf")["counts"]["held_out"]
    assert f"| held-out bits per byte | {held_out['bits_per_byte']:.5g} |" in card
    settings = json.loads(re.findall(r"```json\n(.*?)```", card, re.DOTALL)[0])
    assert settings["optimizer"]["learning_rate"] == 0.003 and settings["corpus"]["profile"] == "clean"
    files = {"config.json", "model.safetensors", "vocab.json", "README.md", "curves.png"}
    assert read_manifest(hf, "hf")["files"].keys() >= files


def test_the_card_names_nothing_of_this_machine_and_has_no_empty_values(
    run: Path, sample_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "qqrun")
    shutil.copytree(sample_folder / "shards", tmp_path / "qqshards")
    export(tmp_path / "qqrun", tmp_path / "qqhf", tmp_path / "qqshards", license="cc-by-4.0")
    card = (tmp_path / "qqhf" / "README.md").read_text()
    local = {str(run), str(sample_folder), str(tmp_path), tmp_path.name, "qqrun", "qqshards", "qqhf"}
    assert not [name for name in local if name in card]
    assert not re.search(r"\b(null|None|nan)\b", card)
    front = ModelCard(card).data.to_dict()
    assert front["license"] == "cc-by-4.0" and front["library_name"] == "transformers" and front["language"] == "en"
    assert "`cc-by-4.0`" in card and "hf upload USER/NAME ." in card and "bbac409" in card


def test_shards_of_an_earlier_version_give_a_card_without_their_corpus(
    run: Path, hf: Path, sample_folder: Path, tmp_path: Path
) -> None:
    shards = shutil.copytree(sample_folder / "shards", tmp_path / "shards")
    shutil.rmtree(shards / "corpus")
    earlier = shutil.copytree(run, tmp_path / "run")
    (earlier / FILE).unlink()
    export(earlier, tmp_path / "hf", shards)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "## Training data" not in card and "## Training data" in (hf / "README.md").read_text()
    assert "license: unknown" in card and "No licence was stated" in card


def test_the_model_card_shows_the_curves_of_the_run_if_it_has_a_record(hf: Path, run: Path, tmp_path: Path) -> None:
    """Under no name of this machine."""
    plot_curves({"this model": read_record(run)}, tmp_path / "curves.png")
    assert (hf / "curves.png").read_bytes() == (tmp_path / "curves.png").read_bytes()
    assert "](curves.png)" in (hf / "README.md").read_text()
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    export(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf" / "curves.png").exists()
    assert "curves.png" not in (tmp_path / "hf" / "README.md").read_text()


def test_an_edited_card_leaves_a_folder_usable(hf: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf, tmp_path / "hf")
    (folder / "README.md").write_text("# Mine\n")
    check_hf(folder, "biogpt")
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: changed"):
        check_hf(folder, "biogpt")


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


def test_the_usage_of_the_card_runs_in_its_folder(
    hf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers' slow tokenizer says how the text reads, and plain torch what the loss is.

    A pipeline joins the first word to the prompt, as the card warns.
    """
    usage = python_blocks((hf / "README.md").read_text())
    monkeypatch.chdir(hf)
    exec(usage[0], {})
    printed, loss = capsys.readouterr().out.splitlines()
    slow: Any = BioGptTokenizer.from_pretrained(hf)
    model: Any = BioGptForCausalLM.from_pretrained(hf)
    ids = model.generate(**slow("The role of", return_tensors="pt"), max_new_tokens=20)
    assert len(usage) == 1 and len(usage[0].splitlines()) <= 10
    assert printed == slow.decode(ids[0], skip_special_tokens=True)
    text = slow("Aspirin inhibits the aggregation of platelets.", return_tensors="pt")["input_ids"]
    expected = -model(text[:, :-1]).logits.log_softmax(-1).gather(2, text[:, 1:, None]).mean()
    assert float(loss.split()[0]) == pytest.approx(float(expected), abs=1e-4)
    joined = pipeline("text-generation", str(hf))("The role of", max_new_tokens=20)[0]["generated_text"]
    assert printed.startswith("The role of ") and not joined.startswith("The role of ")
