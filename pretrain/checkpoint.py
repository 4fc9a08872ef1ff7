"""Checkpoints: one portable state for every ZeRO stage and any number of ranks, whole or not at all.

    run/checkpoints/step-0000200/
        model.safetensors  exp_avg.safetensors  exp_avg_sq.safetensors   fp32, by transformers' parameter names
        state.json      step, model shape, data, losses
        manifest.json   sizes and sha256
    run/latest          name of the newest checkpoint

Random numbers need no state: every draw is a function of the seed and the step (see train.py).
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from data.files import UserError, read_json, read_manifest, verify_files, whole_file, write_json, write_manifest
from model.config import DecoderConfig
from model.hf import from_hf, to_hf

KINDS = ("model", "exp_avg", "exp_avg_sq")


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint's folder, or None where the run has none."""
    pointer = run / "latest"
    if not pointer.is_file():
        return None
    checkpoint = run / "checkpoints" / pointer.read_text().strip()
    read_manifest(checkpoint, "checkpoint")
    return checkpoint


class CheckpointWriter:
    """Writes one checkpoint on rank 0: `add` each kind, then `finish`."""

    def __init__(self, run: Path, step: int) -> None:
        self._run, self._name = run, f"step-{step:07d}"
        self._partial = run / "checkpoints" / f".{self._name}.partial"
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)

    def add(self, kind: str, tensors: dict[str, Tensor]) -> None:
        """Write the tensors of one kind, by our names."""
        save_file(to_hf(tensors), self._partial / f"{kind}.safetensors", metadata={"format": "pt"})

    def finish(self, state: dict[str, Any], keep_last: int) -> Path:
        """Complete the checkpoint, point `latest` at it, and remove all but the newest `keep_last`."""
        write_json(self._partial / "state.json", state)
        write_manifest(self._partial, "checkpoint", {}, {"step": state["step"]})
        final = self._partial.with_name(self._name)
        shutil.rmtree(final, ignore_errors=True)  # one that `latest` never came to point at
        self._partial.replace(final)
        with whole_file(self._run / "latest") as pointer:
            pointer.write(self._name.encode())
        for old in sorted(final.parent.glob("step-*"))[:-keep_last]:
            shutil.rmtree(old)
        return final


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return read_json(checkpoint / "state.json")


def read_tensors(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of one kind, by our names; the sha256 of all files of the checkpoint has to be verified before."""
    return from_hf(load_file(checkpoint / f"{kind}.safetensors"))


def verify_checkpoint(checkpoint: Path) -> None:
    """UserError names a file that is missing or changed."""
    verify_files(checkpoint, read_manifest(checkpoint, "checkpoint"))


def check_resume(run: Path, config: DecoderConfig, order: dict[str, Any]) -> Path | None:
    """The checkpoint that a run would go on from, None for a new one.

    order: what the data order depends on (see train.py). Raises UserError naming the first value in which the
    checkpoint differs from the recipe.
    """
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        return None
    state = read_state(checkpoint)
    # What a layer computes may change (recomputation); what the weights and the data are may not.
    changeable = ("gradient_checkpointing",)
    now = {key: value for key, value in dataclasses.asdict(config).items() if key not in changeable}
    for what, wanted in (("model", now), ("data", order)):
        for key, value in wanted.items():
            if state[what].get(key) != value:
                raise UserError(
                    f"{checkpoint}: has {what} {key} = {state[what].get(key)}, the recipe {value};"
                    " choose another train.run, or the recipe that the run began with"
                )
    return checkpoint
