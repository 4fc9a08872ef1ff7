"""What a run reports: `metrics.jsonl`, TensorBoard and the progress line. Only rank 0 reports."""

import io
import json
import math
import os
import resource
import socket
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]  # made at import
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
from tensorboard.summary.writer.record_writer import RecordWriter

from data.common.disk import disk_full, disk_full_named, is_full
from data.common.files import whole_file
from pretrain import engine as engines
from pretrain.gpus import GPUS
from pretrain.norms import squared_norms, whole_norms
from pretrain.run import Observer, Run
from pretrain.start import in_words, start_record
from pretrain.stopwatch import PARTS

SPIKE_WINDOW = 100  # steps
SLOW_RANK = 1.5  # times the median rank's own work
SLOW_DATA = 0.05  # of the time of a step


def peak_flops() -> float | None:
    """The peak of this GPU, in floating point operations a second. None if unknown: a wrong MFU would mislead."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((gpu.peak_flops for gpu in GPUS.values() if gpu.device_name in name), None)


class Appended:
    """A file that grows. Bytes that a full disk does not take are kept and come first the next time.

    So a line that was cut short is completed, and nothing is lost while the process lives.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._stream, self._left = path, path.open("ab", buffering=0), b""

    def write(self, content: bytes) -> bool:
        """Append; whether all of it is on the disk, which may be full."""
        self._left += content
        try:
            while self._left:
                self._left = self._left[self._stream.write(self._left) :]
        except OSError as error:
            if not is_full(error):
                raise
        return not self._left

    def close(self) -> None:
        """Write what is left, if there is room now, and close the file."""
        self.write(b"")
        self._stream.close()


def event_record(**fields: Any) -> bytes:
    """An event as TensorBoard's files hold it. Its own writer is a thread, which a full disk ends for good."""
    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return record.getvalue()


class Metrics:
    """The record of a run. A resumed run drops what was recorded after its checkpoint.

    A full disk is said once, and the run goes on; see `Appended`.
    """

    def __init__(self, run: Path, start_step: int, steps: int) -> None:
        path, self._steps = run / "metrics.jsonl", steps
        with disk_full_named(run, str(path)):
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start_step]
            with whole_file(path) as stream:
                stream.write("".join(kept if start_step else []).encode())
            (run / "tensorboard").mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
            self._lines, self._events = Appended(path), Appended(run / "tensorboard" / name)
        self._full, self._terminal = False, sys.stdout.isatty()
        self._started, self._start_step = time.monotonic(), start_step
        first = start_step + 1 if start_step else 0  # TensorBoard hides what earlier files hold from this step on
        session = event_record(step=first, session_log=SessionLog(status=SessionLog.START))
        self._append(start_step, b"", event_record(file_version="brain.Event:2") + session)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record the values of a step. TensorBoard groups names by the part before the slash."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        line = json.dumps({"step": step, **values}) + "\n"
        self._append(step, line.encode(), event_record(step=step, summary=summary))

    def write_start(self, step: int, start: dict[str, Any]) -> None:
        """Record what this start is made with (`start_record`). TensorBoard shows figures alone, so it gets nothing."""
        self._append(step, (json.dumps({"step": step, "start": start}) + "\n").encode(), b"")

    def _append(self, step: int, line: bytes, event: bytes) -> None:
        """Append to both files. Warn if a disk is full that was not before."""
        full = [file.path for file, content in ((self._lines, line), (self._events, event)) if not file.write(content)]
        if full and not self._full:
            fault = disk_full(full[0], str(full[0]), "make room")
            self.line(step, f"warning: {fault}; the run goes on")
        self._full = bool(full)

    def line(self, step: int, text: str, passing: bool = False) -> None:
        """Print a line of progress. On a terminal, a passing line is overwritten by the next one."""
        done = max(step - self._start_step, 1)
        left = (time.monotonic() - self._started) / done * (self._steps - step)
        hours, seconds = divmod(int(left), 3600)
        clock = f"{hours}:{seconds // 60:02d}:{seconds % 60:02d}"
        text = f"step {step}/{self._steps}  {text}" + (f"  left {clock}" if passing and step > self._start_step else "")
        try:
            if self._terminal:
                print(f"\r\x1b[2K{text}", end="" if passing else "\n", flush=True)
            else:
                print(text, flush=True)
        except OSError as error:  # the output goes into a file on a full disk
            if not is_full(error):
                raise

    def close(self) -> None:
        """Flush everything."""
        self._lines.close()
        self._events.close()


class Reporter(Observer):
    """Reports the steps of a run and warns of spikes. The other observers report through its `say`."""

    def __init__(self, run: Run) -> None:
        self.metrics = Metrics(run.folder, run.step, run.recipe.train.steps) if run.rank == 0 else None
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._steps, self._seconds = 0, 0.0  # since the last report, without evaluations and checkpoints
        self._rank_seconds = [0.0] * run.ranks  # since the last report: each rank's own work
        self._parts = dict.fromkeys(PARTS, 0.0)  # at the last report: seconds of each part of the run
        self._gradients: dict[str, float] = {}  # squared norms of this rank's part of them, if this step is reported
        self._told_rules = False

    def begin(self, run: Run) -> None:
        """Print the first line, and record what this start is made with."""
        begun = f"resumed from {run.resumed_from}" if run.resumed_from else "new run"
        start = start_record(run)
        if self.metrics:
            self.metrics.write_start(run.step, start)
        self.say(run, f"{begun}: {in_words(run)}")
        for line in run.objective.warnings():
            self.say(run, f"warning: {line}")

    def say(self, run: Run, text: str, passing: bool = False, **values: float) -> None:
        """Print a line and record the finite values for this step. Does nothing on other ranks than 0."""
        if self.metrics:
            finite = {name.replace("__", "/"): value for name, value in values.items() if math.isfinite(value)}
            if finite:
                self.metrics.write(run.step, finite)
            self.metrics.line(run.step, text, passing)

    def before_update(self, run: Run) -> None:
        """Take the norms of the gradients if this step will be reported."""
        self._gradients = {}
        if (run.step + 1) % run.recipe.log.every_steps == 0 or run.step + 1 == run.recipe.train.steps:
            scale = engines.gradient_scale(run.engine)
            squared = squared_norms(engines.own_fragments(run.engine, run.optimizer, "gradient"))
            self._gradients = {group: value / scale**2 for group, value in squared.items()}

    def after_step(self, run: Run, report: dict[str, Any]) -> None:
        """Report every n-th step, and a skipped step or a spike at once."""
        loss = report["loss"]
        self._steps, self._seconds = self._steps + 1, self._seconds + report["seconds"]
        self._rank_seconds = [sum(pair) for pair in zip(self._rank_seconds, report["rank_seconds"], strict=True)]
        if report["applied"] and not self._told_rules:
            self._told_rules = True
            counts = engines.updated_numbers(run.engine, run.optimizer).items()
            self.say(run, ", ".join(f"{rule} updates {count:,} parameters" for rule, count in counts))
        if not report["applied"]:
            self.say(run, f"warning: skipped, a gradient is not finite (blocks {report['blocks']}, loss {loss:.4f})")
        elif len(self._recent) == SPIKE_WINDOW and loss > spike_bound(self._recent):
            self.say(run, f"warning: loss {loss:.4f} is a spike over {statistics.fmean(self._recent):.4f}")
        if math.isfinite(loss):
            self._recent.append(loss)
        if run.ending or run.step % run.recipe.log.every_steps == 0:
            self._report(run, report)

    def _report(self, run: Run, report: dict[str, Any]) -> None:
        size, objective = run.recipe.global_batch_size(), run.objective
        speed = objective.tokens(range((run.step - self._steps) * size, run.step * size)) / self._seconds
        ranks = rank_figures([seconds / self._steps for seconds in self._rank_seconds])
        parts = self._part_seconds(run)
        norms, memory = self._norms_and_memory(run)
        epochs = objective.epochs(run.step * size)
        self._steps, self._seconds, self._rank_seconds = 0, 0.0, [0.0] * run.ranks
        values = {f"train__{name}": report[name] for name in ("loss", "learning_rate", "gradient_norm")}
        values |= {"train__tokens_per_second": speed, "train__skipped_steps": run.skipped}
        values |= {f"train__{name}": value for name, value in ranks.items()}
        values |= {"train__tokens": objective.tokens(range(run.step * size)), **norms}
        for section, figures in (("epochs", epochs), ("seconds", parts), ("memory", memory)):
            values |= {f"{section}__{name}": value for name, value in figures.items()}
        text = f"loss {report['loss']:.4f}  norm {report['gradient_norm']:.3g}  lr {report['learning_rate']:.2e}"
        text += f"  epoch {max(epochs.values()):.2f}  {max(memory.values()):.1f} GiB  {speed:,.0f} tokens/s"
        peak = peak_flops()
        if peak:
            mfu = speed * objective.config.flops_per_token(run.recipe.context_length()) / (peak * run.ranks)
            values["train__mfu"] = mfu
            text += f"  MFU {mfu:.1%}"
        if parts["data"] > SLOW_DATA * (sum(parts.values()) - parts["evaluation"] - parts["checkpoint"]):
            text += f"  data {parts['data']:.2g} s a step"
        if ranks["rank_seconds_max"] > SLOW_RANK * ranks["rank_seconds_median"]:
            text += f"  rank {ranks['slowest_rank']} is slow"
        self.say(run, text, passing=not run.ending, **values)

    def _part_seconds(self, run: Run) -> dict[str, float]:
        """Seconds of each part of the run since the last report, divided by the steps since then."""
        before, self._parts = self._parts, run.stopwatch.seconds.copy()
        return {part: (seconds - before[part]) / self._steps for part, seconds in self._parts.items()}

    def _norms_and_memory(self, run: Run) -> tuple[dict[str, float], dict[str, float]]:
        """Norms of gradients and weights by group, over all ranks; memory, of the rank that uses most.

        Every rank must call it.
        """
        weights = squared_norms(engines.own_fragments(run.engine, run.optimizer, "model"))
        ranks: list[Any] = [None] * run.ranks
        dist.all_gather_object(ranks, (self._gradients, weights, memory_figures(run.device)))
        gradients, weights, memory = (list(each) for each in zip(*ranks, strict=True))
        norms = {f"gradient_norm__{group}": norm for group, norm in whole_norms(gradients).items()}
        norms |= {f"weight_norm__{group}": norm for group, norm in whole_norms(weights).items()}
        return norms, {name: max(figures[name] for figures in memory) for name in memory[0]}

    def close(self) -> None:
        """Flush everything."""
        if self.metrics:
            self.metrics.close()


def memory_figures(device: torch.device) -> dict[str, float]:
    """On a GPU, the most GiB that tensors took, and that torch reserved for them, since the last call.

    On a CPU, the most that this process has ever had in memory.
    """
    if device.type == "cuda":
        taken = {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
        torch.cuda.reset_peak_memory_stats(device)
    else:
        taken = {"process_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return {f"{name}_gib": value / 2**30 for name, value in taken.items()}


def rank_figures(seconds: list[float]) -> dict[str, float]:
    """The least, median and most seconds of own work that a step takes on a rank, and which rank is the slowest."""
    most = max(seconds)
    figures = {"min": min(seconds), "median": statistics.median(seconds), "max": most}
    return {f"rank_seconds_{name}": value for name, value in figures.items()} | {"slowest_rank": seconds.index(most)}


def spike_bound(recent: Iterable[float]) -> float:
    """A loss above this is a spike: six standard deviations over the recent mean, and at least 0.1 nats."""
    losses = list(recent)
    return statistics.fmean(losses) + max(6 * statistics.pstdev(losses), 0.1)
