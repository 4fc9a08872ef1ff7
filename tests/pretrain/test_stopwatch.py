"""The split of a run's time, by a clock that only the parts of the run move."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed import DeepSpeedEngine

from pretrain import engine as engines
from pretrain.evaluate import Evaluator
from pretrain.interrupt import StopRequest
from pretrain.objectives.next_token import NextToken
from pretrain.saver import Saver
from pretrain.stopwatch import Stopwatch
from pretrain.watchdog import Watchdog
from tests.pretrain.runs import metrics, run_case, settings
from tests.ranks import Ranks


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def move(self, seconds: float) -> None:
        self.now += seconds

    @contextmanager
    def moved_by(self, owner: Any, name: str, seconds: float) -> Iterator[None]:
        """In the block, each call of a function moves the clock."""
        original: Callable[..., Any] = getattr(owner, name)

        def call(*arguments: Any, **more: Any) -> Any:
            self.move(seconds)
            return original(*arguments, **more)

        with patch.object(owner, name, call):
            yield


def test_the_parts_add_up_to_the_whole_time_and_a_part_inside_another_interrupts_it() -> None:
    clock = Clock()
    with patch("time.perf_counter", lambda: clock.now):
        stopwatch = Stopwatch(torch.device("cpu"))
        clock.move(1)
        with stopwatch.part("checkpoint"):
            clock.move(2)
            with stopwatch.part("evaluation"):
                clock.move(4)
            clock.move(8)
        assert stopwatch.since_read("checkpoint") == 10
        with pytest.raises(ZeroDivisionError), stopwatch.part("data"):
            clock.move(16)
            _ = 1 / 0
        clock.move(32)
        with stopwatch.part("forward"):
            stopwatch.read()
            assert stopwatch.since_read("checkpoint", "data") == 0
            clock.move(64)
        stopwatch.read()
    found = {part: seconds for part, seconds in stopwatch.seconds.items() if seconds}
    assert found == {"checkpoint": 10, "evaluation": 4, "data": 16, "forward": 64, "other": 33}
    assert sum(found.values()) == clock.now


def test_on_a_gpu_no_more_events_are_kept_than_one_step_needs_and_nobody_waits_for_them() -> None:
    clock, events = Clock(), set()

    class Event:
        """As torch's, without a GPU; it cannot be waited for."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            events.add(self)

        def record(self) -> None:
            self.at = clock.now

        def elapsed_time(self, later: "Event") -> float:
            return (later.at - self.at) * 1e3

    with patch("torch.cuda.Event", Event):
        stopwatch = Stopwatch(torch.device("cuda"))
        for _ in range(100):
            with stopwatch.part("data"):
                clock.move(0.5)
            stopwatch.read()
            assert len(stopwatch._marks) == 1
    assert len(events) == 201
    assert stopwatch.seconds["data"] == 50


def moved_clock_case(chosen: list[str]) -> None:
    """A run in which each part moves the clock by an amount of its own, and nothing else does."""
    clock = Clock()
    moves: list[tuple[Any, str, float]] = [
        (NextToken, "batch", 1),
        (DeepSpeedEngine, "forward", 10),
        (DeepSpeedEngine, "backward", 100),
        (engines, "finish_step", 1_000),
        (Evaluator, "_evaluate", 0),
        (Saver, "_save", 20_000),
        (Watchdog, "after_step", 300_000),
        (StopRequest, "code", 4_000_000),
    ]
    with patch("time.perf_counter", lambda: clock.now):
        blocks = [clock.moved_by(*move) for move in moves]
        for block in blocks:
            block.__enter__()
        try:
            run_case(chosen)
        finally:
            for block in reversed(blocks):
                block.__exit__(None, None, None)


def test_what_a_part_of_a_run_takes_is_recorded_as_that_part(
    one_rank: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """4 micro-batches a step; reports after steps 2 and 4. An evaluation of 2 micro-batches and a save after step 2."""
    run = tmp_path / "run"
    more = ["train.steps=4", "log.every_steps=2", "checkpoint.every_steps=2", "evaluate.every_steps=2"]
    more += ["evaluate.max_blocks=8", "checkpoint.background=false"]
    one_rank.run(moved_clock_case, settings(sample_folder / "shards", run, *more))
    parts = ("data", "forward", "backward", "optimizer", "evaluation", "checkpoint", "observers", "other")
    found = {part: metrics(run, f"seconds/{part}") for part in parts}
    assert found["data"] == {2: 4, 4: 4}
    assert found["forward"] == {2: 40, 4: 40}
    assert found["backward"] == {2: 400, 4: 400}
    assert found["optimizer"] == {2: 1_000, 4: 1_000}
    assert found["evaluation"] == {2: 10, 4: 10}  # at step 0 before the first report, at step 2 before the second
    assert found["checkpoint"] == {2: 0, 4: 10_000}
    assert found["observers"] == {2: 150_000, 4: 300_000}  # those of the last step are not over yet
    assert found["other"] == {2: 2_000_000, 4: 4_000_000}  # up to the last end of a part, so not that of the last step
