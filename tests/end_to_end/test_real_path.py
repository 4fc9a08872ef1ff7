"""The main job on real PubMed records, in small, by the commands a user types; and the quickstart."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import BioGptForCausalLM, BioGptTokenizer

from tests.pretrain.runs import metrics
from tests.shared import SHARED, needs_shared

BIOGPT = str(Path(sys.executable).with_name("biogpt"))


def biogpt(folder: Path, *arguments: str) -> str:
    result = subprocess.run([BIOGPT, *arguments], cwd=folder, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_shared
def test_pubmed_xml_to_a_model_that_plain_transformers_loads(tmp_path: Path) -> None:
    nlm = SHARED / "data" / "nlm"
    raw = [str(path) for path in sorted(nlm.glob("pubmed21n*.xml.gz"))]
    biogpt(tmp_path, "corpus", *raw, "--out", "corpus", "--validation-fraction", "0.1", "--workers", "2")
    biogpt(tmp_path, "tokenizer", "corpus", "--out", "tokenizer", "--merges", "800")
    biogpt(tmp_path, "shards", "corpus", "--tokenizer", "tokenizer", "--out", "shards", "--workers", "2")
    settings = ["train.steps=12", "schedule.warmup_steps=5", "deepspeed.stage=2", "evaluate.max_blocks=16"]
    trained = biogpt(tmp_path, "train", "tiny", *settings, "--ranks", "2")
    assert "ZeRO 2, fp32, 2 ranks" in trained and "next: biogpt export run" in trained
    exported = biogpt(tmp_path, "export", "run", "--out", "hf")
    losses = list(metrics(tmp_path / "run", "validation/loss").values())
    assert losses[-1] < losses[0] - 0.5
    assert f"{losses[-1]:.6f} recorded" in exported

    model: Any = BioGptForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = BioGptTokenizer.from_pretrained(tmp_path / "hf")
    encoded = tokenizer("Patients with", return_tensors="pt")
    text = tokenizer.decode(model.generate(**encoded, max_new_tokens=10, do_sample=False)[0], skip_special_tokens=True)
    assert text.startswith("Patients with")
    assert biogpt(tmp_path, "generate", "hf", "Patients with", "--max-new-tokens", "10").strip() == text
    evaluated = biogpt(tmp_path, "evaluate", "hf", "--shards", "shards", "--split", "test")
    assert re.search(r"hf: test loss \d+\.\d+ nats a token, perplexity .* bits per byte, [\d,]+ tokens", evaluated)

    # Every stage again: nothing is done twice, nothing changes.
    before = {
        str(path): path.stat().st_mtime_ns for path in tmp_path.glob("*/*") if path.suffix in (".parquet", ".bin")
    }
    biogpt(tmp_path, "corpus", *raw, "--out", "corpus", "--validation-fraction", "0.1")
    biogpt(tmp_path, "shards", "corpus", "--tokenizer", "tokenizer", "--out", "shards")
    biogpt(tmp_path, "train", "tiny", *settings, "--ranks", "2")
    assert all(Path(path).stat().st_mtime_ns == time for path, time in before.items())
    assert list(metrics(tmp_path / "run", "validation/loss").values()) == losses


def test_quickstart_learns_and_goes_on_where_it_was(tmp_path: Path) -> None:
    first = biogpt(tmp_path, "quickstart")
    figures = {name: float(value) for name, value in re.findall(r"^([a-z0-9 ]+?) {2,}(\d+\.\d+)$", first, re.MULTILINE)}
    assert figures["at the end"] < figures["unigram entropy"] < figures["at step 0"]
    assert json.loads((tmp_path / "quickstart" / "hf" / "config.json").read_text())["model_type"] == "biogpt"
    assert "The role of" in first
    second = biogpt(tmp_path, "quickstart")
    assert second.splitlines()[-5:] == first.splitlines()[-5:]
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart"]
