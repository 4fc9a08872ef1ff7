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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from data.common.disk import room
from data.common.files import UserError, read_json, read_manifest, verify_files, whole_file, write_json, write_manifest
from model.architecture import Architecture
from pretrain.held_out import rank
from pretrain.objectives.objective import Objective
from pretrain.optimizer import optimizer_record
from pretrain.recipe import ObjectiveSection, Recipe, given_folders
from pretrain.tensor_file import Layout, Piece, all_finite, read_fragments, read_share, remove_share, write_tensors

NAME = re.compile(r"step-(\d{7,})")
CONTENT = ("shards", "records", "weights")
"""The keys of the data's identity that may differ with `data.allow_other`."""
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


class CheckpointWriter:
    """Writes one checkpoint on rank 0.

    Call `begin`, `add` for the weights ("model") and each optimizer state, then `finish`. Call `abandon` instead if the
    checkpoint cannot be completed. The other ranks only ask it for `share`.
    """

    def __init__(self, run: Path, step: int) -> None:
        self._run, self.step, self._name = run, step, f"step-{step:07d}"
        self._partial = run / "checkpoints" / f".{self._name}.partial"
        self._written: dict[str, str] = {}
        self._syncing: list[Future[None]] = []
        self._executor = ThreadPoolExecutor(1)  # the disk gets the first file while the next is written

    def begin(self) -> None:
        """Make the hidden folder of the checkpoint, and remove what a kill left while writing or removing another."""
        folder = self._partial.parent
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path)
        self._partial.mkdir()

    def share(self, rank: int, kind: str) -> Path:
        """Where another rank than 0 writes its share of a kind (`tensor_file.write_share`)."""
        return self._partial / f"{kind}.rank-{rank}"

    def add(self, kind: str, shapes: dict[str, tuple[int, ...]], own: list[Piece], ranks: int = 1) -> None:
        """Write the file of one kind from rank 0's own pieces and the other ranks' shares, which are removed.

        shapes: its tensors, by transformers' names in the order of the file.
        """
        path, shares = self._partial / f"{kind}.safetensors", [self.share(rank, kind) for rank in range(1, ranks)]
        self._written[path.name] = write_tensors(path, shapes, [own, *map(read_share, shares)])
        for share in shares:
            remove_share(share)
        self._syncing.append(self._executor.submit(_sync, path))

    def finish(self, state: dict[str, Any]) -> Path:
        """Complete the checkpoint and name it in `latest`. Returns its folder.

        Raises RuntimeError if a file reads back differently than it was written.
        """
        for syncing in self._syncing:
            syncing.result()
        self._executor.shutdown()
        write_json(self._partial / "state.json", state)
        files = write_manifest(self._partial, "checkpoint", {}, {"step": state["step"]})["files"]
        for name, written in self._written.items():
            if files[name]["sha256"] != written:
                path = self._partial / name
                raise RuntimeError(f"{path}: reads back differently than it was written; check the disk")
        final = self._partial.with_name(self._name)
        remove(final)  # a damaged one, or one that `latest` never named
        self._partial.replace(final)
        with whole_file(self._run / "latest") as pointer:
            pointer.write(self._name.encode())
        return final

    def abandon(self) -> None:
        """Remove what was written so far."""
        self._executor.shutdown()
        shutil.rmtree(self._partial, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It is renamed to a hidden name first, so that half of one is never found."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint.replace(checkpoint.with_name(f".{checkpoint.name}.removed")))


def prune(run: Path, keep_last: int, keep_every_steps: int, keep_best: bool) -> None:
    """Remove all checkpoints except the newest, those of every n-th step and the best (`rank_of`).

    Checkpoints after `latest` are not counted and not removed: a run that was returned to an earlier step has abandoned
    them.
    """
    newest_first = checkpoints_up_to_latest(run)
    kept = set(newest_first[:keep_last])
    if keep_every_steps:
        kept |= {checkpoint for checkpoint in newest_first if step_of(checkpoint) % keep_every_steps == 0}
    if keep_best:
        kept.add(min(newest_first, key=rank_of))
    for checkpoint in set(newest_first) - kept:
        remove(checkpoint)


def rank_of(checkpoint: Path) -> tuple[float, float]:
    """The rank of the held-out figures that a checkpoint records; the last if it is damaged or has none."""
    try:
        return rank(read_state(checkpoint)["held_out"])
    except (UserError, KeyError):
        return rank({})


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
    """The checkpoint of a step, given as a number or as "best" (`rank_of`).

    Raises UserError if there is none, or if it is damaged; then it names the newest whole one.
    """
    found = list_checkpoints(run)
    if step == "best":
        chosen = min(found, key=rank_of, default=None)
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


def last_checkpoints(run: Path, number: int) -> list[Path]:
    """The last so many checkpoints of a run, verified, the oldest first.

    Raises UserError if there are fewer, or if one of them is damaged.
    """
    found = checkpoints_up_to_latest(run)[:number]
    if len(found) < number:
        raise UserError(
            f"{run}: has {len(found)} checkpoints, and {number} are to be averaged; average fewer, or train with"
            f" checkpoint.keep_last={number}"
        )
    for checkpoint in found:
        verify_checkpoint(checkpoint)
        check_finite(checkpoint)
    return found[::-1]


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


def read_model(checkpoint: Path, model: Architecture) -> None:
    """Fill a model, which has no engine yet, with the weights of a verified checkpoint."""
    whole = ((name, 0, parameter.data.view(-1)) for name, parameter in model.named_parameters())
    read_fragments(checkpoint / "model.safetensors", Layout(model), whole)


def read_mean(checkpoints: list[Path], model: Architecture) -> None:
    """Fill a model with the mean of the weights of verified checkpoints, which are summed in fp64 in this order.

    Besides the model, memory holds one of its parameters, in fp32 and in fp64.
    """
    layout = Layout(model)
    for name, parameter in model.named_parameters():
        values = parameter.data.view(-1)
        total = torch.zeros(len(values), dtype=torch.float64)
        for checkpoint in checkpoints:
            read_fragments(checkpoint / "model.safetensors", layout, [(name, 0, values)])
            total += values
        values.copy_(total / len(checkpoints))


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
        "given": given_folders(recipe),
    }


def check_finite(checkpoint: Path) -> None:
    """Raise UserError if a verified checkpoint is of a run that had diverged. Earlier versions saved those."""
    probe = read_state(checkpoint).get("probe", {}).get("loss", 0.0)
    if not math.isfinite(probe):
        raise UserError(f"{checkpoint}: is of a run that had diverged: its recorded loss is {probe}")
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                if not all_finite(tensors.get_tensor(name)):
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
    if "given" not in state:  # the record is older than this key
        del now["given"]
    else:  # what is not asked for may be anything
        now["given"] = {key: folder for key, folder in now["given"].items() if folder}
    if recipe.data.allow_other:
        now["data"] = {key: value for key, value in now["data"].items() if key not in CONTENT}
    for section, values in now.items():
        record = defaults.get(section, {}) | state.get(section, {})
        for key, value in values.items():
            if record.get(key) != value:
                hint = "; data.allow_other=true resumes all the same" if key in CONTENT else ""
                raise UserError(
                    f"{checkpoint}: has {section} {key} = {record.get(key)}, this run {value}; choose another"
                    f" train.run, or what the run was started with{hint}"
                )


def checkpoint_bytes(numbers: dict[str, int], ranks: int) -> int:
    """The room that a checkpoint takes while it is written: fp32 weights and optimizer states, and some headers.

    numbers: as `Optimizer.numbers`. Shares of several ranks are removed once they are merged, so there is one more file
    at most.
    """
    return 4 * (sum(numbers.values()) + (ranks > 1) * max(numbers.values())) + 1_000_000


def space_fault(folder: Path, numbers: dict[str, int], ranks: int) -> str:
    """What to say if the disk has no room for a checkpoint, or ""."""
    (disk, free), needed = room(folder), checkpoint_bytes(numbers, ranks)
    if free >= needed:
        return ""
    return (
        f"{folder}: a checkpoint takes {needed / 1e6:,.0f} MB, the disk {disk} has {free / 1e6:,.0f} MB free; make room"
    )


def describe_checkpoints(run: Path, verify: bool) -> int:
    """Print a table of a run's checkpoints, newest first, and return how many are damaged.

    verify: compare every sha256.
    """
    found = list_checkpoints(run)
    if not found:
        raise UserError(f"{run}: has no checkpoint")
    table, damaged, latest = Table("step", "held-out loss", "GB", "state"), 0, pointed_at(run)
    best = min(found, key=rank_of)
    for checkpoint in found:
        size = sum(path.stat().st_size for path in checkpoint.iterdir()) / 1e9
        try:
            if verify:
                verify_checkpoint(checkpoint)
            held_out, fault = read_state(checkpoint).get("held_out", {}), ""
            loss = f"{rank(held_out)[1]:.4f}"
            if name := held_out.get("score"):
                loss += f", {name.replace('_', ' ')} {held_out[name]:.4f}"
        except UserError as error:
            loss, fault, damaged = "-", str(error).removeprefix(f"{checkpoint}/"), damaged + 1
        state = fault or ("whole" if verify else "not verified")
        notes = ", latest" * (checkpoint.name == latest) + ", best" * (checkpoint == best and loss != "inf")
        table.add_row(f"{step_of(checkpoint):,}", loss, f"{size:.3f}", state + notes)
    Console().print(table)
    return damaged
