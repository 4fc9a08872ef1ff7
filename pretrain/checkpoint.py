"""Checkpoints as files: one portable state for every ZeRO stage and any number of ranks, whole or not at all.

    run/checkpoints/step-0000200/
        model.safetensors  exp_avg.safetensors  exp_avg_sq.safetensors   fp32, by transformers' parameter names
        state.json      step, model shape, data, losses
        manifest.json   sizes and sha256
    run/latest          name of the newest checkpoint

Written in a hidden folder, read back, renamed, then pointed at: a kill between any two files leaves a `latest` that
loads. Random numbers need no state: every draw is a function of the seed and the step (see train.py).
"""

import dataclasses
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.common.files import UserError, read_json, read_manifest, verify_files, whole_file, write_json, write_manifest
from model.config import DecoderConfig
from model.hf import from_hf
from pretrain.recipe import Recipe, given_weights, optimizer_kind

KINDS = ("model", "exp_avg", "exp_avg_sq")


class CheckpointWriter:
    """Writes one checkpoint on rank 0: `add` each kind, then `finish`."""

    def __init__(self, run: Path, step: int) -> None:
        self._run, self._name = run, f"step-{step:07d}"
        folder = run / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*"):  # of a kill while writing or removing
            shutil.rmtree(leftover)
        self._partial = folder / f".{self._name}.partial"
        self._partial.mkdir()

    def add(self, kind: str, tensors: dict[str, Tensor]) -> None:
        """Write the tensors of one kind, by transformers' names, and read them back; RuntimeError where they differ."""
        path = self._partial / f"{kind}.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        found = load_file(path)
        for name, tensor in tensors.items():
            # As bytes: a weight that is not a number equals itself here.
            if not torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)):
                raise RuntimeError(f"{path}: {name} reads back other than it was written; check the disk")

    def finish(self, state: dict[str, Any]) -> Path:
        """Complete the checkpoint and point `latest` at it."""
        write_json(self._partial / "state.json", state)
        write_manifest(self._partial, "checkpoint", {}, {"step": state["step"]})
        final = self._partial.with_name(self._name)
        remove(final)  # one that was damaged, or that `latest` never came to point at
        self._partial.replace(final)
        with whole_file(self._run / "latest") as pointer:
            pointer.write(self._name.encode())
        return final


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; it is hidden first, so that half of one is never found."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint.replace(checkpoint.with_name(f".{checkpoint.name}.removed")))


def prune(run: Path, keep_last: int, keep_every_steps: int, keep_best: bool) -> None:
    """Remove all checkpoints but the newest, those of every n-th step and the one with the lowest held-out loss."""
    newest_first = list_checkpoints(run)
    kept = set(newest_first[:keep_last])
    if keep_every_steps:
        kept |= {checkpoint for checkpoint in newest_first if step_of(checkpoint) % keep_every_steps == 0}
    if keep_best:
        kept.add(min(newest_first, key=_held_out_loss))
    for checkpoint in set(newest_first) - kept:
        remove(checkpoint)


def _held_out_loss(checkpoint: Path) -> float:
    try:
        return float(read_state(checkpoint)["held_out"]["loss"])
    except (UserError, KeyError):  # damaged, or without an evaluation
        return math.inf


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first, whole or not."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def pointed_at(run: Path) -> str:
    """The name in `latest`, or ""."""
    pointer = run / "latest"
    return pointer.read_text().strip() if pointer.is_file() else ""


def newest_checkpoint(run: Path, verify: bool = True) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from: `latest`, or the newest whole one before it. And what was wrong with the others.

    verify: compare every sha256, otherwise only look whether the state can be read. (None, []) for a new run; a run
    none of whose checkpoints is whole is a UserError, for a new one in its place would lose it.
    """
    name, faults = pointed_at(run), []
    found = [checkpoint for checkpoint in list_checkpoints(run) if not name or checkpoint.name <= name]
    if name and name not in {checkpoint.name for checkpoint in found}:
        faults.append(f"{run / 'checkpoints' / name}: missing, though `latest` names it")
    for checkpoint in found:
        try:
            if verify:
                verify_checkpoint(checkpoint)
            read_state(checkpoint)
            return checkpoint, faults
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(f"{run}: no checkpoint is whole ({faults[0]}); remove the folder to begin anew")
    return None, []


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return read_json(checkpoint / "state.json")


def read_tensors(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of one kind, by our names; the sha256 of all files of the checkpoint has to be verified before."""
    return from_hf(load_file(checkpoint / f"{kind}.safetensors"))


def verify_checkpoint(checkpoint: Path) -> None:
    """UserError names a file that is missing or changed."""
    verify_files(checkpoint, read_manifest(checkpoint, "checkpoint"))


def check_state(
    checkpoint: Path | None, state: dict[str, Any], recipe: Recipe, config: DecoderConfig, data: dict[str, Any]
) -> None:
    """UserError names the first value in which a checkpoint's state differs from the run that would go on from it."""
    if checkpoint is None:
        return
    now = {
        "model": dataclasses.asdict(config),
        "data": dict(data),
        "optimizer": {"kind": optimizer_kind(recipe)},
        "given": {"weights": given_weights(recipe)},
    }
    del now["model"]["gradient_checkpointing"]  # how the same thing is computed
    if not recipe.model.weights or "given" not in state:  # none are asked for, or the record is older than this key
        del now["given"]
    if recipe.data.allow_other:
        del now["data"]["shards"]
    for section, values in now.items():
        for key, value in values.items():
            recorded = state[section].get(key)
            if recorded != value:
                hint = "; data.allow_other=true goes on all the same" if key == "shards" else ""
                raise UserError(
                    f"{checkpoint}: has {section} {key} = {recorded}, this run {value}; choose another train.run, or"
                    f" what the run began with{hint}"
                )


def checkpoint_bytes(config: DecoderConfig) -> int:
    """Size of a checkpoint: three fp32 values for each parameter, and some headers."""
    return 12 * config.parameter_count() + 1_000_000


def space_fault(folder: Path, config: DecoderConfig) -> str:
    """What to say where the disk has no room for a checkpoint; "" where it has."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free, needed = shutil.disk_usage(existing).free, checkpoint_bytes(config)
    if free >= needed:
        return ""
    return f"{folder}: a checkpoint takes {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; make room"


def describe_checkpoints(run: Path, verify: bool) -> int:
    """Print a table of a run's checkpoints, newest first. Returns how many are damaged, by sha256 where `verify`."""
    found = list_checkpoints(run)
    if not found:
        raise UserError(f"{run}: has no checkpoint")
    table, damaged, latest = Table("step", "held-out loss", "GB", "state"), 0, pointed_at(run)
    for checkpoint in found:
        size = sum(path.stat().st_size for path in checkpoint.iterdir()) / 1e9
        try:
            if verify:
                verify_checkpoint(checkpoint)
            loss, fault = f"{_held_out_loss(checkpoint):.4f}", ""
            read_state(checkpoint)
        except UserError as error:
            loss, fault, damaged = "-", str(error).removeprefix(f"{checkpoint}/"), damaged + 1
        state = fault or ("whole" if verify else "not verified")
        table.add_row(f"{step_of(checkpoint):,}", loss, f"{size:.3f}", state + ", latest" * (checkpoint.name == latest))
    Console().print(table)
    return damaged
