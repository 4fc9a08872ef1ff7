"""The exported folder: what transformers' auto classes load from it, and that it appears whole or not at all."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, BioGptForCausalLM

from data.common.files import UserError
from data.text.tokenizer import Tokenizer
from pretrain.export.folder import export


def test_the_folder_loads_by_auto_classes_and_gives_the_shards_ids(hf: Path, sample_folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hf), AutoTokenizer.from_pretrained(hf)
    assert type(model) is BioGptForCausalLM and tokenizer.is_fast
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 64
    assert model.config.vocab_size == len(tokenizer)
    text = "Velmab improves survival in mice (P < 0.001)."
    assert tokenizer(text).input_ids == [2, *Tokenizer(sample_folder / "tokenizer").encode(text)]
    assert model.generation_config.eos_token_id == 2 and model.generation_config.pad_token_id == 1


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
