"""The benchmark of a GPU, dry: every row at a tiny size on the CPU."""

from pathlib import Path

import pytest

from tests.bench import gpu


@pytest.mark.slow
def test_every_row_runs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    failed = gpu.main(["--device", "cpu", "--minutes", "60", "--out", str(tmp_path / "gpu.md")])
    table = (tmp_path / "gpu.md").read_text()
    assert not failed, table
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(gpu.ROWS) and "not measured" not in table


def wrong(place: gpu.Place) -> str:
    raise AssertionError("other losses")


def endless(place: gpu.Place) -> str:
    while True:
        pass


@pytest.mark.slow
def test_a_row_that_is_wrong_or_never_ends_fails_alone(tmp_path: Path) -> None:
    place = gpu.Place("cpu", tmp_path)
    assert gpu.measured(gpu.Row("", wrong), place, 60) == "**FAILED**: AssertionError: other losses"
    assert gpu.measured(gpu.Row("", endless), place, 1) == "**FAILED**: not done within 1 s"


def test_the_largest_that_fits_is_found_to_within_4() -> None:
    """By a step that has room for 37 and no more."""

    def step(number: int, micro_batch_size: int) -> None:
        if micro_batch_size > 37:
            raise gpu.torch.OutOfMemoryError

    assert 33 < gpu.largest_that_fits(step, "cpu", 1024) <= 37
    assert gpu.largest_that_fits(step, "cpu", 32) == 32
