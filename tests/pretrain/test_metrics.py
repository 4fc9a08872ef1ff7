"""What a run reports: figures of speed, metrics.jsonl and TensorBoard over a resume."""

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.metrics import Metrics, Reporter, rank_figures, spike_bound
from pretrain.objectives.next_token import NextToken
from pretrain.recipe import load_recipe
from pretrain.run import Run
from tests.data.common.small_disk import room, small_disk
from tests.pretrain.runs import metrics, run_case, settings
from tests.ranks import Ranks


def test_flops_of_biogpt_are_the_published_figure() -> None:
    recipe = load_recipe("biogpt")
    assert recipe.decoder_config(42_384).flops_per_token(1024) == pytest.approx(2.383e9, rel=1e-3)


def curve(run: Path) -> list[tuple[int, float]]:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("train/loss")]


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = Metrics(tmp_path, 0, 10)
    for step in range(1, 6):
        first.write(step, {"train/loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "train/lo')  # a line that a kill cut short
    second = Metrics(tmp_path, 3, 10)
    for step in range(4, 7):
        second.write(step, {"train/loss": 10.0 * step})
    second.close()
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == expected
    assert curve(tmp_path) == expected


def test_a_new_run_in_an_old_folder_starts_an_empty_record(tmp_path: Path) -> None:
    """A run killed before its first checkpoint begins again."""
    for _ in range(2):
        record = Metrics(tmp_path, 0, 10)
        record.write(0, {"validation/loss": 9.0})
        record.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("full", ["both", "metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_said_once_and_the_record_is_whole_when_there_is_room(
    full: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk takes a part of a line of 700 bytes, and the rest of it comes first when there is room."""
    with small_disk(tmp_path / "disk") as disk:
        run = tmp_path / "run" if full == "tensorboard" else disk / "run"
        board = tmp_path / "board" if full == "metrics.jsonl" else disk / "board"
        run.mkdir()
        board.mkdir()
        (run / "tensorboard").symlink_to(board)
        values = {f"{'x' * 60}/{number}": 0.0 for number in range(9)}
        metrics = Metrics(run, 0, 99)

        def write(steps: range) -> None:
            for step in steps:
                metrics.write(step, {"train/loss": float(step), **values})

        write(range(1, 10))
        with room(disk, 1):
            write(range(10, 30))
            cut = (run / "metrics.jsonl").read_bytes()
        write(range(30, 40))
        metrics.close()
        said = capsys.readouterr().out
        assert said.count("warning") == 1 and f"the disk {disk} is full (" in said and "; the run goes on" in said
        assert cut.endswith(b"\n") == (full == "tensorboard")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 40))
        assert curve(run) == [(step, float(step)) for step in range(1, 40)]


def test_progress_lines_are_plain_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Metrics(tmp_path, 0, 10)
    record.line(5, "loss 1.0", passing=True)
    record.close()
    out = capsys.readouterr().out
    assert out.startswith("step 5/10  loss 1.0") and "\x1b" not in out and out.endswith("\n")


def observed(tmp_path: Path, losses: list[float]) -> str:
    """What a reporter prints over steps with these losses."""
    tmp_path.mkdir()
    recipe = load_recipe("tiny", ["train.steps=1000", "log.every_steps=1000"])
    unused: Any = None
    run = Run(
        recipe=recipe, objective=unused, folder=tmp_path, engine=unused, optimizer=unused,
        device=torch.device("cpu"), rank=0, ranks=1,
    )  # fmt: skip
    reporter, said = Reporter(run), io.StringIO()
    with contextlib.redirect_stdout(said), patch("pretrain.engine.updated_numbers", lambda *_: {}):
        for loss in losses:
            run.step += 1
            reporter.after_step(
                run, {"loss": loss, "applied": True, "blocks": "", "seconds": 1.0, "rank_seconds": [1.0]}
            )
    reporter.close()
    return said.getvalue().removeprefix("step 1/1000  \n")


def test_a_spike_is_reported_once_and_what_is_usual_is_not(tmp_path: Path) -> None:
    usual = [5.0 + 0.02 * (step % 3) for step in range(120)]
    assert observed(tmp_path / "usual", usual) == ""
    said = observed(tmp_path / "spike", [*usual, 6.5, *usual[:20]])
    assert said.count("warning") == 1 and "step 121/1000  warning: loss 6.5000 is a spike over 5.0" in said


def test_a_spike_stands_out_of_what_is_usual() -> None:
    usual = [5.0 + 0.01 * (-1) ** step for step in range(100)]
    assert max(usual) < spike_bound(usual) < 5.2
    noisy = [5.0 + 0.2 * (-1) ** step for step in range(100)]
    assert spike_bound(noisy) > 6.0


def test_the_slowest_rank_is_the_one_with_the_most_seconds() -> None:
    found = rank_figures([0.3, 0.1, 0.9, 0.2])
    assert found == {
        "rank_seconds_min": 0.1,
        "rank_seconds_median": pytest.approx(0.25),
        "rank_seconds_max": 0.9,
        "slowest_rank": 2,
    }


def slow_data_case(chosen: list[str]) -> None:
    """Rank 1 waits 0.1 s for each of its batches."""
    original = NextToken.batch

    def batch(objective: NextToken, numbers: range) -> Any:
        time.sleep(0.1 * dist.get_rank())
        return original(objective, numbers)

    with patch.object(NextToken, "batch", batch):
        run_case(chosen)


def test_a_rank_with_slow_data_is_named(two_ranks: Ranks, tmp_path: Path, sample_folder: Path) -> None:
    """Rank 0 waits for it in each step, and is not called slow for that."""
    steps = ["train.steps=4", "evaluate.max_blocks=2", "deepspeed.stage=2"]
    two_ranks.run(slow_data_case, settings(sample_folder / "shards", tmp_path / "run", *steps))
    assert set(metrics(tmp_path / "run", "train/slowest_rank").values()) == {1}
    most, least = (metrics(tmp_path / "run", f"train/rank_seconds_{name}") for name in ("max", "min"))
    assert all(most[step] > 0.2 > least[step] for step in (2, 3, 4))  # two micro-batches a step; the first is warm-up
