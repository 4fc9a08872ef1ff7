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
import itertools
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.common.files import UserError, read_json, read_manifest, verify_files, whole_file, write_json, write_manifest
from model.architecture import Architecture
from pretrain.objective import Objective
from pretrain.optimizer import optimizer_record
from pretrain.recipe import ObjectiveSection, Recipe, given_weights

NAME = re.compile(r"step-(\d{7,})")
LEFTOVER = re.compile(rf"\.{NAME.pattern}\.(partial|removed)")


class Diverged(UserError):
    """A run whose numbers are no longer finite. Nothing of it is saved; it can be resumed with other settings."""

    def __init__(self, run: Path, step: int, what: str) -> None:
        newest = pointed_at(run)
        kept = f"the last good checkpoint, {newest}, is untouched" if newest else "there is no checkpoint yet"
        super().__init__(
            f"{run}: diverged: at step {step} {what}; {kept}; run the same command with a lower"
            " optimizer.learning_rate, a longer schedule.warmup_steps or optimizer.gradient_clipping=1.0"
        )


def first_not_finite(tensors: dict[str, Tensor]) -> str:
    """The name of the first tensor that holds an infinity or NaN, or ""."""
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), "")


class CheckpointWriter:
    """Writes one checkpoint on rank 0. Call `add` for the weights ("model") and each optimizer state, then `finish`.

    Call `abandon` instead if the checkpoint cannot be completed.
    """

    def __init__(self, run: Path, step: int) -> None:
        self._run, self._step, self._name = run, step, f"step-{step:07d}"
        folder = run / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if LEFTOVER.fullmatch(path.name):  # from a kill while writing or removing
                shutil.rmtree(path)
        self._partial = folder / f".{self._name}.partial"
        self._partial.mkdir()

    def add(self, kind: str, tensors: dict[str, Tensor]) -> None:
        """Write the tensors of one kind, by transformers' names.

        Raises Diverged if a number is not finite, and RuntimeError if the tensors read back differently.
        """
        if name := first_not_finite(tensors):
            raise Diverged(self._run, self._step, f"{kind} {name} holds numbers that are not finite")
        path = self._partial / f"{kind}.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        found = load_file(path)
        for name, tensor in tensors.items():
            if not torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)):  # bytes: -0.0 is not 0.0
                raise RuntimeError(f"{path}: {name} reads back differently than it was written; check the disk")

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

    def abandon(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self._partial, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It is renamed to a hidden name first, so that half of one is never found."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint.replace(checkpoint.with_name(f".{checkpoint.name}.removed")))


def prune(run: Path, keep_last: int, keep_every_steps: int, keep_best: bool) -> None:
    """Remove all checkpoints except the newest, those of every n-th step and the one with the lowest held-out loss.

    Checkpoints after `latest` are not counted and not removed: a run that was returned to an earlier step has abandoned
    them.
    """
    newest_first = checkpoints_up_to_latest(run)
    kept = set(newest_first[:keep_last])
    if keep_every_steps:
        kept |= {checkpoint for checkpoint in newest_first if step_of(checkpoint) % keep_every_steps == 0}
    if keep_best:
        kept.add(min(newest_first, key=held_out_loss_of))
    for checkpoint in set(newest_first) - kept:
        remove(checkpoint)


def held_out_loss_of(checkpoint: Path) -> float:
    """The held-out loss that a checkpoint records; infinity if it is damaged or has none."""
    try:
        loss = float(read_state(checkpoint)["held_out"]["loss"])
    except (UserError, KeyError):
        return math.inf
    return loss if math.isfinite(loss) else math.inf


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first, damaged ones included. Other files and folders are ignored."""
    folder = run / "checkpoints"
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if path.is_dir() and NAME.fullmatch(path.name)), key=step_of, reverse=True)


def checkpoints_up_to_latest(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first, without those after the one that `latest` names."""
    name = pointed_at(run)
    found = list_checkpoints(run)
    return [each for each in found if not NAME.fullmatch(name) or step_of(each) <= step_of(Path(name))]


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint."""
    found = NAME.fullmatch(checkpoint.name)
    assert found
    return int(found[1])


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
    latest, found = run / "checkpoints" / name, checkpoints_up_to_latest(run)
    if name and latest not in found:
        faults.append(f"{latest}: missing, though `latest` names it")
    for checkpoint in found:
        try:
            if verify:
                verify_checkpoint(checkpoint)
                check_finite(checkpoint)
            read_state(checkpoint)
            return checkpoint, faults
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(f"{run}: no checkpoint is whole ({faults[0]}); remove the folder to start a new run")
    return None, []


def choose_checkpoint(run: Path, step: str) -> Path:
    """The checkpoint of a step, given as a number or as "best" for the lowest held-out loss.

    Raises UserError if there is none, or if it is damaged; then it names the newest whole one.
    """
    found = list_checkpoints(run)
    if step == "best":
        chosen = min(found, key=held_out_loss_of, default=None)
    else:
        chosen = next((each for each in found if str(step_of(each)) == step), None)
    if chosen is None:
        steps = ", ".join(str(step_of(each)) for each in reversed(found)) or "none"
        raise UserError(f"{run}: has no checkpoint of step {step}; there are {steps}")
    try:
        verify_checkpoint(chosen)
        check_finite(chosen)
    except UserError as error:
        whole, _ = newest_checkpoint(run)
        hint = f"; the newest whole one is of step {step_of(whole)}" if whole else ""
        raise UserError(f"{error}{hint}") from None
    return chosen


def return_to(run: Path, step: str) -> list[Path]:
    """Make a run resume from an earlier checkpoint, and set the later ones aside. Returns where those are now.

    Raises UserError if there is no such checkpoint or it is damaged.
    """
    chosen = choose_checkpoint(run, step)
    with whole_file(run / "latest") as pointer:
        pointer.write(chosen.name.encode())
    aside = []
    for checkpoint in (each for each in list_checkpoints(run) if step_of(each) > step_of(chosen)):
        number = next(n for n in itertools.count(1) if not _aside(checkpoint, n).exists())
        aside.append(checkpoint.replace(_aside(checkpoint, number)))
    return aside


def _aside(checkpoint: Path, number: int) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.aside-{number}")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return read_json(checkpoint / "state.json")


def read_tensors(checkpoint: Path, kind: str, model: Architecture) -> dict[str, Tensor]:
    """The weights ("model") or an optimizer state of a verified checkpoint, by the model's parameter names."""
    return model.from_hf(load_file(checkpoint / f"{kind}.safetensors"))


def verify_checkpoint(checkpoint: Path) -> None:
    """Raise UserError that names the first file that is missing or changed."""
    try:
        verify_files(checkpoint, read_manifest(checkpoint, "checkpoint"))
    except UserError as error:
        fault = str(error).split(";")[0]  # the advice to make it again is for data
        raise UserError(f"{fault}; the run can resume from an older checkpoint: `biogpt checkpoints RUN`") from None


def identity(recipe: Recipe, objective: Objective) -> dict[str, dict[str, Any]]:
    """What every checkpoint of a run records, and a resumed run must have in common with it."""
    return {
        "model": dataclasses.asdict(objective.config),
        "data": objective.identity(),
        "objective": {"kind": recipe.objective.kind},
        "optimizer": {"kind": optimizer_record(recipe)},
        "given": {"weights": given_weights(recipe)},
    }


def check_finite(checkpoint: Path) -> None:
    """Raise UserError if a verified checkpoint is of a run that had diverged. Earlier versions saved those."""
    probe = read_state(checkpoint).get("probe", {}).get("loss", 0.0)
    if not math.isfinite(probe):
        raise UserError(f"{checkpoint}: is of a run that had diverged: its recorded loss is {probe}")
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                if not torch.isfinite(tensors.get_tensor(name)).all():
                    raise UserError(f"{path}: is of a run that had diverged: {name} holds numbers that are not finite")


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
    best = min(found, key=held_out_loss_of)
    for checkpoint in found:
        size = sum(path.stat().st_size for path in checkpoint.iterdir()) / 1e9
        try:
            if verify:
                verify_checkpoint(checkpoint)
            loss, fault = f"{held_out_loss_of(checkpoint):.4f}", ""
            read_state(checkpoint)
        except UserError as error:
            loss, fault, damaged = "-", str(error).removeprefix(f"{checkpoint}/"), damaged + 1
        state = fault or ("whole" if verify else "not verified")
        notes = ", latest" * (checkpoint.name == latest) + ", best" * (checkpoint == best and loss != "inf")
        table.add_row(f"{step_of(checkpoint):,}", loss, f"{size:.3f}", state + notes)
    Console().print(table)
    return damaged
