"""The observer that writes a run's checkpoints; and loading one, where rank 0 decides for all ranks.

Each rank takes its own share of the state, without a collective. The other ranks write their shares to hidden files,
and rank 0 merges those and its own into the files of the checkpoint. In the background (`checkpoint.background`) a
rank copies its share first, and the loop goes on; otherwise it waits. How far each rank is travels in the all-reduce of
each step, so that all ranks agree on what comes next, and only the main threads call collectives.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

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
from pretrain.evaluate import Evaluator, probe_loss
from pretrain.metrics import Reporter
from pretrain.run import Observer, Run
from pretrain.run_folder import write_run_manifest
from pretrain.tensor_file import Fragment, Layout, all_finite, write_share

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
            box[1] = _portable(error)
    dist.broadcast_object_list(box)
    if box[1]:
        raise box[1]
    return box[0]


def _portable(error: BaseException) -> Exception:
    """An error as it is sent to other ranks: a mistake with its text, a bug with its rank and type."""
    if isinstance(error, UserError):
        return DiskFull(str(error)) if isinstance(error, DiskFull) else UserError(str(error))
    return Exception(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")


def load_newest(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The newest whole checkpoint of a run and its state, or (None, {}) for a new run. Rank 0 decides for all ranks."""
    checkpoint, faults = on_rank_0(newest_checkpoint, folder)
    if checkpoint is None:
        return None, {}
    if dist.get_rank() == 0:
        for fault in faults:
            print(f"biogpt: warning: {fault}; resuming from {checkpoint.name}", flush=True)
    return checkpoint, read_state(checkpoint)


WORKING, READY, FAILED = 0, 1, 2
"""How far a rank is with its part of a checkpoint."""


@dataclass
class Pending:
    """A checkpoint that is being written."""

    writer: CheckpointWriter
    state: dict[str, Any]
    """What `state.json` will hold."""
    shares: dict[str, list[Fragment]]
    """Kind -> this rank's share."""
    begun: float
    """When its writing began, by the monotonic clock."""
    copy_seconds: float
    work: Future[Any]
    """What this rank is doing for it: writing its share; on rank 0, then, merging all shares."""
    merging: bool = False


class Saver(Observer):
    """Writes a checkpoint every `checkpoint.every_steps` steps and at the end, and removes old ones by rule."""

    def __init__(self, run: Run, reporter: Reporter, evaluator: Evaluator) -> None:
        self._reporter, self._evaluator = reporter, evaluator
        self._layout = Layout(run.engine.module)
        self._executor = ThreadPoolExecutor(1)
        self._pending: Pending | None = None

    def begin(self, run: Run) -> None:
        """Compare the first loss after a resume with the recorded one. Raises RuntimeError if they differ."""
        if not run.recorded_probe:
            return
        recorded, found = run.recorded_probe["loss"], probe_loss(run)
        bound = max(PROBE_BOUND[run.recipe.train.precision], PROBE_BOUND[run.recorded_probe["precision"]])
        if not abs(found - recorded) <= bound:
            raise RuntimeError(
                f"the first loss after the resume from {run.resumed_from} is {found:.6f}, recorded was"
                f" {recorded:.6f}: the weights did not come back"
            )

    def code(self) -> int:
        """How far this rank is with the pending checkpoint. Every rank's code reaches `after_step` in the report."""
        if self._pending is None or not self._pending.work.done():
            return WORKING
        return FAILED if self._pending.work.exception() else READY

    def after_step(self, run: Run, report: dict[str, Any]) -> None:
        """Bring the pending checkpoint further, and begin one if it is due.

        If the disk is full the run goes on, unless this was its last step.
        """
        with run.stopwatch.part("checkpoint"):
            if self._pending:
                self._advance(run, report["saver_codes"])
            if run.ending or run.step % run.recipe.checkpoint.every_steps == 0:
                self._wait(run)  # for the one before
                if not run.stop_reason:
                    self._evaluator.evaluate(run)
                probe = self._evaluator.probe(run)
                self._save(run, probe, background=run.recipe.checkpoint.background and not run.ending)

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown()

    def _save(self, run: Run, probe: float, background: bool) -> None:
        """Take this rank's share and begin to write it. Not in the background: write the whole checkpoint.

        Raises Diverged on every rank if the loss is not finite.
        """
        if not math.isfinite(probe):
            raise Diverged(run.folder, run.step, f"the held-out loss is {probe}")
        run.stamp(f"the checkpoint of step {run.step}", long=True)
        begun = time.monotonic()
        writer = CheckpointWriter(run.folder, run.step)
        try:
            on_rank_0(_begin, run, writer)
        except DiskFull as error:
            self._disk_is_full(run, str(error))
            return
        kinds = ("model", *run.optimizer.state_names)
        shares = {kind: list(engines.own_fragments(run.engine, run.optimizer, kind)) for kind in kinds}
        if background:
            for share in shares.values():
                share[:] = [(name, start, values.to("cpu", copy=True)) for name, start, values in share]
        state = {
            "step": run.step,
            "skipped": run.skipped,
            "held_out": run.held_out,
            "best": run.best,
            "probe": {"loss": probe, "precision": run.recipe.train.precision},
            "loss_scale": engines.loss_scale(run.engine),
            **identity(run.recipe, run.objective),
        }
        work = self._executor.submit(_write_share, run, writer, shares, self._layout)
        self._pending = Pending(writer, state, shares, begun, time.monotonic() - begun, work)
        if not background:
            self._wait(run)

    def _wait(self, run: Run) -> None:
        """Wait until no checkpoint is pending."""
        while self._pending:
            run.stamp(f"the checkpoint of step {self._pending.writer.step}", long=True)
            wait([self._pending.work])
            codes = [0.0] * run.ranks
            dist.all_gather_object(codes, self.code())
            self._advance(run, codes)

    def _advance(self, run: Run, codes: list[float]) -> None:
        """Take the pending checkpoint's next step, which is the same on every rank. codes: of all ranks."""
        pending = self._pending
        assert pending
        if FAILED in codes:
            self._fail(run, pending)
        elif not pending.merging and all(code == READY for code in codes):
            pending.merging = True
            if run.rank == 0:
                pending.work = self._executor.submit(_merge, run, pending, self._layout)
            else:
                pending.shares.clear()
        elif pending.merging and codes[0] == READY:
            self._pending = None
            self._report(run, pending)

    def _report(self, run: Run, pending: Pending) -> None:
        """Say that a checkpoint is complete, and what it cost."""
        if run.rank:
            return
        path, verify_seconds = pending.work.result()
        seconds, spent = time.monotonic() - pending.begun, run.stopwatch.seconds
        share = spent["checkpoint"] / sum(spent.values())
        self._reporter.say(
            run,
            f"checkpoint {path}  after {seconds:.1f} s (copy {pending.copy_seconds:.1f}, verify {verify_seconds:.1f});"
            f" checkpoints took {share:.1%} of the run",
            checkpoint__seconds=seconds,
            checkpoint__copy_seconds=pending.copy_seconds,
            checkpoint__verify_seconds=verify_seconds,
            checkpoint__share_of_run=share,
        )

    def _fail(self, run: Run, pending: Pending) -> None:
        """Drop the pending checkpoint. A full disk is a warning; anything else is raised, on every rank."""
        self._pending = None
        wait([pending.work])
        error = pending.work.exception()
        faults: list[Any] = [None] * run.ranks
        dist.all_gather_object(faults, error and _portable(error))
        if run.rank == 0:
            pending.writer.abandon()
        fault = next(each for each in faults if each)
        if not isinstance(fault, DiskFull):
            raise error or fault
        self._disk_is_full(run, str(fault))

    def _disk_is_full(self, run: Run, fault: str) -> None:
        if run.ending:
            newest = pointed_at(run.folder)
            kept = f"{run.folder / 'latest'} names {newest}" if newest else "there is no checkpoint"
            raise UserError(f"{fault}; step {run.step} is not saved, {kept}")
        self._reporter.say(run, f"warning: no checkpoint: {fault}")


def _begin(run: Run, writer: CheckpointWriter) -> None:
    """Make the hidden folder, if the disk has room for the checkpoint; DiskFull otherwise."""
    if fault := space_fault(run.folder, run.optimizer.numbers, run.ranks):
        raise DiskFull(fault)
    with _disk_full_named(run):
        writer.begin()


def _disk_full_named(run: Run) -> AbstractContextManager[None]:
    return disk_full_named(run.folder, str(run.folder / "checkpoints"), "make room")


def _write_share(run: Run, writer: CheckpointWriter, shares: dict[str, list[Fragment]], layout: Layout) -> None:
    """Check a rank's share, and write it unless this is rank 0. Raises Diverged if a number of it is not finite."""
    for kind, share in shares.items():
        if name := first_not_finite(share):
            raise Diverged(run.folder, writer.step, f"{kind} {name} holds numbers that are not finite")
    if run.rank:
        with _disk_full_named(run):
            for kind, share in shares.items():
                write_share(writer.share(run.rank, kind), layout.pieces(share))


def first_not_finite(fragments: list[Fragment]) -> str:
    """The name of the first parameter of which a fragment holds an infinity or NaN, or ""."""
    return next((name for name, _, values in fragments if not all_finite(values)), "")


def _merge(run: Run, pending: Pending, layout: Layout) -> tuple[Path, float]:
    """Complete a checkpoint, unless another process has taken the run over, and remove old ones by rule.

    Returns its folder, and the seconds that reading it back took.
    """
    writer, states = pending.writer, run.optimizer.states
    with _disk_full_named(run):
        for kind, share in pending.shares.items():
            names = [name for name in states if kind == "model" or kind in states[name]]
            writer.add(kind, layout.shapes(names), layout.pieces(share), run.ranks)
            share.clear()
        if run.lease:
            run.lease.check()
        write_run_manifest(run.folder, pending.state)  # before `latest`: if the disk is full here, nothing is saved
        verifying = time.monotonic()
        path = writer.finish(pending.state)
        verify_seconds = time.monotonic() - verifying
    keep = run.recipe.checkpoint
    prune(run.folder, keep.keep_last, keep.keep_every_steps, keep.keep_best)
    return path, verify_seconds
