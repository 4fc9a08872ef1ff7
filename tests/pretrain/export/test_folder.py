"""The exported folder: what transformers' auto classes load from it, and that it appears whole or not at all."""

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, BioGptForCausalLM

from data.common.files import UserError
from data.text.tokenizer import Tokenizer
from launch.cli import main
from pretrain.export.folder import export
from tests.data.common.small_disk import room, small_disk
from tests.data.corpora import content


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


@pytest.mark.parametrize(
    "pages", [0, pytest.param(2, marks=pytest.mark.slow), 30, pytest.param(60, marks=pytest.mark.slow)]
)
def test_export_on_a_full_disk_is_one_line_and_the_next_one_is_whole(
    pages: int, run: Path, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the lease, config.json, the weights, the tokenizer."""
    with small_disk(tmp_path / "disk") as disk:
        monkeypatch.setattr(sys, "argv", ["biogpt", "export", str(run), "--out", str(disk / "hf")])
        with room(disk, pages), pytest.raises(SystemExit) as ended:
            main()
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("biogpt: error: ")]
        assert ended.value.code == 2 and len(errors) == 1 and errors[0] == lines[-1]
        assert f"{disk / 'hf'}: cannot be written, the disk {disk} is full (" in errors[0]
        assert list(disk.iterdir()) == []
        export(run, disk / "hf")
        assert content(disk / "hf") == content(hf)
