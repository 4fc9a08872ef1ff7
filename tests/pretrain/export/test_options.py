"""What else can be exported: any checkpoint, the mean of the last ones, bf16, and weights in several files."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from data.common.files import UserError, read_manifest
from launch.cli import main
from pretrain.checkpoint import read_state
from pretrain.export import folder as export_folder
from pretrain.export.folder import export
from pretrain.generate import Decoding, Prompt, generate
from pretrain.inference import evaluate_folder
from tests.launch.test_inputs import mistake
from tests.pretrain.export.test_proof import plain_loss
from tests.pretrain.runs import run_case, settings
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def saved(one_rank: Ranks, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2, 4 and 6."""
    run = tmp_path_factory.mktemp("options") / "run"
    more = ["train.steps=6", "train.precision=fp32", "checkpoint.every_steps=2", "checkpoint.keep_last=3"]
    one_rank.run(run_case, settings(sample_folder / "shards", run, *more))
    return run


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:07d}"


def test_every_checkpoint_can_be_exported(saved: Path, tmp_path: Path) -> None:
    for step in ("2", "best"):
        manifest = export(saved, tmp_path / step, step=step)
        expected = read_state(checkpoint(saved, manifest["counts"]["step"]))["held_out"]["loss"]
        assert manifest["counts"]["recorded_loss"] == expected
    assert manifest["counts"]["step"] == 6  # the loss falls at each step
    theirs, ours = (load_tensors(folder / "model.safetensors") for folder in (tmp_path / "2", checkpoint(saved, 2)))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_the_mean_of_checkpoints_is_numpys_and_its_loss_is_proven(
    saved: Path, sample_folder: Path, tmp_path: Path
) -> None:
    manifest = export(saved, tmp_path / "hf", average=3)
    found = load_file(tmp_path / "hf" / "model.safetensors")
    each = [load_file(checkpoint(saved, step) / "model.safetensors") for step in (2, 4, 6)]
    for name, values in found.items():
        mean = np.mean([tensors[name].astype(np.float64) for tensors in each], axis=0).astype(np.float32)
        assert np.array_equal(values, mean), name
        assert not np.array_equal(values, each[2][name]), name
    counts = manifest["counts"]
    assert counts["averaged_steps"] == [2, 4, 6] and "recorded_loss" not in counts
    plain = plain_loss(tmp_path / "hf", sample_folder / "shards")
    assert abs(counts["computed_loss"] - plain) < 1e-4 and abs(counts["held_out"]["loss"] - plain) < 1e-4
    assert abs(plain - read_state(checkpoint(saved, 6))["held_out"]["loss"]) > 1e-3  # it is another model
    assert evaluate_folder(saved, None, "validation", average=3)["loss"] == pytest.approx(plain, abs=1e-5)
    assert export(saved, tmp_path / "hf", average=3) == manifest  # nothing is done again
    for average, dtype in ((2, "fp32"), (1, "fp32"), (3, "bf16")):
        with pytest.raises(UserError, match="was made from other inputs or settings"):
            export(saved, tmp_path / "hf", average=average, dtype=dtype)


def test_a_wrong_mean_is_found(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are changed on their way to the file."""
    right = export_folder.write_hf_files

    def wrong(folder: Path, model: Any, *rest: Any) -> None:
        changed = dict(model.state_dict())
        changed["layers.0.fc1.bias"] = changed["layers.0.fc1.bias"] + 0.1
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(changed)
        right(folder, model, *rest)
        model.load_state_dict(before)

    monkeypatch.setattr(export_folder, "write_hf_files", wrong)
    with pytest.raises(RuntimeError, match="logits differ"):
        export(saved, tmp_path / "hf", average=2)
    assert list(tmp_path.iterdir()) == []


def test_bf16_weights_are_the_rounded_ones_and_load_as_such(saved: Path, sample_folder: Path, tmp_path: Path) -> None:
    counts = export(saved, tmp_path / "hf", dtype="bf16")["counts"]
    found, trained = (load_tensors(folder / "model.safetensors") for folder in (tmp_path / "hf", checkpoint(saved, 6)))
    assert all(torch.equal(found[name], trained[name].bfloat16()) for name in trained)
    assert counts["largest_logit_difference"] <= 1e-4
    assert 0 < abs(counts["held_out"]["loss"] - counts["recorded_loss"]) <= 2e-2
    assert abs(plain_loss(tmp_path / "hf", sample_folder / "shards") - counts["recorded_loss"]) <= 2e-2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    evaluated = evaluate_folder(tmp_path / "hf", sample_folder / "shards", "validation")["loss"]
    assert abs(evaluated - counts["recorded_loss"]) <= 2e-2


def test_large_weights_lie_in_several_files_that_transformers_loads(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(saved, tmp_path / "one")
    monkeypatch.setattr(export_folder, "FILE_BYTES", 50_000)
    export(saved, tmp_path / "several")
    whole = load_tensors(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    parts = sorted((tmp_path / "several").glob("model-*.safetensors"))
    assert not (tmp_path / "several" / "model.safetensors").exists() and len(parts) > 1
    assert (
        set(index["weight_map"].values())
        == {path.name for path in parts}
        <= set(read_manifest(tmp_path / "several", "hf")["files"])
    )
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in whole.values())
    for path in parts:
        assert path.stat().st_mode & 0o777 == 0o644
        with safe_open(path, "pt") as tensors:
            names = list(tensors.keys())
            assert len(names) == 1 or sum(whole[name].numel() * 4 for name in names) <= 50_000
            assert all(torch.equal(tensors.get_tensor(name), whole[name]) for name in names)
    one, several = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "several"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), several.parameters(), strict=True))
    assert generate(tmp_path / "several", [Prompt("The", "it")], Decoding(max_new_tokens=3))


def test_mistakes_are_one_line(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, copy = str(tmp_path / "hf"), tmp_path / "run"
    shutil.copytree(saved, copy)
    path = checkpoint(copy, 4) / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    for arguments, culprit in (
        (["export", str(copy), "--out", out, "--average", "4"], "has 3 checkpoints, and 4 are to be averaged"),
        (["export", str(copy), "--out", out, "--average", "3"], f"{path}: changed since it was written"),
        (["evaluate", str(copy), "--average", "3"], f"{path}: changed since it was written"),
        (["export", str(copy), "--out", out, "--average", "2", "--step", "6"], "choose one of --step and --average"),
        (["export", str(copy), "--out", out, "--dtype", "fp8"], "--dtype fp8: choose from fp32, bf16"),
    ):
        assert culprit in mistake(arguments, capsys, monkeypatch)
    export(copy, tmp_path / "hf")
    said = mistake(["evaluate", out, "--shards", out, "--average", "2"], capsys, monkeypatch)
    assert f"{out}: --average takes the checkpoints of a run" in said


def test_the_command_says_what_it_averaged(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["biogpt", "export", str(saved), "--out", str(tmp_path / "hf"), "--average", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert f"{tmp_path / 'hf'}: mean of steps 4, 6, " in (said := capsys.readouterr().out) and "by our model" in said


def test_one_file_is_what_safetensors_writes(hf: Path, tmp_path: Path) -> None:
    """Earlier versions called safetensors themselves, and the same run must give the same bytes."""
    save_file(load_tensors(hf / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
