"""PubMed's files and other text -> the corpus: the newest version of each PMID, filtered, deduplicated and split.

Pass one (`parts`) reads each input file, in parallel, and writes a part: the file's records, cleaned, with the keys by
which rows are selected. Parts stay in `OUT.parts`, so new update files can be added without parsing the old ones again.
Pass two loads the keys of all parts, selects rows (`selection`) and writes them, in parallel (`output`).
"""

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.common.disk import disk_full_named
from data.common.files import UserError, check_places, input_files, input_name, make_folder, parts_folder, read_manifest
from data.common.lease import Lease
from data.common.parquet import SPLITS
from data.common.workers import JobArray, Task, Workers, hold_for, progress, run_tasks, share_of
from data.corpus.benchmarks import ITEMS, Benchmarks, find_matches, write_report
from data.corpus.filters import read_excluded
from data.corpus.other_text import BUILDERS, builder_of
from data.corpus.output import remove_outputs, write_splits
from data.corpus.parts import PART_FILE, part_settings, write_part
from data.corpus.selection import Keys, funnel, select_rows
from data.corpus.settings import CLEAN, CorpusSection, recorded_settings


def make_corpus(
    raw: list[Path],
    out: Path,
    validation_fraction: float,
    test_fraction: float,
    workers: Workers,
    settings: CorpusSection = CLEAN,
    benchmarks: Benchmarks | None = None,
) -> dict[str, Any]:
    """Write a corpus as the folder `out` and return its manifest. If `out` holds it already, nothing is done.

    raw: NLM's XML files, folders of them, and files of other text; validation_fraction, test_fraction: the shares of
    the citations that are held out, drawn by a hash of the PMID; benchmarks: their items are looked for, and the
    records that hold one are left out unless they are to be kept. Raises UserError, which names a missing input, a
    wrong fraction or an `out` made from other inputs or settings; TasksFailed, which names each damaged input.
    """
    _check_fractions(validation_fraction, test_fraction)
    check_places(out, raw)
    files, excluded = list_files(raw), read_excluded(settings)
    with disk_full_named(out, str(out)), hold_for(out, workers) as lease:
        return _make_corpus(
            files, out, validation_fraction, test_fraction, workers, settings, excluded, benchmarks, lease
        )


def _make_corpus(
    files: list[Path],
    out: Path,
    validation_fraction: float,
    test_fraction: float,
    workers: Workers,
    settings: CorpusSection,
    excluded: np.ndarray,
    benchmarks: Benchmarks | None,
    lease: Lease,
) -> dict[str, Any]:
    """What make_corpus does while it holds the lease of `out`."""
    files, parts = share_of(files, workers), parts_folder(out)
    with progress("corpus: checksums of the input", len(files)) as advance:
        inputs = input_files(files, advance)
    request = {
        "inputs": inputs,
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
        "corpus": recorded_settings(settings),
        **({"benchmarks": benchmarks.request()} if benchmarks else {}),
    }
    tasks = [
        Task("corpus part", file, inputs[name], parts / name, part_settings(file, settings))
        for file, name in zip(files, map(input_name, files), strict=True)
    ]
    read_files = partial(run_tasks, write_part, tasks, workers, "corpus: reading files", lease)
    if isinstance(workers, JobArray):
        read_files()  # raises ShareDone

    def fill(folder: Path) -> dict[str, Any]:
        read_files()
        keys = Keys([task.folder / PART_FILE for task in tasks], settings, excluded)
        matches = find_matches(tasks, keys.starts, benchmarks.items, workers, lease) if benchmarks else []
        dropped = None if not benchmarks or benchmarks.keep else np.array([match.row for match in matches], np.int64)
        split_of_row, counts = select_rows(keys, settings, validation_fraction, test_fraction, dropped)
        if not counts["train"]:
            raise UserError(_nothing_left(files[0], counts))
        counts |= _not_read(tasks)
        if benchmarks:
            names = [task.folder.name for task in tasks]
            counts["benchmarks"] = write_report(folder, benchmarks.items, matches, keys, names, split_of_row)
        write_splits(tasks, keys.starts, split_of_row, folder, workers, lease)
        return counts

    manifest = make_folder(out, "corpus", request, fill, lease)
    remove_outputs(parts)
    (parts / ITEMS).unlink(missing_ok=True)
    return manifest


def _nothing_left(first: Path, counts: dict[str, Any]) -> str:
    """The sentence that says why no citation is left for training."""
    removed = {name.removeprefix("- "): count for name, count in funnel(counts) if name.startswith("- ")}
    records, kept = counts["records"], sum(counts[split] for split in SPLITS)
    if kept:
        return f"{first}: all {kept:,} citations were drawn for validation and test; lower the fractions or add files"
    most = max(removed, key=lambda name: removed[name])
    if not removed[most]:
        return f"{first}: the input holds no record; add files"
    others = {name: count for name, count in removed.items() if count and name != most}
    rest = "".join(f", {name!r} {count:,}" for name, count in others.items())
    return (
        f"{first}: no citation is left for training: of {records:,} records {most!r} removed {removed[most]:,}{rest};"
        " relax the filters or add files"
    )


def _not_read(tasks: list[Task]) -> dict[str, Any]:
    """For the manifest: under `not_read` the names of records that are not read (books) and how many there are of each.

    Empty if there is none.
    """
    total: Counter[str] = Counter()
    for task in tasks:
        total.update(read_manifest(task.folder, task.kind)["counts"].get("not_read", {}))
    return {"not_read": dict(sorted(total.items()))} if total else {}


def _check_fractions(validation_fraction: float, test_fraction: float) -> None:
    for name, value in (("validation", validation_fraction), ("test", test_fraction)):
        if not 0 <= value < 1:
            raise UserError(f"--{name}-fraction {value}: must be at least 0 and below 1")
    if validation_fraction + test_fraction >= 1:
        raise UserError("--validation-fraction and --test-fraction leave nothing for training; lower them")


def list_files(raw: list[Path]) -> list[Path]:
    """The given files and the XML files of the given folders, in NLM's order.

    Files with other names than NLM's come first, then NLM's by year and number. The update files of a year continue
    the numbers of its baseline, so this is also the order of publication. Raises UserError, which names a path that is
    missing, holds no XML or is of an unknown kind.
    """
    files: list[Path] = []
    for path in raw:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: is neither a file nor a folder; write it into a file first")
        if path.is_file() and not (_is_medline(path) or builder_of(path)):
            raise UserError(f"{path}: neither .xml or .xml.gz nor one of {', '.join(BUILDERS)}")
        found = [path] if path.is_file() else [file for file in path.iterdir() if _is_medline(file)]
        if not found:
            raise UserError(f"{path}: holds no .xml or .xml.gz file")
        files += found
    return sorted(files, key=_order_of_publication)


def _is_medline(path: Path) -> bool:
    if not path.name.endswith((".xml", ".xml.gz")) or path.is_dir():
        return False
    if not path.is_file():
        raise UserError(f"{path}: is no file (a broken link, or a special file); remove it or put the file there")
    return True


def _order_of_publication(path: Path) -> tuple[int, int, str]:
    numbered = re.match(r"[a-z]+(\d\d)n(\d+)", path.name)
    return (int(numbered[1]), int(numbered[2]), path.name) if numbered else (-1, 0, input_name(path))
