"""The proof: what transformers loads is what was trained, or no folder appears."""

from pathlib import Path

import pytest
import torch
from transformers import BioGptForCausalLM

from data.common.files import read_manifest
from data.shards.blocks import TokenStream
from model import decoder as decoder_module
from pretrain import load
from pretrain.checkpoint import newest_checkpoint, read_state
from pretrain.export.folder import export
from tests.pretrain.runs import metrics, trained_run
from tests.ranks import Ranks

LAYOUTS = [
    ("fp32", 1, 1e-4),
    ("bf16", 3, 2e-2),
    *(pytest.param("fp32", stage, 1e-4, marks=pytest.mark.slow) for stage in (0, 2, 3)),
    pytest.param("bf16", 1, 2e-2, marks=pytest.mark.slow),
]


def plain_loss(hf: Path, shards: Path) -> float:
    """The held-out loss by plain transformers over the same blocks, in nats a token."""
    model = BioGptForCausalLM.from_pretrained(hf).eval()
    stream = TokenStream(shards, read_manifest(shards, "shards"), "validation")
    tokens, total = [2, *stream.read(0, len(stream)).tolist()], 0.0
    for start in range(0, len(stream), 64):
        piece = torch.tensor([tokens[start : start + 65]])
        with torch.no_grad():
            loss = model(piece[:, :-1]).logits.log_softmax(-1).gather(2, piece[:, 1:, None])
        total -= loss.sum().item()
    return total / len(stream)


@pytest.mark.parametrize(("precision", "stage", "bound"), LAYOUTS)
def test_transformers_finds_the_loss_that_the_run_recorded(
    precision: str, stage: int, bound: float, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    run = trained_run(two_ranks, sample_folder / "shards", tmp_path, precision, stage)
    export(run, tmp_path / "hf")
    recorded = metrics(run, "validation/loss")[6]
    difference = abs(plain_loss(tmp_path / "hf", sample_folder / "shards") - recorded)
    print(f"{precision} stage {stage}: held-out loss differs by {difference:.2e}")
    assert difference <= bound


def test_a_wrong_map_of_weights_is_found_and_nothing_appears(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q and k exchanged: the shapes fit, the model is another."""
    right = decoder_module.to_hf

    def exchanged(state: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
        names = {"q_proj": "v_proj", "v_proj": "q_proj"}
        return {
            next((name.replace(a, b) for a, b in names.items() if a in name), name): tensor
            for name, tensor in right(state, vocab_size).items()
        }

    monkeypatch.setattr(decoder_module, "to_hf", exchanged)
    with pytest.raises(RuntimeError, match="logits differ"):
        export(run, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_was_not_recorded_is_found(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = read_state(newest_checkpoint(run)[0] or tmp_path)
    state["held_out"]["loss"] += 2e-4
    monkeypatch.setattr(load, "read_state", lambda _: state)
    with pytest.raises(RuntimeError, match="held-out loss is"):
        export(run, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_run_stopped_between_evaluations_is_compared_by_its_probe(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = read_state(newest_checkpoint(run)[0] or tmp_path)
    state["held_out"]["step"] = 3
    monkeypatch.setattr(load, "read_state", lambda _: state)
    counts = export(run, tmp_path / "hf")["counts"]
    assert counts["recorded_loss"] == state["probe"]["loss"] and counts["held_out"]["tokens"] == 8 * 64
    state["probe"]["loss"] += 2e-4
    with pytest.raises(RuntimeError, match="held-out loss is"):
        export(run, tmp_path / "other")
