"""Find the benchmarks in a folder, whatever its subfolders are called."""

from pathlib import Path

from data.common.errors import UserError
from data.common.parquet import SPLITS
from pretrain.tasks import TASKS
from pretrain.tasks.task import Item, MissingFile


def find_benchmarks(folder: Path) -> dict[tuple[str, str], list[Item]]:
    """(name of a benchmark, split) -> its items, for each whose files lie in the folder or below it.

    Raises UserError, which names a folder that is missing or holds no benchmark, a malformed file, or a second copy of
    a benchmark.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of benchmarks")
    found: dict[tuple[str, str], list[Item]] = {}
    place: dict[tuple[str, str], Path] = {}
    for each in sorted((folder, *(path for path in folder.rglob("*") if path.is_dir()))):
        for name, task in TASKS.items():
            for split in SPLITS:
                try:
                    items = task(each, split).items
                except MissingFile:
                    continue
                if (name, split) in found:
                    raise UserError(f"{each}: a second copy of {name}; the first is in {place[name, split]}; keep one")
                found[name, split], place[name, split] = items, each
    if not found:
        raise UserError(f"{folder}: holds the files of none of {', '.join(TASKS)}")
    return found
