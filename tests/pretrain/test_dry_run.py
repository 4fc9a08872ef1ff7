"""`biogpt train --dry-run` checks what a start checks, computes on data of full size, and leaves nothing behind."""

import contextlib
import io
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrain.dry_run import dry_run
from pretrain.objectives.next_token import NextToken
from pretrain.recipe import load_recipe
from tests.pretrain.runs import run_case, settings
from tests.pretrain.started import BIOGPT, Started
from tests.ranks import Ranks


def tree(folder: Path) -> dict[str, Any]:
    """Path -> content and time of every file, and every folder."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def dry_case(chosen: list[str]) -> tuple[str, list[range]]:
    """What a dry run of the tiny recipe prints, and the blocks of each batch that it trained on."""
    original, batches, printed = NextToken.batch, [], io.StringIO()

    def noted(self: NextToken, numbers: range) -> Any:
        batches.append(numbers)
        return original(self, numbers)

    NextToken.batch = noted  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(printed):
            dry_run(load_recipe("tiny", chosen))
    finally:
        NextToken.batch = original  # type: ignore[method-assign]
    return printed.getvalue(), batches


def test_it_takes_two_steps_of_two_whole_micro_batches_and_makes_no_folder(
    two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    chosen = settings(sample_folder / "shards", tmp_path / "new" / "run", "train.micro_batch_size=2", "train.steps=7")
    (printed, first), (silent, second) = two_ranks.run(dry_case, chosen)
    assert first == [range(0, 2), range(4, 6), range(8, 10), range(12, 14)]
    assert second == [range(2, 4), range(6, 8), range(10, 12), range(14, 16)]
    assert "4 micro-batches of 2 x 64 tokens on each of 2 ranks, 1,024 tokens in all" in printed and not silent
    assert "two steps of 2 of these micro-batches" in printed and "memory of the process" in printed
    assert tree(tmp_path) == {}


def test_a_mistake_that_only_the_ranks_find_leaves_nothing(
    two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"no tensors")
    before = tree(tmp_path)
    chosen = settings(sample_folder / "shards", tmp_path / "run", f"model.weights={tmp_path / 'weights.safetensors'}")
    for mistake in two_ranks.run(dry_mistake_case, chosen):
        assert "weights.safetensors" in mistake
    assert tree(tmp_path) == before


def dry_mistake_case(chosen: list[str]) -> str:
    from data.common.files import UserError

    try:
        dry_run(load_recipe("tiny", chosen))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_the_command_leaves_a_run_as_it_was_and_says_what_it_would_do(
    two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    chosen = settings(sample_folder / "shards", tmp_path / "run", "checkpoint.every_steps=2")
    two_ranks.run(run_case, [*chosen, "train.steps=2"])
    before = tree(tmp_path)
    command = [*BIOGPT, "--dry-run", *chosen, "train.steps=4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("without --dry-run this would resume from step-0000002")
    assert tree(tmp_path) == before
    refused = subprocess.run([*command, "model.num_hidden_layers=3"], capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "num_hidden_layers" in refused.stderr and tree(tmp_path) == before


@pytest.mark.slow
def test_control_c_ends_it_at_once_and_leaves_nothing(
    started: list[Started], sample_folder: Path, tmp_path: Path
) -> None:
    run = Started([*BIOGPT, "--dry-run"], tmp_path, sample_folder / "shards")
    started.append(run)
    deadline = time.monotonic() + 120
    while not run.ranks() and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = run.ranks()
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT and ranks
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive
    assert tree(tmp_path) == {}
