"""Ranks that hang: what the watchdog calls still, whom it names, and whole runs with a stopped rank."""

import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pretrain.recipe import load_recipe
from pretrain.run import Run
from pretrain.watchdog import GRACE, SUSPENDED, Record, Stillness, Watchdog, stacks, verdict
from tests.pretrain.started import BIN, BIOGPT, TORCHRUN, Started

MANY = ["train.steps=100000", "evaluate.max_blocks=2", "checkpoint.every_steps=100000"]
HANGING = [*TORCHRUN[:3], "-m", "tests.pretrain.hanging", "tiny"]


def deepspeed(port: int) -> list[str]:
    return [str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={port}", "--module", "pretrain.train", "tiny"]


def test_still_is_what_does_not_change() -> None:
    stillness = Stillness(100.0)
    assert [stillness.seconds(100.0 + 2 * look, [7, 7]) for look in range(1, 5)] == [0, 2, 4, 6]
    assert stillness.seconds(110.0, [7, 8]) == 0  # another rank moved
    assert stillness.seconds(125.0, [7, 8]) == 15


def test_a_suspended_machine_is_not_still() -> None:
    stillness = Stillness(0.0)
    for now in range(2, 200, 2):
        stillness.seconds(now, [7])
    assert stillness.seconds(200.0, [7]) == 198
    assert stillness.seconds(5000.0, [7]) == 0  # resumed just now
    assert stillness.seconds(5002.0, [7]) == 2


def watched(*more: str) -> Watchdog:
    unused: Any = None
    run = Run(
        recipe=load_recipe("tiny", more), objective=unused, folder=unused, engine=unused, optimizer=unused,
        device=torch.device("cpu"), rank=0, ranks=1,
    )  # fmt: skip
    return Watchdog(run)


def test_the_limit_follows_the_usual_step_and_is_longer_where_work_is_long() -> None:
    unused: Any = None
    dog = watched("train.hang_minutes=2")
    run = dog._run
    assert dog.limit() == 600  # before the first step
    run.stamp("step 1, micro-batch 1 of 1")
    assert dog.limit() == 600  # it may compile
    dog.after_step(unused, {"seconds": 500.0})
    for _ in range(3):
        dog.after_step(unused, {"seconds": 1.0})
    assert dog.limit() == 120
    run.stamp("the evaluation at step 4", long=True)
    assert dog.limit() == 600
    run.stamp("step 5, micro-batch 1 of 1")
    for _ in range(20):
        dog.after_step(unused, {"seconds": 60.0})
    assert dog.limit() == 600  # ten usual steps


def test_a_rank_that_does_not_answer_is_named_before_one_that_is_behind() -> None:
    names = ["rank 0 (a)", "rank 1 (b)", "rank 2 (c)"]
    waits = Record(90, "step 9, the update of the weights", True)
    loops = Record(88, "step 9, micro-batch 1 of 1", True)
    stopped = Record(89, "step 9, micro-batch 2 of 2", False)
    assert verdict(names, [waits, waits, loops]).startswith("rank 2 (c) hangs at step 9, micro-batch 1 of 1 (the stack")
    assert verdict(names, [stopped, waits, loops]).startswith(
        "rank 0 (a) hangs at step 9, micro-batch 2 of 2 (no answer: stopped"
    )
    assert verdict(names, [stopped, waits, stopped]).startswith("rank 0 (a), rank 2 (c) hangs")


def test_the_stack_is_that_of_the_main_thread() -> None:
    assert "test_the_stack_is_that_of_the_main_thread" in stacks()


def stop(run: Started, rank: int) -> tuple[psutil.Process, float]:
    """Stop a rank with SIGSTOP. Returns its process, and when that was."""
    chosen = next(each for each in run.ranks() if each.environ()["RANK"] == str(rank))
    chosen.suspend()
    return chosen, time.monotonic()


def check_named(run: Started, rank: int, process: psutil.Process, begun: float, why: str) -> tuple[int, str]:
    """Wait for the end of a run with a stopped rank. Returns its exit code and output."""
    code, output = run.end(timeout=600), run.output()
    print(f"ended {time.monotonic() - begun:.0f} s after rank {rank} was stopped, exit code {code}")
    named = f"biogpt: error: rank {rank} (process {process.pid} on {socket.gethostname()}) hangs"
    lines = [line for line in output.splitlines() if line.startswith("biogpt: error: ")]
    assert lines and all(line.startswith(named) and why in line for line in lines), output
    assert code != 0 and not process.is_running()
    return code, output


def test_a_stopped_rank_is_named_and_the_waiting_one_shows_its_stack(
    started: list[Started], tmp_path: Path, sample_folder: Path
) -> None:
    run = Started(BIOGPT, tmp_path, sample_folder / "shards", *MANY, "train.hang_minutes=0.1")
    started.append(run)
    run.wait_for_step(3)
    process, begun = stop(run, 1)
    waiting = next(each for each in run.ranks() if each != process)
    waiting.wait(60)
    process.resume()  # torchrun has sent SIGTERM, and would send SIGKILL after 30 s
    code, output = check_named(run, 1, process, begun, "no answer: stopped")
    assert code == 2 and output.splitlines()[-1].startswith("biogpt: error: rank 1 (process ")
    assert re.search(r"biogpt: rank 0 \(.*\) has not moved for \d+ s at step \d+, ", output)
    assert 'pretrain/train.py", line' in output


@pytest.mark.slow  # 31 s; the fast suite keeps the stopped rank
def test_a_rank_that_loops_shows_its_own_stack(
    started: list[Started], tmp_path: Path, sample_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANG", "1")
    run = Started(HANGING, tmp_path, sample_folder / "shards", *MANY, "train.hang_minutes=0.1")
    started.append(run)
    assert run.end() == 1
    output = run.output()
    assert re.search(r"biogpt: error: rank 1 \(.*\) hangs at step 4, the update of the weights \(the stack", output)
    assert output.count("error:") == 1 and "in loops_for_ever" in output


@pytest.mark.slow
def test_ranks_that_are_all_suspended_go_on(started: list[Started], tmp_path: Path, sample_folder: Path) -> None:
    run = Started(TORCHRUN, tmp_path, sample_folder / "shards", *MANY, "train.hang_minutes=0.1")
    started.append(run)
    run.wait_for_step(3)
    ranks = run.ranks()
    for rank in ranks:
        rank.suspend()
    time.sleep(SUSPENDED + 5)
    for rank in ranks:
        rank.resume()
    time.sleep(2 * GRACE)
    run.wait_for_step(run.last_step() + 3)
    ranks[0].send_signal(signal.SIGTERM)
    assert run.end() == 0 and "hangs" not in run.output()


@pytest.mark.slow
def test_each_rank_is_named_at_the_default_limit(started: list[Started], tmp_path: Path, sample_folder: Path) -> None:
    """Under deepspeed, rank 0 holds the store of the ranks, so the store is stopped with it."""
    cases: list[tuple[list[str], int, str]] = [
        (TORCHRUN, 0, "no answer: stopped"), (TORCHRUN, 1, "no answer: stopped"),
        (deepspeed(29541), 0, "it holds the store"), (deepspeed(29542), 1, "no answer: stopped"),
    ]  # fmt: skip
    stopped = []
    for number, (launcher, rank, _) in enumerate(cases):  # they wait together, which takes a quarter of the time
        (tmp_path / str(number)).mkdir()
        started.append(Started(launcher, tmp_path / str(number), sample_folder / "shards", *MANY))
        started[-1].wait_for_step(3)
        stopped.append(stop(started[-1], rank))
    for run, (_, rank, why), (process, begun) in zip(started, cases, stopped, strict=True):
        check_named(run, rank, process, begun, why)


@pytest.mark.slow
def test_a_long_save_and_a_full_evaluation_are_no_hang(
    started: list[Started], tmp_path: Path, sample_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An fsync that takes twice the limit of a step."""
    monkeypatch.setenv("FSYNC", "60")
    few = ["train.steps=8", "checkpoint.every_steps=4", "train.hang_minutes=0.5"]
    run = Started(HANGING, tmp_path, sample_folder / "shards", *few)
    started.append(run)
    begun = time.monotonic()
    assert run.end(timeout=300) == 0, run.output()
    assert time.monotonic() - begun > 120 and run.saved_step() == 8 and "hangs" not in run.output()
