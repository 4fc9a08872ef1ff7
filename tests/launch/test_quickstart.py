"""`biogpt quickstart --objective`: each objective ends in its own check."""

import sys
from pathlib import Path

import pytest
import torch

from data.common.files import UserError
from launch.cli import main
from launch.quickstart import OBJECTIVES, check_sources, run_quickstart
from pretrain.held_out import Batch, HeldOut, OtherSources


def test_an_objective_that_does_not_exist_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["biogpt", "quickstart", "--objective", "music", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.endswith(f"--objective music: choose from {', '.join(OBJECTIVES)}")
    assert not (tmp_path / "out").exists()


class Rows(HeldOut):
    """Sources and targets that say their number."""

    examples = 7

    def batch(self, numbers: range, batch_size: int) -> Batch:
        rows = torch.tensor([*numbers, *[-1] * (batch_size - len(numbers))])
        return rows[:, None].repeat(1, 3), rows[:, None].repeat(1, 2)

    def counted_targets(self, numbers: range) -> int:
        return 2 * len(numbers)

    def figures(self, loss: float) -> dict[str, float]:
        return {"loss": loss}


def test_other_sources_are_those_of_other_examples_of_the_batch() -> None:
    sources, labels = OtherSources(Rows()).batch(range(4, 7), 4)
    assert sources[:, 0].tolist() == [6, 4, 5, -1] and labels[:, 0].tolist() == [4, 5, 6, -1]
    assert sources.shape == (4, 3) and OtherSources(Rows()).counted_targets(range(4)) == 8


def test_a_model_that_does_not_use_its_sources_has_not_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for others, learned in ((3.2, True), (3.05, False)):
        figures = ({"loss": 3.0}, {"loss": others})
        monkeypatch.setattr("pretrain.inference.figures_with_sources", lambda run, figures=figures: figures)
        if learned:
            check_sources(tmp_path)
        else:
            with pytest.raises(UserError, match="the model did not learn"):
                check_sources(tmp_path)
        assert f"{others:.4f}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "next_token"])
def test_every_objective_learns_and_goes_on_where_it_was(
    objective: str, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """next_token is in tests/end_to_end."""
    out = tmp_path_factory.getbasetemp() / "quickstart"
    for _ in range(2):
        run_quickstart(out, objective)
    assert f"The model is in {out / objective / 'hf'}" in capsys.readouterr().out
