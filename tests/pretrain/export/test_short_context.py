"""A run whose blocks are shorter than the model's positions: the export holds the positions that were trained."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pretrain.export.folder import export
from pretrain.inference import evaluate_folder
from tests.pretrain.runs import run_case, settings
from tests.ranks import Ranks


def test_positions_never_trained_are_not_in_the_folder(one_rank: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    shards, run, hf = sample_folder / "shards", tmp_path / "run", tmp_path / "hf"
    one_rank.run(run_case, settings(shards, run, "train.context_length=32", "train.steps=4"))
    export(run, hf)
    assert json.loads((hf / "config.json").read_text())["max_position_embeddings"] == 32
    assert AutoTokenizer.from_pretrained(hf).model_max_length == 32
    ours, theirs = (evaluate_folder(folder, shards, "test") for folder in (run, hf))
    assert ours["tokens"] == theirs["tokens"] and ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
