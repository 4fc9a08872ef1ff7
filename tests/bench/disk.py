"""What does a full disk cost? `python -m tests.bench.disk` fills a small disk in 12 places and prints a table.

The disk is a tmpfs of 4 MB. In each place it is filled several times, with more room each time. Each time there must be
one line that names the disk, and nothing half-written; at the end, the bytes of a command that never failed.

Needs the right to mount; 2 to 6 minutes on two cores.
"""

import argparse
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data.archive import download as downloads
from data.common.errors import DiskFull
from pretrain import engine as engines
from pretrain.export.folder import export
from tests.bench.machine import machine
from tests.data.archive.server import NAMES, Archive
from tests.data.common.small_disk import STAGES, room, small_disk
from tests.data.corpora import content
from tests.pretrain.runs import (
    filled_case,
    make_sample,
    reported_case,
    run_case,
    settings,
    started_on_a_full_disk_case,
)

MORE = ["train.steps=9", "checkpoint.every_steps=3", "evaluate.max_blocks=2"]
LAST = "checkpoints/step-0000009"
Row = tuple[str, list[str], bool]
"""The place, the lines of its failures ("" where something half-written was left), whether the bytes are the same."""


def failures(command: Callable[[], Any], disk: Path, rooms: Iterable[int]) -> list[str]:
    """The lines of a command that is run again with ever more room, and at last with all."""
    lines = []
    for pages in rooms:
        try:
            with room(disk, pages):
                command()
            break
        except DiskFull as error:
            half = [path for path in disk.rglob("*.partial") if disk / "raw" not in path.parents]
            lines.append("" if half else str(error))
    command()
    return lines


def download(disk: Path) -> Row:
    """Three files of a local server. What has arrived keeps a hidden name until the file is whole."""
    server = Archive()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    downloads.SPARE_DISK = -(1 << 30)  # without the look at the free room beforehand
    lines = failures(lambda: downloads.download(disk / "raw", False, None, None, 1, server.url), disk, (0, 3, 90, 150))
    server.shutdown()
    found = content(disk / "raw")
    return "download", lines, all(found[name] == server.content[name] for name in NAMES[:3]) and len(found) == 4


def stage(name: str, made: Path, disk: Path) -> list[Row]:
    """A data command: its parts, and its folder."""
    lines = failures(lambda: STAGES[name](made, disk, 1), disk, range(0, 1000, 3))
    same = content(disk / name) == content(made / name)
    parts = [line for line in lines if not line or line.startswith(f"{disk / name}.parts/")]
    return [(f"{name} part", parts, same), (name, [line for line in lines if line not in parts], same)]


def runs(shards: Path, disk: Path, run: Path) -> list[Row]:
    """A run whose start, metrics, TensorBoard or checkpoint meets a full disk, compared with `run`."""
    chosen, rows = settings(shards, disk / "run", *MORE), []

    def row(place: str, cases: Iterable[Callable[[], str]]) -> None:
        """Each case begins a new run; after it the command is run again, to the end."""
        lines, same = [], True
        for case in cases:
            line = case()
            lines.append("" if list(disk.rglob("*.partial")) else line)
            run_case(chosen)
            same = same and content(disk / "run" / LAST) == content(run / LAST)
            shutil.rmtree(disk / "run")
        rows.append((place, lines, same))

    def warning(printed: str) -> str:
        """The only line with a warning; "" where there is none or more."""
        found = [line for line in printed.splitlines() if "warning: " in line]
        return found[0] if len(found) == 1 else ""

    row("start of a run", (lambda p=p: started_on_a_full_disk_case(chosen, disk, p) for p in range(6)))
    for place, name in (("metrics", "metrics.jsonl"), ("TensorBoard", "tfevents")):
        row(place, (lambda n=n, name=name: warning(reported_case(chosen, disk, name, n)) for n in (2, 4, 8)))
    rooms = (0, 20, 50, 80, 106)
    warned = [lambda p=p: warning(filled_case(chosen, disk, 6, p)[0]) for p in rooms]
    row("checkpoint", [*warned, *(lambda p=p: filled_case(chosen, disk, 9, p)[1] for p in rooms)])
    return rows


def main() -> None:
    """Fill the disk in all places and print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, rows = Path(temporary), []
        engines.init_distributed()
        make_sample(folder / "made")
        for name, make in STAGES.items():
            shutil.rmtree(folder / "made" / name)
            make(folder / "made", folder / "made", 1)
        run_case(settings(folder / "made" / "shards", folder / "run", *MORE))
        export(folder / "run", folder / "hf")
        with small_disk(folder / "disk") as disk:
            rows.append(download(disk))
            for name in STAGES:
                rows += stage(name, folder / "made", disk)
            for left in disk.iterdir():
                shutil.rmtree(left)
            rows += runs(folder / "made" / "shards", disk, folder / "run")
            lines = failures(lambda: export(folder / "run", disk / "hf"), disk, range(0, 1000, 8))
            rows.append(("export", lines, content(disk / "hf") == content(folder / "hf")))
    good = [
        same and bool(lines) and all(f"the disk {disk} is full (" in line and "\n" not in line for line in lines)
        for _, lines, same in rows
    ]
    print(f"\n{machine()}\n\n| disk full in | times | one line, nothing half-written, the same bytes |\n|---|---|---|")
    for (place, lines, _), is_good in zip(rows, good, strict=True):
        print(f"| {place} | {len(lines)} | {'yes' if is_good else 'NO'} |")
    print(f"\n{sum(good)} of {len(rows)}")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
