"""Evaluation of a run or an exported folder."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BioGptForCausalLM

from data.common.files import UserError, read_manifest, write_manifest
from pretrain.bits_per_byte import evaluate_corpora
from pretrain.inference import evaluate_folder


def test_a_run_and_its_export_agree_on_shards_and_on_a_corpus(run: Path, hf: Path, sample_folder: Path) -> None:
    """The same tokens are predicted from shards and from a corpus, but packed or alone: the losses differ."""
    shards, corpus = sample_folder / "shards", sample_folder / "corpus"
    packed = [evaluate_folder(folder, shards, "test") for folder in (run, hf)]
    alone = [scores["pubmed*n*.xml.gz"] for scores in evaluate_corpora([run, hf], [corpus], "test").values()]
    assert packed[0]["tokens"] == read_manifest(shards, "shards")["counts"]["test"]["tokens"]
    assert {result["tokens"] for result in packed} == {score.tokens for score in alone} == {packed[0]["tokens"]}
    assert math.isclose(packed[0]["loss"], packed[1]["loss"], abs_tol=1e-5)
    assert math.isclose(packed[0]["bits_per_byte"], packed[1]["bits_per_byte"], abs_tol=1e-5)
    assert math.isclose(alone[0].loss, alone[1].loss, abs_tol=1e-5)
    assert math.isclose(alone[0].bits_per_byte, alone[1].bits_per_byte, abs_tol=1e-5)
    assert not math.isclose(packed[0]["loss"], alone[0].loss, abs_tol=1e-3)
    assert math.isclose(packed[0]["loss"], alone[0].loss, rel_tol=0.1)


def test_a_run_whose_model_has_a_head_is_not_scored_on_a_corpus(run: Path, sample_folder: Path, tmp_path: Path) -> None:
    """Its decoder alone could be scored, but is no language model any more."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        weights = load_file(checkpoint / "model.safetensors")
        save_file({**weights, "score.weight": torch.zeros(2, 32)}, checkpoint / "model.safetensors")
        manifest = read_manifest(checkpoint, "checkpoint")
        write_manifest(checkpoint, "checkpoint", manifest["request"], manifest["counts"])
    with pytest.raises(UserError, match=r"run: .* not a causal language model; it has the weights score\.weight"):
        evaluate_corpora([copy], [sample_folder / "corpus"], "test")


def test_evaluate_refuses_shards_of_another_tokenizer(hf: Path, sample_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "hf"
    shutil.copytree(hf, other)
    vocabulary = json.loads((other / "vocab.json").read_text())
    (other / "vocab.json").write_text(json.dumps(vocabulary))  # the same content, other bytes
    (other / "manifest.json").unlink()
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate_folder(other, sample_folder / "shards", "test")


def test_a_folder_that_transformers_saved_is_evaluated(hf: Path, sample_folder: Path, tmp_path: Path) -> None:
    """`save_pretrained` leaves a tokenizer.json and no vocab.json."""
    saved = tmp_path / "saved"
    BioGptForCausalLM.from_pretrained(hf).save_pretrained(saved)
    AutoTokenizer.from_pretrained(hf).save_pretrained(saved)
    assert not (saved / "vocab.json").exists()
    shards = sample_folder / "shards"
    ours, theirs = (evaluate_folder(folder, shards, "test") for folder in (hf, saved))
    assert ours == theirs
    ours, theirs = evaluate_corpora([hf, saved], [sample_folder / "corpus"], "test").values()
    assert ours == theirs
    content = json.loads((saved / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (saved / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"another tokenizer .*tokenizer\.json differs"):
        evaluate_folder(saved, shards, "test")
