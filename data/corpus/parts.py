"""Pass one: one input file -> one part, with every record cleaned and with the keys by which pass two selects rows."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.archive.medline import Citation, Deletion, OtherRecord, one_line, read_medline
from data.corpus import schema
from data.corpus.cleaning import clean, cleaning_switches
from data.corpus.duplicates import comparison_key, fold, hash64
from data.corpus.near_duplicates import BANDS, band_hashes, write_bands
from data.corpus.other_text import builder_of, read_texts
from data.corpus.schema import PartRow, join_text, part_schema
from data.corpus.settings import CorpusSection

PART_FILE = "part.parquet"


def part_settings(file: Path, settings: CorpusSection) -> dict[str, Any]:
    """All settings that the part of a file depends on; JSON.

    These are the versions of the cleaning rules that are on, `text_column` for a file that is not PubMed's,
    `unicode_scripts` for one that is, if it is on, and `bands` if near duplicates are looked for.
    """
    scripts = {"unicode_scripts": True} if settings.unicode_scripts else {}
    of_its_kind = {"text_column": settings.text_column} if builder_of(file) else scripts
    return cleaning_switches(settings) | of_its_kind | ({"bands": True} if settings.drop_near_duplicates else {})


def write_part(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write all records of one file, deletions included, as `part.parquet`.

    Returns the number of rows, and under `not_read` the names of other records (books) and how many there are of each.

    settings: those of `part_settings`. With `bands`, the bands of `data.corpus.near_duplicates` are written too.
    Raises UserError, which names the file, if it cannot be read.
    """
    not_read: Counter[str] = Counter()
    total, bands, columns = 0, [np.empty((BANDS, 0), np.uint64)], part_schema()
    rows = (
        _rows_of_texts(source, settings) if "text_column" in settings else _rows_of_records(source, settings, not_read)
    )
    with pq.ParquetWriter(folder / PART_FILE, columns, **schema.PARQUET) as out:
        while group := list(_next_group(rows)):
            values = zip(*group, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(values, columns, strict=True)]
            out.write_table(pa.table(arrays, columns))
            if "bands" in settings:
                bands.append(band_hashes(fold(join_text(row.title, row.abstract)) for row in group))
            total += len(group)
    if "bands" in settings:
        write_bands(folder, np.concatenate(bands, axis=1))
    return {"rows": total, "not_read": dict(not_read)}


def _rows_of_records(source: Path, settings: dict[str, Any], not_read: Counter[str]) -> Iterator[PartRow]:
    for record in read_medline(source, settings.get("unicode_scripts", False)):
        if isinstance(record, OtherRecord):
            not_read[record.name] += 1
        elif isinstance(record, Deletion):
            yield PartRow(record.pmid, record.version, deleted=True)
        else:
            yield _row_of_citation(record, settings)


def _row_of_citation(record: Citation, settings: dict[str, Any]) -> PartRow:
    title, title_changes = _cleaned(record.title, settings)
    abstract, abstract_changes = _cleaned(record.abstract, settings)
    text = join_text(title, abstract)
    return PartRow(
        pmid=record.pmid,
        version=record.version,
        title=title,
        abstract=abstract,
        year=record.year,
        journal=record.journal,
        languages=record.languages,
        publication_types=record.publication_types,
        fields=bool(title) + bool(abstract),
        words=text.count(" ") + 1,
        cleaned=title_changes | abstract_changes,
        text_hash=hash64(comparison_key(text)),
    )


def _rows_of_texts(source: Path, settings: dict[str, Any]) -> Iterator[PartRow]:
    """Other text becomes an abstract without a title. Its negative number comes from the hash of the cleaned text."""
    for given in read_texts(source, settings["text_column"]):
        text, changes = _cleaned(one_line(given), settings)
        yield PartRow(
            pmid=-1 - (hash64(text.encode()) >> 1),
            version=1,
            abstract=text,
            fields=int(bool(text)),
            words=text.count(" ") + 1,
            cleaned=changes,
            text_hash=hash64(comparison_key(text)),
        )


def _cleaned(text: str, settings: dict[str, Any]) -> tuple[str, int]:
    """The cleaned text and the bits of the rules that changed it. White space alone, also Unicode's, is no text."""
    text, changes = clean(text, settings)
    return (text, changes) if text and not text.isspace() else ("", changes)


def _next_group(rows: Iterator[PartRow]) -> Iterator[PartRow]:
    """The rows of the next row group, which is bounded in rows and in characters."""
    characters = 0
    for row in islice(rows, schema.ROWS_PER_GROUP):
        yield row
        characters += len(row.title) + len(row.abstract)
        if characters >= schema.CHARACTERS_PER_GROUP:
            return
