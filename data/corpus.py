"""Citations -> corpus: newest version of each PMID, deletions, exact duplicates, split -> Parquet.

Two passes. Each input file becomes one Parquet part (in parallel); then the keys of all parts decide which rows stay.
A record is a (PMID, version): its last occurrence in file order is the one that counts, a deletion is such an
occurrence, and of the versions that remain the highest is the citation. Only then title and abstract are required, so
that an old version never comes back where the newest has lost its abstract.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.files import UserError, input_files, make_folder, parts_folder
from data.hashing import mix64
from data.medline import Deletion, read_medline
from data.workers import Task, run_tasks

SPLITS = ("train", "validation", "test")
ROWS_PER_FILE = 100_000
SCHEMA = pa.schema(
    [
        ("pmid", pa.int64()),
        ("version", pa.int32()),
        ("title", pa.string()),
        ("abstract", pa.string()),
        ("text", pa.string()),  # title, a space, abstract: what the model reads
        ("year", pa.int16()),
        ("journal", pa.string()),
        ("source_file", pa.string()),
    ]
)
PART_SCHEMA = SCHEMA.append(pa.field("text_hash", pa.uint64())).append(pa.field("deleted", pa.bool_()))


def make_corpus(
    raw: list[Path], out: Path, validation_fraction: float, test_fraction: float, workers: int
) -> dict[str, Any]:
    """Read files and folders of NLM's XML and write the corpus folder `out`. Returns its manifest.

    validation_fraction, test_fraction: shares of the citations, drawn by a hash of the PMID.
    Raises UserError naming a missing input, TasksFailed naming the damaged ones. What each file gave stays in the
    folder `out.parts` for the next run: an update file more does not have the others parsed again.
    """
    for name, value in (("validation", validation_fraction), ("test", test_fraction)):
        if not 0 <= value < 1:
            raise UserError(f"--{name}-fraction {value}: must be at least 0 and below 1")
    if validation_fraction + test_fraction >= 1:
        raise UserError("--validation-fraction and --test-fraction leave nothing for training; lower them")
    files, folders = list_files(raw), parts_folder(out)
    request: dict[str, Any] = {
        "inputs": input_files(files),
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
    }

    def fill(folder: Path) -> dict[str, Any]:
        tasks = [Task("corpus part", file, request["inputs"][file.name], folders / file.name, {}) for file in files]
        run_tasks(write_part, tasks, workers, "corpus: reading files")
        parts = [task.folder / "part.parquet" for task in tasks]
        split_of_row, counts = _choose_rows(parts, validation_fraction, test_fraction)
        for index, split in enumerate(SPLITS):
            _write_split(parts, split_of_row == index, folder, split)
        if not counts["train"]:
            raise UserError(f"{raw[0]}: no citation with title and abstract is left for training")
        return counts

    return make_folder(out, "corpus", request, fill)


def list_files(raw: list[Path]) -> list[Path]:
    """The XML files among files and folders, in NLM's order: other names first, then by year and number.

    Update files of a year are numbered on from its baseline, so the order is also that of publication.
    """
    files: list[Path] = []
    for path in raw:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        found = [path] if path.is_file() else [file for file in path.iterdir() if _is_medline(file)]
        if not found:
            raise UserError(f"{path}: holds no .xml or .xml.gz file")
        files += found

    def order(path: Path) -> tuple[int, int, str]:
        numbered = re.match(r"[a-z]+(\d\d)n(\d+)", path.name)
        return (int(numbered[1]), int(numbered[2]), path.name) if numbered else (-1, 0, path.name)

    return sorted(files, key=order)


def _is_medline(path: Path) -> bool:
    return path.is_file() and path.name.endswith((".xml", ".xml.gz"))


def write_part(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Pass one: every record of one file, deletions included, as `part.parquet`. Returns counts."""
    rows: list[dict[str, Any]] = []
    total = 0
    with pq.ParquetWriter(folder / "part.parquet", PART_SCHEMA, compression="zstd") as writer:
        for record in read_medline(source):
            row: dict[str, Any] = {"pmid": record.pmid, "version": record.version}
            row["deleted"] = isinstance(record, Deletion)
            if not isinstance(record, Deletion):
                text = f"{record.title} {record.abstract}" if record.title and record.abstract else ""
                row |= {"title": record.title, "abstract": record.abstract, "text": text, "year": record.year}
                row |= {"journal": record.journal, "source_file": source.name}
                row["text_hash"] = _text_hash(text) if text else None
            rows.append(row)
            total += 1
            if len(rows) == 10_000:  # one row group: what is held in memory
                writer.write_table(pa.Table.from_pylist(rows, PART_SCHEMA))
                rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, PART_SCHEMA))
    return {"rows": total}


def _text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _choose_rows(
    parts: list[Path], validation_fraction: float, test_fraction: float
) -> tuple[np.ndarray, dict[str, int]]:
    """Pass two: for each row of all parts in order, the index of its split, or -1 where it is left out."""
    keys = pa.concat_tables(
        [pq.read_table(part, columns=["pmid", "version", "deleted", "text_hash"]) for part in parts]
    )
    pmid, version, deleted = (keys[name].to_numpy() for name in ("pmid", "version", "deleted"))
    has_text = keys["text_hash"].is_valid().to_numpy()
    text_hash = pc.fill_null(keys["text_hash"], 0).to_numpy()

    order = np.lexsort((version, pmid))  # stable: occurrences of a record stay in file order
    last = order[_last_of_each(pmid[order], version[order])]
    alive = last[~deleted[last]]
    newest = alive[_last_of_each(pmid[alive])]
    complete = newest[has_text[newest]]
    _, first = np.unique(text_hash[complete], return_index=True)  # of equal texts the lowest PMID's stays
    kept = complete[first]

    share = mix64(pmid[kept], salt=0) / 2.0**64
    split_of_row = np.full(len(pmid), -1, np.int8)
    split_of_row[kept] = np.where(share < test_fraction, 2, np.where(share < test_fraction + validation_fraction, 1, 0))
    counts = {
        "records": int((~deleted).sum()),
        "deletions": int(deleted.sum()),
        "superseded_or_deleted": int((~deleted).sum()) - len(newest),
        "without_title_or_abstract": len(newest) - len(complete),
        "duplicates": len(complete) - len(kept),
    }
    return split_of_row, counts | {split: int((split_of_row == index).sum()) for index, split in enumerate(SPLITS)}


def _last_of_each(*sorted_keys: np.ndarray) -> np.ndarray:
    """Mask of the last row of each run of equal keys."""
    changes = np.zeros(max(len(sorted_keys[0]) - 1, 0), bool)
    for key in sorted_keys:
        changes |= key[1:] != key[:-1]
    return np.append(changes, True)[: len(sorted_keys[0])]


def _write_split(parts: list[Path], chosen: np.ndarray, folder: Path, split: str) -> None:
    """The chosen rows of all parts as `split-00000.parquet`, `split-00001.parquet` ...

    A split without a row has no file: `datasets.load_dataset` refuses a folder that holds an empty one.
    """
    for index, table in enumerate(_tables_of(ROWS_PER_FILE, _chosen_rows(parts, chosen))):
        pq.write_table(table, folder / f"{split}-{index:05d}.parquet", compression="zstd", row_group_size=10_000)


def _chosen_rows(parts: list[Path], chosen: np.ndarray) -> Iterator[pa.Table]:
    start = 0
    for part in parts:
        for batch in pq.ParquetFile(part).iter_batches(10_000, columns=SCHEMA.names):
            mask = chosen[start : start + len(batch)]
            start += len(batch)
            yield pa.Table.from_batches([batch.filter(pa.array(mask))])


def _tables_of(rows: int, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Cut a stream of tables anew into tables of `rows` rows; the last may be shorter."""
    held = SCHEMA.empty_table()
    for table in tables:
        held = pa.concat_tables([held, table])
        while len(held) > rows:
            yield held.slice(0, rows)
            held = held.slice(rows)
    if len(held):
        yield held


def split_files(corpus: Path, manifest: dict[str, Any], split: str) -> list[Path]:
    """The Parquet files of one split, in order; none where the split has no row."""
    return [corpus / name for name in sorted(manifest["files"]) if name.startswith(f"{split}-")]
