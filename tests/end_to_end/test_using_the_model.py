"""An exported folder in a stranger's hands: the page of the docs, block by block, and the stranger's script."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain import ROOT
from tests.end_to_end import stranger
from tests.markdown import python_blocks


def test_every_block_of_the_page_runs(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf").symlink_to(hf)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    names: dict[str, Any] = {}
    blocks = python_blocks((ROOT / "docs" / "using-the-model.md").read_text())
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"block {number} of using-the-model.md", "exec"), names)
    assert len(blocks) == 5
    assert names["continued"][0].startswith("The role of") and names["continued"][1].startswith("Patients with")
    assert "".join(names["pieces"]).split() == ["".join(names["text"].split())] and names["pieces"][0] == ""
    assert names["found"] == "platelets"
    assert names["after"] < names["before"] - 0.5
    assert names["lora_loss"] < names["before"] - 0.1  # the model learns less than the whole
    original = load_file(hf / "model.safetensors")
    base = names["base"].state_dict()
    kept = {name: base[next(key for key in base if key.replace(".base_layer", "") == name)] for name in original}
    assert all(torch.equal(kept[name], original[name]) for name in original)
    merged = names["merged"].state_dict()
    assert any(not torch.equal(merged[name], original[name]) for name in original)
    ids = names["tokenizer"]("Aspirin inhibits", return_tensors="pt")
    logits = [model.eval()(**ids).logits for model in (names["merged"], names["adapted"])]
    assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("check", stranger.CHECKS, ids=lambda check: check.__name__)
def test_the_checks_of_a_stranger_pass(check: Any, hf: Path) -> None:
    with torch.set_grad_enabled(check is stranger.lora):
        check(hf)


def test_the_script_of_a_stranger_runs_alone_and_says_what_fails(hf: Path, tmp_path: Path) -> None:
    """Without our packages on its path, on a folder without a tokenizer."""
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hf" / name).symlink_to(hf / name)
    script = str(Path(stranger.__file__))
    result = subprocess.run(
        [sys.executable, "-P", script, "hf"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 1 and "auto_classes: passed" in result.stdout and "offsets: FAILED" in result.stdout
    assert "1 of 8 checks passed" in result.stdout
