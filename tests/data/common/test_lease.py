"""data/common/lease.py: one command at a time on a folder, with real processes that are killed, stopped and moved."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data.common import lease as lease_module
from data.common.errors import LeaseLost, UserError
from data.common.files import make_folder
from data.common.lease import Lease, hold
from data.common.workers import Task, run_tasks
from tests.paths import ROOT

HOLD = """
import sys, time
from pathlib import Path
from data.common import lease
lease.HEARTBEAT, lease.PERIOD, lease.POLL = 0.1, 1.5, 0.05
{before}
try:
    with lease.hold(Path(sys.argv[1]){element}) as held:
        print("held", flush=True)
        {block}
except lease.UserError as error:
    print(error, flush=True)
    sys.exit(2)
"""
STARTED: list[subprocess.Popen] = []


def process(folder: Path, block: str = "sys.stdin.read()", element: str = "", before: str = "") -> subprocess.Popen:
    """Another process that holds the lease of a folder while it does the block."""
    code = HOLD.format(block=block, element=element and f", {element}", before=before)
    pipe = subprocess.PIPE
    started = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    STARTED.append(started)
    return started


def holding(folder: Path, **more: str) -> subprocess.Popen:
    started = process(folder, **more)
    assert started.stdout and started.stdout.readline() == "held\n", started.stderr and started.stderr.read()
    return started


def end(started: subprocess.Popen) -> tuple[int, str]:
    """Let a process end its block. Returns its exit code and what it printed since."""
    out, error = started.communicate("", timeout=60)
    return started.returncode, out + error


def kill(started: subprocess.Popen) -> None:
    started.kill()
    started.wait()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, seconds in (("HEARTBEAT", 0.1), ("PERIOD", 1.5), ("POLL", 0.05)):
        monkeypatch.setattr(lease_module, name, seconds)
    yield
    while STARTED:
        kill(STARTED.pop())


def elsewhere(path: Path, **changes: Any) -> None:
    """Rewrite a lease as another host's, in place, so that its holder's beats go on arriving."""
    head = path.read_bytes().split(b"\n")[0]
    holder = json.loads(head) | {"boot": "f" * len(json.loads(head)["boot"])} | changes
    changed = json.dumps(holder).encode()
    assert len(changed) == len(head)
    with path.open("r+b") as stream:
        stream.write(changed)


def refused(folder: Path, match: str = "is being written by process", **more: Any) -> str:
    with pytest.raises(UserError, match=match) as caught, hold(folder, **more):
        raise AssertionError
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_second_command_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    other = holding(tmp_path / "out")
    assert files(tmp_path) == [".out.lease"]
    said = refused(tmp_path / "out")
    assert re.search(rf"process {other.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC; wait", said)
    assert process(tmp_path / "out").wait(timeout=60) == 2
    assert end(other) == (0, "") and files(tmp_path) == []
    with hold(tmp_path / "out"):
        assert files(tmp_path) == [".out.lease"]
    assert files(tmp_path) == []


def test_one_folder_has_one_lease_by_whatever_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    with hold(Path("real")):
        for path in (tmp_path / "real", Path("link"), Path("real/../real"), Path("./real")):
            refused(path)
        with hold(Path("other")):
            assert files(tmp_path) == [".other.lease", ".real.lease", "link", "real"]


@pytest.mark.parametrize("block", ["raise ValueError", "raise KeyboardInterrupt", "sys.exit(3)"])
def test_the_lease_is_removed_at_the_end_whatever_happens(block: str, tmp_path: Path) -> None:
    other = holding(tmp_path / "deep" / "out", block=block)
    assert end(other)[0] not in (0, 2) and files(tmp_path) == []


def test_ctrl_c_removes_the_lease(tmp_path: Path) -> None:
    other = holding(tmp_path / "out")
    other.send_signal(signal.SIGINT)
    end(other)
    assert files(tmp_path) == []


def test_after_kill_9_the_same_host_goes_on_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the dead process is a zombie, which its parent has not asked after."""
    monkeypatch.setattr(lease_module, "PERIOD", 1000.0)
    other = holding(tmp_path / "out")
    os.kill(other.pid, signal.SIGKILL)
    while "Z" not in Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2]:
        time.sleep(0.01)
    for _ in range(2):
        started = time.monotonic()
        with hold(tmp_path / "out") as lease:
            lease.check()
        assert time.monotonic() - started < 1 and files(tmp_path) == []
        other.wait()
        kill(other := holding(tmp_path / "out"))
    with hold(tmp_path / "out"):
        pass


def test_a_process_id_that_was_given_to_another_process_is_dead(tmp_path: Path) -> None:
    with hold(tmp_path / "old"):
        content = (tmp_path / ".old.lease").read_bytes()
    head, beats = content.split(b"\n", 1)
    holder = json.loads(head)
    (tmp_path / ".out.lease").write_bytes(
        json.dumps(holder | {"started": holder["started"] - 1}).encode() + b"\n" + beats
    )
    with hold(tmp_path / "out"):
        pass


@pytest.mark.parametrize("name", ["boot", "pid_namespace", "host"])
def test_another_host_or_container_is_judged_by_its_heartbeat(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its process id means nothing here, though one of that number may run or not."""
    other = holding(tmp_path / "out")
    path = tmp_path / ".out.lease"
    here = json.loads(path.read_bytes().split(b"\n")[0])
    elsewhere(path, **({"boot": here["boot"]} | {name: "x" * len(here[name])}))
    started = time.monotonic()
    refused(tmp_path / "out")
    assert time.monotonic() - started < 1.4 and "looking for up to" in capsys.readouterr().err
    kill(other)  # its heart stands still
    started = time.monotonic()
    with hold(tmp_path / "out") as lease:
        assert 1.4 < time.monotonic() - started < 5
        lease.check()
    assert files(tmp_path) == []


def test_the_hosts_clocks_do_not_matter(tmp_path: Path) -> None:
    other = holding(tmp_path / "out")
    elsewhere(tmp_path / ".out.lease", since="2001-01-01 00:00:00 UTC")
    os.utime(tmp_path / ".out.lease", (0, 0))
    assert "since 2001" in refused(tmp_path / "out")
    assert end(other)[0] == 0


def test_an_empty_lease_is_taken_over_after_a_period(tmp_path: Path) -> None:
    """What a file system without links may leave, or a power cut."""
    for content in (b"", b"\0" * 200):
        (tmp_path / ".out.lease").write_bytes(content)
        started = time.monotonic()
        with hold(tmp_path / "out"):
            assert time.monotonic() - started > 1.4


def test_a_file_of_the_users_is_no_lease(tmp_path: Path) -> None:
    for content in ("years of work", "[]", '{"pid": 1}'):
        (tmp_path / ".out.lease").write_text(content)
        with pytest.raises(UserError, match=r"is no lease of this program, .* move it away"), hold(tmp_path / "out"):
            raise AssertionError
        assert (tmp_path / ".out.lease").read_text() == content and files(tmp_path) == [".out.lease"]


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    with hold(tmp_path / "out") as lease:
        lease.check()
        refused(tmp_path / "out")
    kill(holding(tmp_path / "out"))
    with hold(tmp_path / "out") as lease:
        lease.check()
    assert files(tmp_path) == []


# Waiters


@pytest.mark.parametrize("dead", ["here", pytest.param("elsewhere", marks=pytest.mark.slow)])
def test_of_many_waiters_one_takes_over(dead: str, tmp_path: Path) -> None:
    """Real processes at once, again and again. The winner ends only when the others have been refused."""
    for round_ in range(3 if dead == "elsewhere" else 5):
        out = tmp_path / f"out{round_}"
        other = holding(out)
        if dead == "elsewhere":
            elsewhere(tmp_path / f".{out.name}.lease")
        kill(other)
        start = time.time() + 1.5
        waiters = [process(out, before=f"time.sleep(max(0, {start} - time.time()))") for _ in range(4)]
        said = []
        for waiter in waiters:
            assert waiter.stdout
            said.append(waiter.stdout.readline())
        assert said.count("held\n") == 1, said
        assert sum("is being written by process" in line for line in said) == 3, said
        assert sorted(end(waiter)[0] for waiter in waiters) == [0, 2, 2, 2] and files(tmp_path) == []


def test_a_waiter_that_is_killed_while_it_takes_over_stops_nobody(tmp_path: Path) -> None:
    """Before and after the rename. What it leaves is removed."""
    for moment in ("before", "after"):
        kill(holding(tmp_path / "out"))
        die = "import os; os.kill(os.getpid(), 9)"
        replace = "lambda self, to: (" + ("real(self, to), " if moment == "after" else "") + "os.kill(os.getpid(), 9))"
        waiter = process(tmp_path / "out", before=f"import os; real = Path.replace; Path.replace = {replace}")
        assert waiter.wait(timeout=60) == -9, die
        assert len(files(tmp_path)) > 1
        with hold(tmp_path / "out") as lease:
            lease.check()
        assert files(tmp_path) == []


# A holder that wakes up


def test_a_holder_that_was_stopped_for_too_long_writes_nothing_more(tmp_path: Path) -> None:
    """SIGSTOP, as of a suspended host. Another host takes over; the first one wakes up before the other is done."""
    block = "make_folder(Path(sys.argv[1]), 'corpus', {}, fill, held)"
    before = (
        "from data.common.files import make_folder\n"
        "def fill(folder):\n"
        "    (folder / 'a').write_text('of the first'); print('filled', flush=True); sys.stdin.readline()\n"
        "    (folder / 'b').write_text('of the first'); return {}"
    )
    first = holding(tmp_path / "out", block=block, before=before)
    assert first.stdin and first.stdout and first.stdout.readline() == "filled\n"
    first.send_signal(signal.SIGSTOP)
    elsewhere(tmp_path / ".out.lease")

    def fill(folder: Path) -> dict[str, Any]:
        (folder / "a").write_text("of the second")
        first.send_signal(signal.SIGCONT)
        code, said = end(first)
        assert code == 2 and f"lease {tmp_path}/.out.lease was taken over by process {os.getpid()}" in said, said
        return {"by": "the second"}

    assert make_folder(tmp_path / "out", "corpus", {}, fill)["counts"] == {"by": "the second"}
    assert files(tmp_path) == ["out"] and files(tmp_path / "out") == ["a", "manifest.json"]
    assert (tmp_path / "out" / "a").read_text() == "of the second"


def lose(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    (folder / "part.bin").write_text("by who lost the lease")
    Path(settings["lease"]).unlink(missing_ok=True)
    return {}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_task_whose_lease_is_lost_makes_no_part(workers: int, tmp_path: Path) -> None:
    with hold(tmp_path / "out") as lease:
        tasks = [
            Task("shards part", tmp_path / name, "0", tmp_path / "out.parts" / name, {"lease": str(lease.path)})
            for name in ("one", "two", "three")
        ]
        with pytest.raises(LeaseLost, match=r"was taken over; this command stood still for too long"):
            run_tasks(lose, tasks, workers, "losing", lease)
    assert list((tmp_path / "out.parts").iterdir()) == []


def test_another_ones_lease_is_not_removed_at_the_end(tmp_path: Path) -> None:
    with hold(tmp_path / "out") as lease:
        lease.path.write_text("another's")
        with pytest.raises(LeaseLost):
            lease.check()
    assert lease.path.read_text() == "another's"


# Job arrays


def test_elements_share_a_folder_and_exclude_the_command_without_part(tmp_path: Path) -> None:
    one, two = holding(tmp_path / "out", element="(1, 3)"), holding(tmp_path / "out", element="(2, 3)")
    with hold(tmp_path / "out", (3, 3)):
        assert files(tmp_path) == [".out.1-of-3.lease", ".out.2-of-3.lease", ".out.3-of-3.lease"]
    assert refused(tmp_path / "out", "part 1 of 3 is being written").count(str(one.pid)) == 1
    refused(tmp_path / "out", "is being written", element=(1, 3))  # the same element twice
    refused(tmp_path / "out", "part 1 of 3 is being written", element=(3, 4))  # another division
    assert end(one) == end(two) == (0, "") and files(tmp_path) == []
    whole = holding(tmp_path / "out")
    refused(tmp_path / "out", "it is being written", element=(1, 3))
    assert end(whole) == (0, "") and files(tmp_path) == []


def test_a_dead_element_stops_nobody(tmp_path: Path) -> None:
    kill(holding(tmp_path / "out", element="(1, 3)"))
    kill(holding(tmp_path / "out", element="(2, 3)"))
    elsewhere(tmp_path / ".out.2-of-3.lease")
    with hold(tmp_path / "out"):
        assert files(tmp_path) == [".out.lease"]
    kill(holding(tmp_path / "out"))
    with hold(tmp_path / "out", (1, 3)):
        assert files(tmp_path) == [".out.1-of-3.lease"]


# Threads and places


def test_two_threads_are_two_holders(tmp_path: Path) -> None:
    inside, told = threading.Event(), threading.Event()

    def other() -> None:
        with hold(tmp_path / "out"):
            inside.set()
            told.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    assert str(os.getpid()) in refused(tmp_path / "out")
    told.set()
    thread.join()


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), PermissionError(13, "Permission denied")])
def test_finished_work_may_lie_where_nobody_can_write(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        return {"made": 1}

    make_folder(tmp_path / "out", "corpus", {}, fill)
    real: Callable[..., int] = os.open

    def read_only(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_CREAT:
            raise error
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", read_only)
    assert make_folder(tmp_path / "out", "corpus", {}, fill)["counts"] == {"made": 1}
    with pytest.raises(UserError, match="other: cannot be written"):
        make_folder(tmp_path / "other", "corpus", {}, fill)


def test_a_lease_is_known_to_workers_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with hold(Path("out")) as lease:
        assert lease == Lease(Path("out"), tmp_path / ".out.lease", lease.token)
        (tmp_path / "below").mkdir()
        monkeypatch.chdir("below")
        lease.check()
