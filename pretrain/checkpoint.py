"""Checkpoints as files: one portable state for every ZeRO stage and any number of ranks, complete or absent.

    run/checkpoints/step-0000200/
        model.safetensors   the weights in fp32, by transformers' parameter names
        exp_avg.safetensors  exp_avg_sq.safetensors   the optimizer's states, a file each, by the same names
        state.json          step, model shape, data, losses
        manifest.json       sizes and sha256
    run/latest              name of the newest checkpoint

A checkpoint is written to a hidden folder, read back and renamed, and only then named in `latest`. A kill between any
two files leaves a `latest` that loads. Random numbers need no state, because every draw is a function of the seed and
the step (see train.py).
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
from model.architecture import Architecture
from pretrain.objective import Objective
from pretrain.optimizer import optimizer_record
from pretrain.recipe import ObjectiveSection, Recipe, given_weights


class CheckpointWriter:
    """Writes one checkpoint on rank 0. Call `add` for the weights ("model") and each optimizer state, then `finish`."""

    def __init__(self, run: Path, step: int) -> None:
        self._run, self._name = run, f"step-{step:07d}"
        folder = run / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*"):  # from a kill while writing or removing
            shutil.rmtree(leftover)
        self._partial = folder / f".{self._name}.partial"
        self._partial.mkdir()

    def add(self, kind: str, tensors: dict[str, Tensor]) -> None:
        """Write the tensors of one kind, by transformers' names. Raises RuntimeError if they read back differently."""
        path = self._partial / f"{kind}.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        found = load_file(path)
        for name, tensor in tensors.items():
            # Compare bytes, so that NaN equals itself.
            if not torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)):
                raise RuntimeError(f"{path}: {name} reads back other than it was written; check the disk")

    def finish(self, state: dict[str, Any]) -> Path:
        """Complete the checkpoint and name it in `latest`. Returns its folder."""
        write_json(self._partial / "state.json", state)
        write_manifest(self._partial, "checkpoint", {}, {"step": state["step"]})
        final = self._partial.with_name(self._name)
        remove(final)  # a damaged one, or one that `latest` never named
        self._partial.replace(final)
        with whole_file(self._run / "latest") as pointer:
            pointer.write(self._name.encode())
        return final


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It is renamed to a hidden name first, so that half of one is never found."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint.replace(checkpoint.with_name(f".{checkpoint.name}.removed")))


def prune(run: Path, keep_last: int, keep_every_steps: int, keep_best: bool) -> None:
    """Remove all checkpoints except the newest, those of every n-th step and the one with the lowest held-out loss."""
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
    """The checkpoints of a run, newest first, damaged ones included."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def pointed_at(run: Path) -> str:
    """The name in `latest`, or "" if there is none."""
    pointer = run / "latest"
    return pointer.read_text().strip() if pointer.is_file() else ""


def newest_checkpoint(run: Path, verify: bool = True) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and what is wrong with newer ones: `latest`, or the newest whole one before it.

    Returns (None, []) for a new run. verify: compare every sha256; otherwise only read the state. Raises UserError if a
    run has checkpoints but none is whole, because starting a new run in its place would lose it.
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
        raise UserError(f"{run}: no checkpoint is whole ({faults[0]}); remove the folder to start a new run")
    return None, []


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return read_json(checkpoint / "state.json")


def read_tensors(checkpoint: Path, kind: str, model: Architecture) -> dict[str, Tensor]:
    """The weights ("model") or an optimizer state of a verified checkpoint, by the model's parameter names."""
    return model.from_hf(load_file(checkpoint / f"{kind}.safetensors"))


def verify_checkpoint(checkpoint: Path) -> None:
    """Raise UserError that names the first file that is missing or changed."""
    verify_files(checkpoint, read_manifest(checkpoint, "checkpoint"))


def identity(recipe: Recipe, objective: Objective) -> dict[str, dict[str, Any]]:
    """What every checkpoint of a run records, and a resumed run must have in common with it."""
    return {
        "model": dataclasses.asdict(objective.config),
        "data": objective.identity(),
        "objective": {"kind": recipe.objective.kind},
        "optimizer": {"kind": optimizer_record(recipe)},
        "given": {"weights": given_weights(recipe)},
    }


def check_state(checkpoint: Path | None, state: dict[str, Any], recipe: Recipe, objective: Objective) -> None:
    """Raise UserError that names the first value in which a checkpoint differs from the run that would resume it.

    A key that the record lacks did not exist when it was written, and means the key's default.
    """
    if checkpoint is None:
        return
    now = identity(recipe, objective)
    shape = {field.name: field.default for field in dataclasses.fields(objective.config)}
    defaults = {"objective": {"kind": ObjectiveSection().kind}, "model": shape}
    del now["model"]["gradient_checkpointing"]  # it changes how the same numbers are computed
    if not recipe.model.weights or "given" not in state:  # none are asked for, or the record is older than this key
        del now["given"]
    if recipe.data.allow_other:
        del now["data"]["shards"]
    for section, values in now.items():
        record = defaults.get(section, {}) | state.get(section, {})
        for key, value in values.items():
            if record.get(key) != value:
                hint = "; data.allow_other=true resumes all the same" if key == "shards" else ""
                raise UserError(
                    f"{checkpoint}: has {section} {key} = {record.get(key)}, this run {value}; choose another"
                    f" train.run, or what the run was started with{hint}"
                )


def checkpoint_bytes(config: Any, state_names: tuple[str, ...]) -> int:
    """The largest size of a checkpoint: fp32 weights and optimizer states, and some headers."""
    return 4 * (1 + len(state_names)) * config.parameter_count() + 1_000_000


def space_fault(folder: Path, config: Any, state_names: tuple[str, ...]) -> str:
    """What to say if the disk has no room for a checkpoint, or ""."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free, needed = shutil.disk_usage(existing).free, checkpoint_bytes(config, state_names)
    if free >= needed:
        return ""
    return f"{folder}: a checkpoint takes {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; make room"


def describe_checkpoints(run: Path, verify: bool) -> int:
    """Print a table of a run's checkpoints, newest first, and return how many are damaged.

    verify: compare every sha256.
    """
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
