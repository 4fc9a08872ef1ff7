"""data/workers.py: the same results, in order, wherever the tasks run; an error of a task is the caller's."""

import os
import time
from pathlib import Path

import pytest

from data.files import UserError
from data.workers import progress, run_tasks


def slow_square(number: int) -> int:
    """Later tasks end earlier, so that the order of the results is not that of their ends."""
    time.sleep(0.05 * (4 - number))
    return number * number


def meet(number: int, folder: Path) -> int:
    """Ends only when the other task runs too. Returns its process."""
    (folder / str(number)).touch()
    deadline = time.monotonic() + 60
    while not (folder / str(1 - number)).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return os.getpid()


def fail_at_two(number: int, folder: Path) -> None:
    (folder / str(number)).touch()
    if number == 2:
        raise UserError("raw/2.xml: damaged")
    time.sleep(0.02)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    assert run_tasks(slow_square, [(number,) for number in range(5)], workers, "squares") == [0, 1, 4, 9, 16]


def test_two_workers_work_at_once(tmp_path: Path) -> None:
    processes = set(run_tasks(meet, [(0, tmp_path), (1, tmp_path)], 2, "meeting"))
    assert len(processes) == 2 and os.getpid() not in processes


def test_one_worker_is_this_process(tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    assert run_tasks(meet, [(0, tmp_path)] * 2, 1, "alone") == [os.getpid()] * 2


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_ends_the_others(workers: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^raw/2\.xml: damaged$"):
        run_tasks(fail_at_two, [(number, tmp_path) for number in range(200)], workers, "failing")
    done = {int(path.name) for path in tmp_path.iterdir()}
    assert {0, 1, 2} <= done and len(done) < 200


def test_no_task_at_all() -> None:
    assert run_tasks(slow_square, [], 4, "nothing") == []


def test_off_a_terminal_progress_is_one_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("files", 3) as advance:
        advance()
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err == "files: 3 of 3\n"
