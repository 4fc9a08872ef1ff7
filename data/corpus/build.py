"""Citations, and other text -> corpus: newest version of each PMID, deletions, filters, duplicates, split -> Parquet.

Pass one makes a part of each input file, in parallel: its records, cleaned, with what the choice needs to know. Parts
stay in `OUT.parts`, so that new update files are added without parsing the old ones again. Pass two loads the keys of
all parts, chooses the rows (`data.corpus.selection`) and writes them, in parallel.

Text that is not PubMed's (`data.corpus.other_text`) has a negative number from its hash for a PMID, and no title.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from data.archive.medline import Deletion, one_line, read_medline
from data.common.files import (
    UserError,
    input_files,
    input_name,
    make_folder,
    parts_folder,
    read_manifest,
    sha256,
    whole_file,
)
from data.common.parquet import SPLITS, row_groups
from data.common.workers import JobArray, Task, Workers, progress, run_tasks, share_of
from data.corpus.cleaning import CLEAN, CorpusSection, clean, cleaning_switches, folded, normalised, read_pmids
from data.corpus.near_duplicates import BANDS, band_hashes, write_bands
from data.corpus.other_text import BUILDERS, builder_of, read_texts
from data.corpus.selection import Keys, choose_rows

pc: Any = pyarrow.compute  # its functions are made at run time: pyright knows them not
ROWS_PER_FILE = 25_000  # at least: one or two files of NLM's, so that there is work for all
ROWS_PER_GROUP = 10_000  # of a Parquet file at most: what is held in memory
CHARACTERS_PER_GROUP = 1 << 24  # at most, but for the last text
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
CHOSEN, PIECES = ".chosen.npy", ".pieces"  # pass two's, in the folder of parts
PARQUET: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["journal", "languages", "source_file"]}
STORED = ("pmid", "version", "title", "abstract", "year", "journal")  # of these, what a part holds
PART_SCHEMA = pa.schema(
    [
        *(SCHEMA.field(name) for name in STORED),
        ("deleted", pa.bool_()),
        ("languages", pa.string()),
        ("retracted", pa.bool_()),
        ("fields", pa.uint8()),  # of title and abstract, how many it has
        ("words", pa.int32()),
        ("cleaned", pa.uint8()),  # a bit for each rule of CLEANING that changed the record
        ("text_hash", pa.uint64()),  # of what equal texts have in common
    ]
)


def make_corpus(
    raw: list[Path],
    out: Path,
    validation_fraction: float,
    test_fraction: float,
    workers: Workers,
    settings: CorpusSection = CLEAN,
) -> dict[str, Any]:
    """Read files and folders of NLM's XML, and files of other text; write the folder `out`, return its manifest.

    validation_fraction, test_fraction: shares of the citations, drawn by a hash of the PMID.
    Raises UserError naming a missing input, TasksFailed naming the damaged ones.
    """
    for name, value in (("validation", validation_fraction), ("test", test_fraction)):
        if not 0 <= value < 1:
            raise UserError(f"--{name}-fraction {value}: must be at least 0 and below 1")
    if validation_fraction + test_fraction >= 1:
        raise UserError("--validation-fraction and --test-fraction leave nothing for training; lower them")
    files, parts = share_of(list_files(raw), workers), parts_folder(out)
    excluded = np.array(read_pmids(Path(settings.exclude_pmids)) if settings.exclude_pmids else [], np.int64)
    with progress("corpus: checksums of the input", len(files)) as advance:
        inputs = input_files(files, advance)
    chosen = settings.model_dump(mode="json")
    if settings.exclude_pmids:
        chosen["exclude_pmids"] = sha256(Path(settings.exclude_pmids))
    fractions = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    tasks = [
        Task("corpus part", file, inputs[name], parts / name, part_settings(file, settings))
        for file, name in ((file, input_name(file)) for file in files)
    ]
    if isinstance(workers, JobArray):
        run_tasks(write_part, tasks, workers, "corpus: reading files")

    def fill(folder: Path) -> dict[str, Any]:
        run_tasks(write_part, tasks, workers, "corpus: reading files")
        keys = Keys([task.folder / "part.parquet" for task in tasks], settings, excluded)
        split_of_row, counts = choose_rows(keys, settings, validation_fraction, test_fraction)
        if not counts["train"]:
            raise UserError(f"{raw[0]}: no citation is left for training: {counts}")
        _write_splits(tasks, keys.starts, split_of_row, folder, workers)
        return counts

    manifest = make_folder(out, "corpus", {"inputs": inputs, **fractions, "corpus": chosen}, fill)
    shutil.rmtree(parts / PIECES, ignore_errors=True)
    (parts / CHOSEN).unlink(missing_ok=True)
    return manifest


def part_settings(file: Path, settings: CorpusSection) -> dict[str, Any]:
    """All that a file's part depends on: the cleaning rules, the text_column where it is not PubMed's, MinHash."""
    of_text = {"text_column": settings.text_column} if builder_of(file) else {}
    return cleaning_switches(settings) | of_text | ({"bands": True} if settings.drop_near_duplicates else {})


def list_files(raw: list[Path]) -> list[Path]:
    """The files given, and the XML files of folders, in NLM's order: other names first, then by year and number.

    Update files of a year are numbered on from its baseline, so the order is also that of publication.
    """
    files: list[Path] = []
    for path in raw:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if path.is_file() and not (_is_medline(path) or builder_of(path)):
            raise UserError(f"{path}: neither .xml or .xml.gz nor one of {', '.join(BUILDERS)}")
        found = [path] if path.is_file() else [file for file in path.iterdir() if _is_medline(file)]
        if not found:
            raise UserError(f"{path}: holds no .xml or .xml.gz file")
        files += found

    def order(path: Path) -> tuple[int, int, str]:
        numbered = re.match(r"[a-z]+(\d\d)n(\d+)", path.name)
        return (int(numbered[1]), int(numbered[2]), path.name) if numbered else (-1, 0, input_name(path))

    return sorted(files, key=order)


def _is_medline(path: Path) -> bool:
    return path.is_file() and path.name.endswith((".xml", ".xml.gz"))


def write_part(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Pass one: every record of one file, deletions included, as `part.parquet`. Returns counts.

    settings: the switches of the cleaning rules, the text_column of a file that is not PubMed's, and "bands" where
    near duplicates are looked for: then the bands of `data.corpus.near_duplicates` are written too.
    """
    total, bands = 0, []
    rows = _texts_as_rows(source, settings) if "text_column" in settings else _records_as_rows(source, settings)
    with pq.ParquetWriter(folder / "part.parquet", PART_SCHEMA, **PARQUET) as out:
        while group := list(_group(rows)):
            columns = zip(*group, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, PART_SCHEMA, strict=True)]
            out.write_table(pa.table(arrays, PART_SCHEMA))
            if "bands" in settings:
                bands.append(band_hashes(folded(join_text(title, abstract)) for _, _, title, abstract, *_ in group))
            total += len(group)
    if "bands" in settings:
        write_bands(folder, np.concatenate([np.empty((BANDS, 0), np.uint64), *bands], axis=1))
    return {"rows": total}


def _group(rows: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Rows for a row group, bounded in number and in length."""
    characters = 0
    for row in islice(rows, ROWS_PER_GROUP):
        yield row
        characters += len(row[2]) + len(row[3])  # title, abstract
        if characters >= CHARACTERS_PER_GROUP:
            return


def _records_as_rows(source: Path, switches: dict[str, bool]) -> Iterator[tuple[Any, ...]]:
    for record in read_medline(source):
        if isinstance(record, Deletion):
            yield (record.pmid, record.version, "", "", None, "", True, "", False, 0, 0, 0, 0)
            continue
        title, first = clean(record.title, switches)
        abstract, second = clean(record.abstract, switches)
        text = join_text(title, abstract)
        yield (
            *(record.pmid, record.version, title, abstract, record.year, record.journal, False),
            *(record.languages, record.retracted, bool(title) + bool(abstract), text.count(" ") + 1),
            *(first | second, _hash(normalised(text))),
        )


def _texts_as_rows(source: Path, settings: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for given in read_texts(source, settings["text_column"]):
        text, changed = clean(one_line(given), settings)
        number = -1 - (_hash(text.encode()) >> 1)
        words, text_hash = text.count(" ") + 1, _hash(normalised(text))
        yield (number, 1, "", text, None, "", False, "", False, int(bool(text)), words, changed, text_hash)


def join_text(title: str, abstract: str) -> str:
    """What the model reads: title, a space, abstract; or the one that there is."""
    return f"{title} {abstract}" if title and abstract else title or abstract


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _write_splits(
    tasks: list[Task], starts: np.ndarray, split_of_row: np.ndarray, folder: Path, workers: Workers
) -> None:
    """The chosen rows as `train-00000.parquet` ..., of consecutive parts, ROWS_PER_FILE rows or some more each.

    A split without a row has no file: `datasets.load_dataset` refuses a folder that holds an empty one.
    """
    parts = tasks[0].folder.parent
    chosen = parts / CHOSEN
    with whole_file(chosen) as stream:
        np.save(stream, split_of_row)
    digest, pieces = sha256(chosen), []
    for group in _groups(starts, split_of_row):
        settings = {
            "parts": [[tasks[index].folder.name, int(starts[index]), _part_sha256(tasks[index])] for index in group]
        }
        pieces.append(Task("corpus part", chosen, digest, parts / PIECES / f"{len(pieces):05d}", settings))
    run_tasks(write_piece, pieces, workers, "corpus: writing")
    for split in SPLITS:
        for number, files in enumerate(_of_full_size([piece.folder / f"{split}.parquet" for piece in pieces])):
            target = folder / f"{split}-{number:05d}.parquet"
            if len(files) == 1:
                _take(files[0], target)
            else:
                with _RowWriter(target) as out:
                    for table in (table for file in files for table in row_groups(file, SCHEMA.names)):
                        out.add(table)


def _take(file: Path, target: Path) -> None:
    """The file under a second name: its piece stays whole, so that a killed command need not write it again."""
    try:
        target.hardlink_to(file)
    except OSError:  # a file system without links
        file.replace(target)


def _part_sha256(task: Task) -> str:
    return read_manifest(task.folder, task.kind)["files"]["part.parquet"]["sha256"]


def _groups(starts: np.ndarray, split_of_row: np.ndarray) -> Iterator[range]:
    """Indices of consecutive parts that have ROWS_PER_FILE rows for training together."""
    first = rows = 0
    for index in range(len(starts) - 1):
        rows += int((split_of_row[starts[index] : starts[index + 1]] == 0).sum())
        if rows >= ROWS_PER_FILE or index == len(starts) - 2:
            yield range(first, index + 1)
            first, rows = index + 1, 0


def write_piece(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the chosen rows of some parts, in order, as a file for each split.

    source: the index of the split of every row; settings: the parts as [name, its first row, its sha256].
    """
    split_of_row = np.load(source, mmap_mode="r")
    with ExitStack() as stack:
        writers = [stack.enter_context(_RowWriter(folder / f"{split}.parquet")) for split in SPLITS]
        for name, row, _ in settings["parts"]:
            for rows in row_groups(source.parent / name / "part.parquet", list(STORED)):
                split_of = split_of_row[row : row + len(rows)]
                row += len(rows)
                for index, writer in enumerate(writers):
                    writer.add(_final_rows(rows.filter(pa.array(split_of == index)), name))
    return {split: writer.rows for split, writer in zip(SPLITS, writers, strict=True)}


def _final_rows(rows: pa.Table, source_file: str) -> pa.Table:
    both = pc.binary_join_element_wise(rows["title"], rows["abstract"], " ")
    text = pc.utf8_trim(both, " ")  # where one is empty, as in join_text
    rows = rows.append_column("text", text)
    return rows.append_column("source_file", pa.repeat(source_file, len(rows))).select(SCHEMA.names)


class _RowWriter:
    """A Parquet file of the corpus, whose row groups are bounded in rows and in bytes."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetWriter(path, SCHEMA, **PARQUET)
        self._held: list[pa.Table] = []
        self.rows = self._written = 0

    def add(self, table: pa.Table) -> None:
        self._held.append(table)
        self.rows += len(table)
        held = sum(table.nbytes for table in self._held)
        if self.rows - self._written >= ROWS_PER_GROUP or held >= CHARACTERS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._file.write_table(pa.concat_tables([SCHEMA.empty_table(), *self._held]), ROWS_PER_GROUP)
        self._held, self._written = [], self.rows

    def __enter__(self) -> "_RowWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._file.close()


def _of_full_size(files: list[Path]) -> Iterator[list[Path]]:
    """Consecutive files that have ROWS_PER_FILE rows together; none without rows."""
    held, rows = [], 0
    for file in files:
        if more := pq.read_metadata(file).num_rows:
            held.append(file)
            rows += more
        if rows >= ROWS_PER_FILE:
            yield held
            held, rows = [], 0
    if held:
        yield held
