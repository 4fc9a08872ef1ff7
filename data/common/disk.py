"""A full disk ends a command in one line: which disk, what was being written, how much is free."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.common.errors import DiskFull, UserError

RUN_AGAIN = "make room, then run the same command again"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, over the quota, over `ulimit -f`
# Libraries pass the system's reason on as text: pyarrow, safetensors, numpy (which tells no reason) and torch.
MESSAGES = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|os error (?:28|122|27)\b|requested and \d+ written"
    r"|PytorchStreamWriter failed writing"
)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it follows from, says that a disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if isinstance(error, Exception) and not isinstance(error, UserError) and MESSAGES.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def room(place: Path) -> tuple[Path, int]:
    """Where the disk of `place`, which need not exist, is mounted, and how many bytes it has free."""
    place = next(each for each in (place.absolute(), *place.absolute().parents) if each.exists()).resolve()
    disk = next(each for each in (place, *place.parents) if each.is_mount())
    return disk, shutil.disk_usage(place).free


def disk_full(place: Path, what: str, advice: str = RUN_AGAIN) -> DiskFull:
    """The error that says how much room the disk of `place` has."""
    disk, free = room(place)
    return DiskFull(f"{what}: cannot be written, the disk {disk} is full ({free / 1e6:,.1f} MB free); {advice}")


@contextmanager
def disk_full_named(place: Path, what: str, advice: str = RUN_AGAIN) -> Iterator[None]:
    """In the block, an error that says that a disk is full becomes DiskFull. place: below it the block writes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise disk_full(place, what, advice) from None
