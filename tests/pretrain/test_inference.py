"""Evaluation of a run or an exported folder."""

import json
import math
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BioGptForCausalLM

from data.common.files import UserError, read_manifest
from pretrain.inference import evaluate_folder


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


def test_a_folder_that_transformers_saved_is_evaluated(hf: Path, sample_folder: Path, tmp_path: Path) -> None:
    """`save_pretrained` leaves a tokenizer.json and no vocab.json."""
    saved = tmp_path / "saved"
    BioGptForCausalLM.from_pretrained(hf).save_pretrained(saved)
    AutoTokenizer.from_pretrained(hf).save_pretrained(saved)
    assert not (saved / "vocab.json").exists()
    shards = sample_folder / "shards"
    ours, theirs = (evaluate_folder(folder, shards, None, "test") for folder in (hf, saved))
    assert ours == theirs
    with pytest.raises(UserError, match=r"vocab\.json: no such file"):
        evaluate_folder(saved, None, sample_folder / "corpus", "test")
    content = json.loads((saved / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (saved / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"another tokenizer .*tokenizer\.json differs"):
        evaluate_folder(saved, shards, None, "test")
