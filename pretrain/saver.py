"""The observer that writes a run's checkpoints; and loading one, where rank 0 decides for all ranks."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from data.common.files import UserError
from pretrain import engine as engines
from pretrain.checkpoint import CheckpointWriter, Diverged, identity, newest_checkpoint, prune, read_state, space_fault
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

    Its UserError is raised on every rank too, so that no rank waits for one that has left.
    """
    box: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            box[0] = function(*arguments)
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1]:
        raise UserError(box[1])
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
        if not fault:
            self._save(run)
        elif run.ending:
            raise UserError(f"{fault}; step {run.step} is not saved, {run.folder / 'latest'} names the last checkpoint")
        else:
            self._reporter.say(run, f"warning: no checkpoint: {fault}")

    def _save(self, run: Run) -> None:
        """Every rank takes part in gathering the state. Rank 0 writes it.

        Raises Diverged on every rank, and saves nothing, if a number of the state is not finite.
        """
        probe = evaluate_run(run, PROBE_EXAMPLES)["loss"]
        if not math.isfinite(probe):
            raise Diverged(run.folder, run.step, f"the held-out loss is {probe}")
        run.stamp(f"the checkpoint of step {run.step}", long=True)
        writer = CheckpointWriter(run.folder, run.step) if run.rank == 0 else None
        for kind in ("model", *run.optimizer.state_names):
            tensors = engines.gather_state(run.engine, run.optimizer, kind)
            on_rank_0(_add, writer, kind, run.engine.module.to_hf(tensors))
        path = on_rank_0(_finish, run, writer, probe)
        self._reporter.say(run, f"checkpoint {path}")


def _add(writer: CheckpointWriter, kind: str, tensors: dict[str, Tensor]) -> None:
    """Write a kind of tensors, or leave nothing behind."""
    try:
        writer.add(kind, tensors)
    except UserError:
        writer.abandon()
        raise


def _finish(run: Run, writer: CheckpointWriter, probe: float) -> Path:
    """Complete a checkpoint, unless another process has taken the run over, and remove old ones by rule."""
    try:
        if run.lease:
            run.lease.check()
    except UserError:
        writer.abandon()
        raise
    state = {
        "step": run.step,
        "skipped": run.skipped,
        "held_out": run.held_out,
        "best": run.best,
        "probe": {"loss": probe, "precision": run.recipe.train.precision},
        "loss_scale": engines.loss_scale(run.engine),
        **identity(run.recipe, run.objective),
    }
    path = writer.finish(state)
    write_run_manifest(run.folder, state)
    keep = run.recipe.checkpoint
    prune(run.folder, keep.keep_last, keep.keep_every_steps, keep.keep_best)
    return path
