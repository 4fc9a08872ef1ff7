"""A lease: while a command writes a folder, no other command does.

    with hold(Path("corpus")) as lease:
        ...                 # a second command on this folder ends here, and says who holds it
        lease.check()       # before each final rename: raises LeaseLost if another command took the lease over

The lease of `corpus` is the file `.corpus.lease` beside it, which may lie on a file system that several hosts share. It
names its holder and ends in a counter, the heartbeat, which a thread of the holder raises every HEARTBEAT seconds. The
file is removed at the end. What was left by a killed holder is taken over:

- at once, if the holder was a process of this host, as its death can be seen;
- otherwise once the heartbeat has stood still for PERIOD. The waiter measures that by its own clock, so the hosts'
  clocks need not agree. If the heartbeat moves, the holder is alive, and the waiter ends.

A lease is created by a hard link and taken over by a rename, both of which are atomic. Whoever takes over a lease first
needs a lease to do so, on a name that depends on the dead lease's bytes. So of many waiters only one takes over.

An element of a job array holds a lease of its own, `.corpus.2-of-16.lease`. Elements of one array share the folder; a
command without `--part`, and the elements of an array of another size, do not.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.common.errors import LeaseLost, UserError
from data.common.ownership import MANIFEST

HEARTBEAT = 5.0  # seconds between two beats of a holder
PERIOD = 60.0  # seconds without a beat after which a holder that cannot be seen counts as dead
POLL = 0.25  # seconds between two looks at another's lease
DIGITS = 20  # of the heartbeat: all have the same width, so that a beat overwrites the one before
ALIVE, DEAD, UNKNOWN = "alive", "dead", "unknown"
NO_WRITING = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Lease:
    """The right to write a folder. Workers in other processes and on other hosts may check it too."""

    folder: Path  # as the user named it
    path: Path  # of the file; absolute
    token: str  # of this lease alone

    def check(self) -> None:
        """Raise LeaseLost if the lease is not ours any more: this process slept for too long, or it was removed."""
        content = _read(self.path)
        if content is None or _holder(content).get("token") != self.token:
            now = f" by {_describe(content)}" if content else ""
            raise LeaseLost(
                f"{self.folder}: its lease {self.path} was taken over{now}; this command stood still for too long and"
                " ends without writing more"
            )


class _Held(Exception):
    """Another process, which is alive, holds a lease. The argument is the file's content."""


@contextmanager
def hold(folder: Path, element: tuple[int, int] | None = None) -> Iterator[Lease]:
    """Hold the lease of a folder, which need not exist yet, until the block ends.

    element: the number and the size, if this process is an element of a job array. Raises UserError if another process
    holds the folder; waits for up to PERIOD if it cannot see whether that one is alive.
    """
    place = folder.resolve()
    made = _make_parents(folder, place.parent)
    path = place.parent / _file_name(place.name, element)
    token = secrets.token_hex(4)
    header = json.dumps(_identity() | {"token": token}).encode() + b"\n"
    try:
        try:
            descriptor = _claim(path, header, folder)
        except _Held as held:
            raise _refusal(folder, held.args[0]) from None
        except OSError as error:
            if error.errno not in NO_WRITING:
                raise
            if (folder / MANIFEST).is_file():  # finished work may lie where nobody can write
                yield Lease(folder, path, token)
                return
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
        ended = threading.Event()
        heart = threading.Thread(target=_beat, args=(descriptor, len(header), ended), daemon=True)
        heart.start()
        try:
            _end_others(folder, place, element, header)
            _remove_left(path)
            yield Lease(folder, path, token)
        finally:
            ended.set()
            heart.join()
            os.close(descriptor)
            _release(path, token)
    finally:
        for parent in made:
            with suppress(OSError):  # it holds something now
                parent.rmdir()


def _make_parents(folder: Path, parent: Path) -> list[Path]:
    """Make the missing folders above a folder. Returns them, the innermost first."""
    missing = [each for each in (parent, *parent.parents) if not each.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    return missing


def _file_name(name: str, element: tuple[int, int] | None) -> str:
    return f".{name}.lease" if element is None else f".{name}.{element[0]}-of-{element[1]}.lease"


def _end_others(folder: Path, place: Path, element: tuple[int, int] | None, header: bytes) -> None:
    """Raise UserError if a lease that excludes ours is alive. Dead ones are removed.

    Ours is there already, so of two that begin at once at least one sees the other.
    """
    pattern = re.compile(rf"\.{re.escape(place.name)}\.(?:(\d+)-of-(\d+)\.)?lease")
    for name in sorted(path.name for path in place.parent.iterdir()):
        found = pattern.fullmatch(name)
        if not found or name == _file_name(place.name, element) or (element and found[2] == str(element[1])):
            continue
        try:
            os.close(_claim(place.parent / name, header, folder))
            (place.parent / name).unlink()
        except _Held as held:
            what = f"part {found[1]} of {found[2]}" if found[1] else ""
            raise _refusal(folder, held.args[0], what) from None


def _remove_left(path: Path) -> None:
    """Remove what waiters that were killed left beside our lease. Nobody decides by it while we hold the lease."""
    for left in path.parent.glob(f"{path.name}.*"):
        content = _read(left)
        if content is not None and _state(content) == DEAD:
            left.unlink(missing_ok=True)


def _refusal(folder: Path, content: bytes, what: str = "") -> UserError:
    return UserError(f"{folder}: {what or 'it'} is being written by {_describe(content)}; wait for its end or stop it")


def _claim(path: Path, header: bytes, folder: Path) -> int:
    """Create a lease or take over a dead one. Returns its open descriptor. Raises _Held if its holder is alive."""
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(descriptor, header + _beats(0))
        os.fsync(descriptor)
        watched, deadline = None, 0.0
        while not _create(fresh, path, descriptor):
            if (found := _read(path)) is None:
                continue  # it was released just now, so try again
            if found.strip(b"\0") and "token" not in _holder(found):
                raise UserError(f"{path}: is no lease of this program, which would write there; move it away")
            state = _state(found)
            if state == ALIVE or (watched is not None and found != watched):  # its heart beats, or another took it over
                raise _Held(found)
            if state == UNKNOWN and watched is None:
                watched, deadline = found, time.monotonic() + PERIOD
                print(
                    f"biogpt: {folder}: is held by {_describe(found)}; looking for up to {PERIOD:.0f} seconds whether"
                    " that one is alive",
                    file=sys.stderr,
                )
            if (state == DEAD or time.monotonic() >= deadline) and _replace(fresh, path, found, header, folder):
                break
            time.sleep(POLL)
    except BaseException:
        os.close(descriptor)
        raise
    finally:
        fresh.unlink(missing_ok=True)
    return descriptor


def _create(fresh: Path, path: Path, descriptor: int) -> bool:
    """Give a complete lease its name. False if another has it."""
    try:
        path.hardlink_to(fresh)
    except FileExistsError:
        return os.fstat(descriptor).st_nlink == 2  # over NFS the answer may get lost, and a repeated request fails
    except OSError:  # a file system without links; any other reason stops the next line too
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            return False
        fresh.replace(path)
    return True


def _replace(fresh: Path, path: Path, dead: bytes, header: bytes, folder: Path) -> bool:
    """Put our lease in the place of a dead one. False if another waiter is about to, or has done so."""
    guard = path.with_name(f"{path.name}.{hashlib.sha256(dead).hexdigest()[:8]}")
    try:
        descriptor = _claim(guard, header, folder)
    except _Held:
        return False
    try:
        if _read(path) != dead:  # who holds the guard decides, so nothing changes between this line and the next
            return False
        fresh.replace(path)
        return True
    finally:
        os.close(descriptor)
        guard.unlink(missing_ok=True)


def _release(path: Path, token: str) -> None:
    """Remove our lease. One that was taken over is another's."""
    with suppress(OSError):
        content = _read(path)
        if content is not None and _holder(content).get("token") == token:
            path.unlink()


def _beat(descriptor: int, offset: int, ended: threading.Event) -> None:
    """Raise the counter until the end. It is written into the open file, so never into a lease that replaced ours."""
    count = 0
    while not ended.wait(HEARTBEAT):
        count += 1
        with suppress(OSError):  # a file system that hangs or is full: the holder finds out when it checks
            os.pwrite(descriptor, _beats(count), offset)
            os.fsync(descriptor)


def _beats(count: int) -> bytes:
    return f"{count:0{DIGITS}d}\n".encode()


def _read(path: Path) -> bytes | None:
    """The content of a lease, or None if there is none. Opening it again makes NFS ask the server."""
    for _ in range(10):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:  # over NFS a file that is replaced while it is opened
            if error.errno != errno.ESTALE:
                raise
            time.sleep(POLL)
    return None


def _holder(content: bytes) -> dict[str, Any]:
    """Who holds a lease; {} if it is not written yet."""
    try:
        holder = json.loads(content.split(b"\n")[0])
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(content: bytes) -> str:
    holder = _holder(content)
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')} since {holder.get('since', '?')}"


def _identity() -> dict[str, Any]:
    """What tells this process from all others, also those of containers that share a host's name or boot."""
    return {
        **_machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _machine() -> dict[str, Any]:
    """The host, its boot and the namespace of process ids: within them a process can be looked up."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # no Linux: no process can be looked up
        boot = namespace = None
    return {"host": socket.gethostname(), "boot": boot, "pid_namespace": namespace}


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot. 0 if it has ended, None if that cannot be seen."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if state in "ZX" else int(fields[18])  # field 22 of the file; a zombie only waits for its parent


def _state(content: bytes) -> str:
    """Whether the holder of a lease is alive, as far as this process can see."""
    holder, here = _holder(content), _machine()
    if here["boot"] is None or any(holder.get(name) != value for name, value in here.items()):
        return UNKNOWN
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return DEAD
    except OSError:
        pass  # it is another user's
    started = _started(holder["pid"])
    if started is None or holder["started"] is None:
        return UNKNOWN
    return ALIVE if started == holder["started"] else DEAD
