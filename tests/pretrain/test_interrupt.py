"""Stopping a run from outside: by signals, by file, by the clock; ranks that die."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from pretrain.checkpoint import newest_checkpoint
from pretrain.recipe import load_recipe
from pretrain.train import train
from tests.pretrain.runs import metrics, run_case, settings
from tests.pretrain.started import BIOGPT, TORCHRUN, Started
from tests.ranks import Ranks

MANY = ["train.steps=100000", "evaluate.max_blocks=2", "checkpoint.every_steps=100000"]


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_and_exit_0(
    started: list[Started], tmp_path: Path, sample_folder: Path
) -> None:
    run = Started(TORCHRUN, tmp_path, sample_folder / "shards", *MANY)
    started.append(run)
    run.wait_for_step(3)
    run.ranks()[1].send_signal(signal.SIGTERM)
    assert run.end() == 0, run.output()
    assert run.saved_step() == run.last_step() < 100_000
    assert "stopped by a signal" in run.output()


def test_control_c_on_biogpt_train_saves_and_the_same_command_goes_on(
    started: list[Started], tmp_path: Path, sample_folder: Path
) -> None:
    run = Started(BIOGPT, tmp_path, sample_folder / "shards", *MANY)
    started.append(run)
    run.wait_for_step(3)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 0, run.output()
    stopped, said = run.saved_step(), run.output()
    assert f"step {stopped} of 100000; next: run the same command to resume" in said
    assert "stopped by the stop file" in said and not (run.run / "stop").exists()
    again = Started(BIOGPT, tmp_path, sample_folder / "shards", *MANY, f"train.steps={stopped + 2}")
    started.append(again)
    assert again.end() == 0
    assert f"resumed from step-{stopped:07d}" in again.output() and again.saved_step() == stopped + 2


def test_a_second_signal_ends_a_rank_at_once_even_inside_a_collective(
    started: list[Started], tmp_path: Path, sample_folder: Path
) -> None:
    run = Started(TORCHRUN, tmp_path, sample_folder / "shards", *MANY)
    started.append(run)
    run.wait_for_step(2)
    waiting, asleep = run.ranks()
    asleep.suspend()
    time.sleep(1)  # the other one now waits for it
    waiting.send_signal(signal.SIGTERM)
    time.sleep(4)
    assert waiting.is_running() and waiting.status() != psutil.STATUS_ZOMBIE
    waiting.send_signal(signal.SIGTERM)
    asleep.resume()
    assert run.end() != 0
    assert newest_checkpoint(run.run) == (None, [])


def test_a_killed_rank_ends_the_others(started: list[Started], tmp_path: Path, sample_folder: Path) -> None:
    run = Started(TORCHRUN, tmp_path, sample_folder / "shards", *MANY)
    started.append(run)
    run.wait_for_step(2)
    ranks = run.ranks()
    ranks[1].kill()
    before = time.monotonic()
    assert run.end() != 0
    assert time.monotonic() - before < 60
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert newest_checkpoint(run.run) == (None, [])


@pytest.mark.slow
def test_torchrun_restarts_a_run_from_its_newest_checkpoint_with_the_same_curve(
    started: list[Started], two_ranks: Ranks, tmp_path: Path, sample_folder: Path
) -> None:
    shards, chosen = sample_folder / "shards", ["train.steps=60", "checkpoint.every_steps=4", "evaluate.max_blocks=2"]
    two_ranks.run(run_case, settings(shards, tmp_path / "whole", *chosen))
    launcher = [*TORCHRUN[:1], "--max-restarts=1", *TORCHRUN[1:]]
    run = Started(launcher, tmp_path, shards, *chosen)
    started.append(run)
    run.wait_for_step(6)
    run.ranks()[0].kill()
    assert run.end(timeout=120) == 0, run.output()
    assert "resumed from step-" in run.output()
    assert metrics(run.run, "train/loss") == metrics(tmp_path / "whole", "train/loss")


def job_end_case(chosen: list[str]) -> tuple[int, str]:
    """A Slurm job that ends in four minutes."""
    os.environ["SLURM_JOB_END_TIME"] = str(time.time() + 240)
    try:
        run = train(load_recipe("tiny", chosen))
    finally:
        del os.environ["SLURM_JOB_END_TIME"]
    return run.step, run.stop_reason


def minutes_case(chosen: list[str]) -> tuple[int, str]:
    run = train(load_recipe("tiny", chosen))
    return run.step, run.stop_reason


def test_the_clock_stops_all_ranks_at_the_same_step(two_ranks: Ranks, tmp_path: Path, sample_folder: Path) -> None:
    shards = sample_folder / "shards"
    results = two_ranks.run(minutes_case, settings(shards, tmp_path / "a", *MANY, "train.stop_after_minutes=0.02"))
    assert results[0] == results[1] and results[0][1] == "the time limit" and 0 < results[0][0] < 100_000
    results = two_ranks.run(job_end_case, settings(shards, tmp_path / "b", *MANY))
    assert results == [(1, "the end of the Slurm job")] * 2
