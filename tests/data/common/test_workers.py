"""data/common/workers.py: the same results wherever the tasks run; receipts, dead workers, files that fail."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from data.common import files as files_module
from data.common.files import ShareDone, TasksFailed, UserError
from data.common.workers import ATTEMPTS, Cluster, JobArray, Task, progress, run_tasks, share_of
from tests.shared import ROOT


def make_tasks(folder: Path, number: int, **settings: Any) -> list[Task]:
    """Inputs "0", "1" ... whose content is their name."""
    tasks = []
    for index in range(number):
        source = folder / f"in-{index}"
        source.write_text(str(index))
        digest = hashlib.sha256(str(index).encode()).hexdigest()
        tasks.append(Task("corpus part", source, digest, folder / "parts" / source.name, settings))
    return tasks


def square(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Later tasks end earlier, so that the order of the results is not that of their ends. Calls are written down."""
    number = int(source.read_text())
    with (source.parent / "calls").open("a") as calls:
        calls.write(f"{number}\n")
    time.sleep(0.05 * max(4 - number, 0))
    (folder / "square").write_text(str(number * number + settings.get("add", 0)))
    return {"square": number * number, "process": os.getpid() if settings.get("tell") else 0}


def calls(folder: Path) -> list[int]:
    """The tasks that were begun, each once for each time."""
    path = folder / "calls"
    begun = sorted(map(int, path.read_text().split())) if path.exists() else []
    path.unlink(missing_ok=True)
    return begun


def meet(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Ends only when the other task runs too."""
    number = int(source.read_text())
    (source.parent / f"here-{number}").touch()
    deadline = time.monotonic() + 60
    while not (source.parent / f"here-{1 - number}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return {"process": os.getpid()}


def fail_at_two(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if source.read_text() == "2":
        raise UserError("raw/2.xml: damaged")
    if source.read_text() == "3":
        raise ZeroDivisionError("a bug")
    return square(source, folder, settings)


def die(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Task 1 kills its worker as often as the settings say, half a file written."""
    deaths = source.parent / "deaths"
    before = len(deaths.read_bytes()) if deaths.exists() else 0
    if source.read_text() == "1" and before < settings["deaths"]:
        deaths.write_bytes(b"x" * (before + 1))
        (folder / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    return square(source, folder, settings)


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int, tmp_path: Path) -> None:
    done = run_tasks(square, make_tasks(tmp_path, 5), workers, "squares")
    assert [counts["square"] for counts in done] == [0, 1, 4, 9, 16]
    assert (tmp_path / "parts" / "in-3" / "square").read_text() == "9"


def test_two_workers_work_at_once(tmp_path: Path) -> None:
    processes = {counts["process"] for counts in run_tasks(meet, make_tasks(tmp_path, 2), 2, "meeting")}
    assert len(processes) == 2 and os.getpid() not in processes


def test_one_worker_is_this_process(tmp_path: Path) -> None:
    done = run_tasks(square, make_tasks(tmp_path, 2, tell=True), 1, "alone")
    assert {counts["process"] for counts in done} == {os.getpid()}


def test_no_task_at_all() -> None:
    assert run_tasks(square, [], 4, "nothing") == []


# Receipts


def test_a_receipt_says_what_was_made_of_what(tmp_path: Path) -> None:
    run_tasks(square, make_tasks(tmp_path, 3, add=5), 1, "squares")
    receipt = json.loads((tmp_path / "parts" / "in-2" / "manifest.json").read_text())
    digest = hashlib.sha256(b"2").hexdigest()
    assert receipt["request"] == {"source": "in-2", "sha256": digest, "settings": {"add": 5}}
    assert (
        receipt["counts"] == {"square": 4, "process": 0} and receipt["version"] == files_module.VERSIONS["corpus part"]
    )
    assert receipt["files"] == {"square": {"bytes": 1, "sha256": hashlib.sha256(b"9").hexdigest()}}


def test_what_its_receipt_proves_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another input, setting or format, a changed or missing output, a changed receipt: that task alone is done."""
    tasks = make_tasks(tmp_path, 4)
    first = run_tasks(square, tasks, 1, "squares")
    assert calls(tmp_path) == [0, 1, 2, 3]
    whole, parts = listing(tmp_path / "parts"), tmp_path / "parts"
    assert run_tasks(square, tasks, 1, "squares") == first and calls(tmp_path) == []
    (parts / "in-1" / "square").write_text("2")
    (parts / "in-2" / "square").unlink()
    (parts / "in-3" / "manifest.json").write_text((parts / "in-3" / "manifest.json").read_text().replace("9", "8"))
    assert run_tasks(square, tasks, 1, "squares") == first and calls(tmp_path) == [1, 2, 3]
    assert listing(parts) == whole
    changed = [*tasks[:3], Task("corpus part", tasks[3].source, "other", tasks[3].folder, {})]
    run_tasks(square, changed, 1, "squares")
    assert calls(tmp_path) == [3]
    run_tasks(square, make_tasks(tmp_path, 4, add=1), 1, "squares")
    assert calls(tmp_path) == [0, 1, 2, 3] and (parts / "in-2" / "square").read_text() == "5"
    monkeypatch.setitem(files_module.VERSIONS, "corpus part", files_module.VERSIONS["corpus part"] + 1)
    run_tasks(square, make_tasks(tmp_path, 4, add=1), 1, "squares")
    assert calls(tmp_path) == [0, 1, 2, 3]


def test_a_killed_command_goes_on_where_it_was(tmp_path: Path) -> None:
    """kill -9 of the parent: its workers end with it, and the next run does only what has no receipt."""
    code = (
        "import sys; from pathlib import Path; from tests.data.common.test_workers import *\n"
        "tasks = make_tasks(Path(sys.argv[1]), 40, add=1)\n"
        "if __name__ == '__main__': run_tasks(slowly, tasks, 2, 'squares')"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("parts/*/manifest.json"))) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(0.5)
    done = {path.parent.name for path in tmp_path.glob("parts/in-*/manifest.json")}
    calls(tmp_path)
    time.sleep(0.5)
    assert calls(tmp_path) == []  # no orphan works on
    run_tasks(square, make_tasks(tmp_path, 40, add=1), 1, "squares")
    assert 5 <= len(done) < 40 and calls(tmp_path) == sorted(set(range(40)) - {int(name[3:]) for name in done})


def slowly(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    time.sleep(0.1)
    return square(source, folder, settings)


# Faults


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_fails_is_named_after_the_rest_is_done(workers: int, tmp_path: Path) -> None:
    with pytest.raises(TasksFailed) as caught:
        run_tasks(fail_at_two, make_tasks(tmp_path, 9), workers, "failing")
    first, second = caught.value.failures
    assert first == "raw/2.xml: damaged" and caught.value.tasks == 9
    assert second.startswith(f"{tmp_path / 'in-3'}: Traceback") and "ZeroDivisionError: a bug" in second
    assert {path.parent.name for path in tmp_path.glob("parts/*/manifest.json")} == {
        f"in-{index}" for index in (0, 1, 4, 5, 6, 7, 8)
    }


def test_a_worker_that_dies_has_its_file_done_again(tmp_path: Path) -> None:
    tasks = make_tasks(tmp_path, 6, deaths=ATTEMPTS - 1)
    assert [counts["square"] for counts in run_tasks(die, tasks, 2, "dying")] == [0, 1, 4, 9, 16, 25]
    assert (tmp_path / "deaths").read_bytes() == b"x" * (ATTEMPTS - 1)
    died = listing(tmp_path / "parts")
    (tmp_path / "whole").mkdir()
    tasks = make_tasks(tmp_path / "whole", 6, deaths=ATTEMPTS - 1)
    run_tasks(square, tasks, 1, "whole")
    assert listing(tmp_path / "whole" / "parts") == died and not list(tmp_path.glob("parts/*/half"))


def test_a_file_that_always_kills_its_worker_is_named(tmp_path: Path) -> None:
    with pytest.raises(TasksFailed) as caught:
        run_tasks(die, make_tasks(tmp_path, 6, deaths=100), 2, "dying")
    assert caught.value.failures == [f"{tmp_path / 'in-1'}: its worker died {ATTEMPTS} times (killed, out of memory?)"]
    assert len(list(tmp_path.glob("parts/*/manifest.json"))) == 5


# Job arrays and clusters


def test_three_elements_of_a_job_array_do_all_between_them(tmp_path: Path) -> None:
    for element in (2, 1, 3):
        array = JobArray(element, 3)
        with pytest.raises(ShareDone, match=f"part {element} of 3 is done, {3 if element < 3 else 2} files"):
            run_tasks(square, share_of(make_tasks(tmp_path, 8), array), array, "squares")
    assert calls(tmp_path) == list(range(8))
    done = run_tasks(square, make_tasks(tmp_path, 8), 1, "squares")
    assert calls(tmp_path) == [] and [counts["square"] for counts in done] == [0, 1, 4, 9, 16, 25, 36, 49]


def test_an_element_whose_file_fails_says_so(tmp_path: Path) -> None:
    with pytest.raises(TasksFailed):
        run_tasks(fail_at_two, share_of(make_tasks(tmp_path, 3), JobArray(3, 3)), JobArray(3, 3), "failing")


def test_a_cluster_without_ray_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="Ray is not installed"):
        run_tasks(square, make_tasks(tmp_path, 2), Cluster("auto"), "squares")


def test_a_cluster_that_does_not_answer_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once, before Ray is asked, which would try for minutes."""
    ray, exceptions = ModuleType("ray"), ModuleType("ray.exceptions")
    exceptions.RayError = OSError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        with pytest.raises(UserError, match=f"--cluster {address}: .*refused"):
            run_tasks(square, make_tasks(tmp_path, 2), Cluster(address), "squares")


def test_a_ray_cluster_gives_the_same_bytes_though_a_worker_is_killed(ray_cluster: str, tmp_path: Path) -> None:
    """Task 1 kills its worker twice; a file that fails is named as everywhere."""
    tasks = make_tasks(tmp_path, 6, deaths=ATTEMPTS - 1)
    done = run_tasks(die, tasks, Cluster(ray_cluster), "dying")
    assert [counts["square"] for counts in done] == [0, 1, 4, 9, 16, 25]
    assert (tmp_path / "deaths").read_bytes() == b"x" * (ATTEMPTS - 1)
    (tmp_path / "whole").mkdir()
    run_tasks(square, make_tasks(tmp_path / "whole", 6, deaths=ATTEMPTS - 1), 1, "whole")
    assert listing(tmp_path / "whole" / "parts") == listing(tmp_path / "parts")
    (tmp_path / "failing").mkdir()
    with pytest.raises(TasksFailed) as caught:
        run_tasks(fail_at_two, make_tasks(tmp_path / "failing", 6), Cluster(ray_cluster), "failing")
    assert caught.value.failures[0] == "raw/2.xml: damaged" and "ZeroDivisionError" in caught.value.failures[1]
    (tmp_path / "always").mkdir()
    with pytest.raises(TasksFailed, match=r"in-1: WorkerCrashedError 3 times"):
        run_tasks(die, make_tasks(tmp_path / "always", 3, deaths=100), Cluster(ray_cluster), "dying")


def test_off_a_terminal_progress_is_one_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("files", 3) as advance:
        advance()
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err == "files: 3 of 3\n"


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    with progress("files", 3) as advance:
        for _ in range(3):
            advance()
    assert "files" in shown.getvalue() and "3/3" in shown.getvalue() and "of 3" not in shown.getvalue()
