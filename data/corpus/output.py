"""Pass two writes the selected rows as `train-00000.parquet` ..., in parallel.

Consecutive parts that have ROWS_PER_FILE rows for training together are one task, which writes an output folder with
one file for each split. Then outputs become the files of the corpus: large ones as they are, small ones joined.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from data.common.files import read_manifest, sha256, whole_file
from data.common.lease import Lease
from data.common.ownership import remove_parts
from data.common.parquet import SPLITS, row_groups
from data.common.workers import Task, Workers, run_tasks
from data.corpus import schema
from data.corpus.parts import PART_FILE

pc: Any = pyarrow.compute  # pyright cannot see its functions: pyarrow creates them at run time
# In the folder of parts until the corpus is finished: the index of the split of each row, and the output folders. A
# command that was killed in an earlier version of the program left them under these names.
SPLIT_OF_ROW, OUTPUTS = ".chosen.npy", ".pieces"


def write_splits(
    tasks: list[Task],
    starts: np.ndarray,
    split_of_row: np.ndarray,
    folder: Path,
    workers: Workers,
    lease: Lease | None = None,
) -> None:
    """Write the selected rows into the files of the corpus, in the order of the parts.

    tasks: those of pass one; starts: the first row of each part; split_of_row: the index of each row's split in
    SPLITS, or another number for a row that is left out. A split without rows has no file, because
    `datasets.load_dataset` refuses a folder that holds a file without rows.
    """
    parts = tasks[0].folder.parent
    with whole_file(parts / SPLIT_OF_ROW) as stream:
        np.save(stream, split_of_row)
    outputs = _output_tasks(tasks, starts, split_of_row)
    run_tasks(write_output, outputs, workers, "corpus: writing", lease)
    for split in SPLITS:
        files = [output.folder / f"{split}.parquet" for output in outputs]
        for number, joined in enumerate(_files_to_join(files)):
            _join(joined, folder / f"{split}-{number:05d}.parquet")


def remove_outputs(parts: Path) -> None:
    """Remove what pass two left in the folder of parts, once the corpus is finished."""
    remove_parts(parts / OUTPUTS, "corpus part")
    (parts / SPLIT_OF_ROW).unlink(missing_ok=True)


def _output_tasks(tasks: list[Task], starts: np.ndarray, split_of_row: np.ndarray) -> list[Task]:
    """One task for each group of parts. Its receipt names the parts by their sha256, and the split of every row."""
    parts = tasks[0].folder.parent
    source, outputs = parts / SPLIT_OF_ROW, []
    digest = sha256(source)
    for group in _groups_of_parts(starts, split_of_row):
        of_group = [[tasks[index].folder.name, int(starts[index]), part_sha256(tasks[index])] for index in group]
        target = parts / OUTPUTS / f"{len(outputs):05d}"
        outputs.append(Task("corpus part", source, digest, target, {"parts": of_group}))
    return outputs


def _groups_of_parts(starts: np.ndarray, split_of_row: np.ndarray) -> Iterator[range]:
    """Indices of consecutive parts that have ROWS_PER_FILE rows for training together."""
    first = rows = 0
    for index in range(len(starts) - 1):
        rows += int((split_of_row[starts[index] : starts[index + 1]] == 0).sum())
        if rows >= schema.ROWS_PER_FILE or index == len(starts) - 2:
            yield range(first, index + 1)
            first, rows = index + 1, 0


def part_sha256(task: Task) -> str:
    """The sha256 of the part that a task of pass one has made, from its receipt."""
    return read_manifest(task.folder, task.kind)["files"][PART_FILE]["sha256"]


def write_output(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the selected rows of some parts, in order, as one file for each split. Returns the rows of each split.

    source: the index of the split of every row; settings: under "parts" a list of [name, first row, sha256].
    """
    split_of_row = np.load(source, mmap_mode="r")
    with ExitStack() as stack:
        writers = [stack.enter_context(_RowWriter(folder / f"{split}.parquet")) for split in SPLITS]
        for name, row, _ in settings["parts"]:
            for rows in row_groups(source.parent / name / PART_FILE, list(schema.COPIED)):
                split_of = split_of_row[row : row + len(rows)]
                row += len(rows)
                for index, writer in enumerate(writers):
                    writer.add(_final_rows(rows.filter(pa.array(split_of == index)), name))
    return {split: writer.rows for split, writer in zip(SPLITS, writers, strict=True)}


def _final_rows(rows: pa.Table, source_file: str) -> pa.Table:
    both = pc.binary_join_element_wise(rows["title"], rows["abstract"], " ")
    text = pc.utf8_trim(both, " ")  # one of the two may be empty: the same as join_text
    rows = rows.append_column("text", text)
    return rows.append_column("source_file", pa.repeat(source_file, len(rows))).select(schema.SCHEMA.names)


def _files_to_join(files: list[Path]) -> Iterator[list[Path]]:
    """Consecutive files that have ROWS_PER_FILE rows together, without those that have no row."""
    held, rows = [], 0
    for file in files:
        if more := pq.read_metadata(file).num_rows:
            held.append(file)
            rows += more
        if rows >= schema.ROWS_PER_FILE:
            yield held
            held, rows = [], 0
    if held:
        yield held


def _join(files: list[Path], target: Path) -> None:
    if len(files) == 1:
        _link(files[0], target)
        return
    with _RowWriter(target) as out:
        for table in (table for file in files for table in row_groups(file, schema.SCHEMA.names)):
            out.add(table)


def _link(file: Path, target: Path) -> None:
    """Give the file a second name. Its output folder stays whole: after a kill it need not be written again."""
    try:
        target.hardlink_to(file)
    except OSError:  # a file system without hard links
        file.replace(target)


class _RowWriter:
    """A Parquet file of the corpus, whose row groups are bounded in rows and in bytes."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetWriter(path, schema.SCHEMA, **schema.PARQUET)
        self._held: list[pa.Table] = []
        self.rows = self._written = 0

    def add(self, table: pa.Table) -> None:
        self._held.append(table)
        self.rows += len(table)
        held = sum(table.nbytes for table in self._held)
        if self.rows - self._written >= schema.ROWS_PER_GROUP or held >= schema.CHARACTERS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._file.write_table(pa.concat_tables([schema.SCHEMA.empty_table(), *self._held]), schema.ROWS_PER_GROUP)
        self._held, self._written = [], self.rows

    def __enter__(self) -> "_RowWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._file.close()
