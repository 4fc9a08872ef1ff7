"""The observer that writes a run's checkpoints; and loading one, where rank 0 decides for all ranks."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from data.common.disk import disk_full_named
from data.common.errors import DiskFull, UserError
from pretrain import engine as engines
from pretrain.checkpoint import (
    CheckpointWriter,
    Diverged,
    identity,
    newest_checkpoint,
    pointed_at,
    prune,
    read_state,
    space_fault,
)
from pretrain.evaluate import Evaluator, evaluate_run
from pretrain.held_out import PROBE_EXAMPLES
from pretrain.metrics import Reporter
from pretrain.run import Observer, Run
from pretrain.run_folder import write_run_manifest

Result = TypeVar("Result")
PROBE_BOUND = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""How far the first loss after a resume may be from the recorded one, in nats. Another layout sums in another order."""


def on_rank_0(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call the function on rank 0 and return its result on every rank.

    Its UserError or DiskFull is raised on every rank too, so that no rank waits for one that has left.
    """
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function(*arguments)
        except UserError as error:
            box[1] = DiskFull(str(error)) if isinstance(error, DiskFull) else UserError(str(error))
    dist.broadcast_object_list(box)
    if box[1]:
        raise box[1]
    return box[0]


def load_newest(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The newest whole checkpoint of a run and its state, or (None, {}) for a new run. Rank 0 decides for all ranks."""
    checkpoint, faults = on_rank_0(newest_checkpoint, folder)
    if checkpoint is None:
        return None, {}
    if dist.get_rank() == 0:
        for fault in faults:
            print(f"biogpt: warning: {fault}; resuming from {checkpoint.name}", flush=True)
    return checkpoint, read_state(checkpoint)


class Saver(Observer):
    """Writes a checkpoint every `checkpoint.every_steps` steps and at the end, and removes old ones by rule."""

    def __init__(self, reporter: Reporter, evaluator: Evaluator) -> None:
        self._reporter, self._evaluator = reporter, evaluator

    def begin(self, run: Run) -> None:
        """Compare the first loss after a resume with the recorded one. Raises RuntimeError if they differ."""
        if not run.recorded_probe:
            return
        recorded, found = run.recorded_probe["loss"], evaluate_run(run, PROBE_EXAMPLES)["loss"]
        bound = max(PROBE_BOUND[run.recipe.train.precision], PROBE_BOUND[run.recorded_probe["precision"]])
        if not abs(found - recorded) <= bound:
            raise RuntimeError(
                f"the first loss after the resume from {run.resumed_from} is {found:.6f}, recorded was"
                f" {recorded:.6f}: the weights did not come back"
            )

    def after_step(self, run: Run, report: dict[str, Any]) -> None:
        """Save if it is due. If the disk is full the run goes on, unless this was its last step."""
        if not run.ending and run.step % run.recipe.checkpoint.every_steps:
            return
        if not run.stop_reason:
            self._evaluator.evaluate(run)
        fault = on_rank_0(space_fault, run.folder, run.objective.config, run.optimizer.state_names)
        try:
            if not fault:
                return self._save(run)
        except DiskFull as error:  # it filled up meanwhile
            fault = str(error)
        if run.ending:
            newest = pointed_at(run.folder)
            kept = f"{run.folder / 'latest'} names {newest}" if newest else "there is no checkpoint"
            raise UserError(f"{fault}; step {run.step} is not saved, {kept}")
        self._reporter.say(run, f"warning: no checkpoint: {fault}")

    def _save(self, run: Run) -> None:
        """Every rank takes part in gathering the state. Rank 0 writes it.

        Raises Diverged or DiskFull on every rank, and saves nothing, if a number of the state is not finite or if the
        disk fills up.
        """
        probe = evaluate_run(run, PROBE_EXAMPLES)["loss"]
        if not math.isfinite(probe):
            raise Diverged(run.folder, run.step, f"the held-out loss is {probe}")
        writer: list[CheckpointWriter] = []  # on rank 0 alone
        on_rank_0(_begin, run, writer)
        for kind in ("model", *run.optimizer.state_names):
            tensors = engines.gather_state(run.engine, run.optimizer, kind)
            on_rank_0(_add, run, writer, kind, run.engine.module.to_hf(tensors))
        path = on_rank_0(_finish, run, writer, probe)
        self._reporter.say(run, f"checkpoint {path}")


@contextmanager
def _or_nothing(run: Run, writer: list[CheckpointWriter]) -> Iterator[None]:
    """Leave nothing of a checkpoint behind if the block ends in UserError, which a full disk becomes here."""
    try:
        with disk_full_named(run.folder, str(run.folder / "checkpoints"), "make room"):
            yield
    except UserError:
        for each in writer:
            each.abandon()
        raise


def _begin(run: Run, writer: list[CheckpointWriter]) -> None:
    with _or_nothing(run, writer):
        writer.append(CheckpointWriter(run.folder, run.step))


def _add(run: Run, writer: list[CheckpointWriter], kind: str, tensors: dict[str, Tensor]) -> None:
    with _or_nothing(run, writer):
        writer[0].add(kind, tensors)


def _finish(run: Run, writer: list[CheckpointWriter], probe: float) -> Path:
    """Complete a checkpoint, unless another process has taken the run over, and remove old ones by rule."""
    state = {
        "step": run.step,
        "skipped": run.skipped,
        "held_out": run.held_out,
        "best": run.best,
        "probe": {"loss": probe, "precision": run.recipe.train.precision},
        "loss_scale": engines.loss_scale(run.engine),
        **identity(run.recipe, run.objective),
    }
    with _or_nothing(run, writer):
        if run.lease:
            run.lease.check()
        write_run_manifest(run.folder, state)  # before `latest`: a disk that is full here must leave the step unsaved
        path = writer[0].finish(state)
    keep = run.recipe.checkpoint
    prune(run.folder, keep.keep_last, keep.keep_every_steps, keep.keep_best)
    return path
