"""The model card."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import BioGptForCausalLM, BioGptTokenizer, pipeline

from data.common.files import read_manifest
from pretrain.export.folder import export
from pretrain.report import report
from tests.pretrain.runs import metrics


def test_the_model_card_tells_data_recipe_and_losses(hf: Path, run: Path, sample_folder: Path) -> None:
    card = (hf / "README.md").read_text()
    counts = read_manifest(sample_folder / "shards", "shards")["counts"]
    assert f"{counts['train']['documents']:,}" in card and f"{metrics(run, 'validation/loss')[6]:.4f}" in card
    assert '"learning_rate": 0.003' in card
    assert str(run.parent) not in card  # no path of the machine it was made on
    files = {"config.json", "model.safetensors", "vocab.json", "README.md", "curves.png"}
    assert read_manifest(hf, "hf")["files"].keys() >= files


def test_the_model_card_shows_the_curves_of_the_run_if_it_has_a_record(hf: Path, run: Path, tmp_path: Path) -> None:
    report([run], tmp_path / "report")
    assert (hf / "curves.png").read_bytes() == (tmp_path / "report" / "curves.png").read_bytes()
    assert "](curves.png)" in (hf / "README.md").read_text()
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    export(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf" / "curves.png").exists()
    assert "curves.png" not in (tmp_path / "hf" / "README.md").read_text()


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


def test_the_example_of_the_card_continues_its_prompt_with_a_space(
    hf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers' slow tokenizer says how. A pipeline joins the first word to the prompt, as the card warns."""
    card = (hf / "README.md").read_text()
    example = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(hf.parent)
    exec(example[0], {})
    printed = capsys.readouterr().out.rstrip("\n")
    slow: Any = BioGptTokenizer.from_pretrained(hf)
    model: Any = BioGptForCausalLM.from_pretrained(hf)
    ids = model.generate(**slow("The role of", return_tensors="pt"), max_new_tokens=20)
    assert len(example) == 1 and printed == slow.decode(ids[0], skip_special_tokens=True)
    continuation = slow.decode(ids[0, slow("The role of", return_tensors="pt")["input_ids"].shape[1] :])
    print(repr(printed), repr(continuation))
    joined = pipeline("text-generation", str(hf))("The role of", max_new_tokens=20)[0]["generated_text"]
    assert printed.startswith("The role of ") and not joined.startswith("The role of ")
