"""Reports and comparisons of runs, on records written by hand and on a run that was resumed with other settings."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.common.files import UserError
from pretrain.compare import compare
from pretrain.record import read_record
from pretrain.report import report
from tests.pretrain.runs import run_case, settings
from tests.ranks import Ranks

START = {"train.steps": 9, "train.global_batch_tokens": 1000, "ranks": 1, "devices": "1 x CPU", "data.shards": "abc"}


def recorded(run: Path, losses: list[float], starts: dict[int, dict[str, Any]], end: str = "") -> Path:
    """A run with these losses from step 1 on."""
    run.mkdir()
    lines: list[dict[str, Any]] = [{"step": step, "start": START | start} for step, start in starts.items()]
    lines += [{"step": step, "train/loss": loss, "train/tokens_per_second": 7.0} for step, loss in enumerate(losses, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return run


def test_the_first_difference_and_its_causes_are_named(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", [3.0, 2.0, 1.0], {0: {}})
    b = recorded(tmp_path / "b", [3.0, 2.0, 1.0 + 2**-52], {0: {}, 2: {"ranks": 2}})
    said = compare(a, b)
    assert said.startswith("The runs first differ at step 3.") and "| 3 | 1.0 | 1.0000000000000002 | 2.22e-16 |" in said
    assert "| ranks | 1 | 1, 2 from step 2 |" in said and "data.shards" not in said and "tokens_per" not in said


def test_a_later_start_explains_nothing(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", [3.0, 2.0, 1.0], {0: {}})
    b = recorded(tmp_path / "b", [3.0, 2.5, 1.0], {0: {}, 3: {"ranks": 2}})
    assert "step 2." in compare(a, b) and "Nothing recorded" in compare(a, b)
    assert "No curve differs" in compare(a, recorded(tmp_path / "c", [3.0, 2.0, 1.0], {0: {}}, '{"step": 4, "tr'))


def test_a_value_that_is_not_finite_is_a_difference(tmp_path: Path) -> None:
    """It is not recorded; the other figures of its step are."""
    a = recorded(tmp_path / "a", [3.0, 2.0, 1.0], {0: {}})
    b = recorded(tmp_path / "b", [3.0, 2.0, 1.0], {0: {}})
    lines = (b / "metrics.jsonl").read_text().replace('"train/loss": 2.0, ', "")
    (b / "metrics.jsonl").write_text(lines)
    said = compare(a, b)
    assert said.startswith("The runs first differ at step 2.") and "| 2 | 2.0 | not finite | - |" in said


def test_settings_that_change_no_figure_are_not_named(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", [3.0, 2.0], {0: {"log.every_steps": 1, "train.hang_minutes": 5, "train.seed": 1}})
    b = recorded(tmp_path / "b", [3.0, 1.0], {0: {"log.every_steps": 2, "train.hang_minutes": 0, "train.seed": 2}})
    said = compare(a, b)
    assert "| train.seed | 1 | 2 |" in said and "hang" not in said and "log.every" not in said


def test_a_report_is_a_picture_and_a_table_and_replaces_its_like_only(tmp_path: Path) -> None:
    a, out = recorded(tmp_path / "a", [3.0, 2.0], {0: {}}, '{"step": 3, "trai'), tmp_path / "report"
    for _ in range(2):
        assert "| a | 2 of 9 | 2,000 | 2.0000 |" in report([a], out)
    assert Image.open(out / "curves.png").size == (1200, 800) and {p.name for p in out.iterdir()} == {
        "curves.png", "report.md",
    }  # fmt: skip
    (out / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not a report"):
        report([a], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        report([tmp_path / "empty"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_every_start_is_recorded(one_rank: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    chosen = settings(sample_folder / "shards", tmp_path / "run", "evaluate.max_blocks=2")
    for steps in (2, 4):
        one_rank.run(run_case, [*chosen, f"train.steps={steps}"])
    starts = read_record(tmp_path / "run").starts
    assert {step: start["train.steps"] for step, start in starts.items()} == {0: 2, 2: 4}
    assert starts[0]["ranks"] == 1 and starts[0]["devices"].startswith("1 x ") and len(starts[0]["data.shards"]) == 64
