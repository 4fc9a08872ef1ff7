"""The columns of the corpus and of its parts, and how large their files and row groups are."""

from typing import Any, NamedTuple

import pyarrow as pa

from data.corpus.cleaning import changed_type

ROWS_PER_FILE = 25_000  # at least, for training: one or two of NLM's files, so that every worker gets some to write
ROWS_PER_GROUP = 10_000  # at most: a row group is held in memory
CHARACTERS_PER_GROUP = 1 << 24  # a row group ends with the text that reaches this number
PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["journal", "languages", "publication_types", "source_file"],
}

SCHEMA = pa.schema(
    [
        ("pmid", pa.int64()),  # of other text: a negative number from its hash
        ("version", pa.int32()),
        ("title", pa.string()),
        ("abstract", pa.string()),
        ("text", pa.string()),  # what the model reads: see join_text
        ("year", pa.int16()),
        ("journal", pa.string()),
        ("source_file", pa.string()),
    ]
)
COPIED = ("pmid", "version", "title", "abstract", "year", "journal")  # from the parts into the corpus


class PartRow(NamedTuple):
    """One record of an input file, as its part stores it: the columns of `part_schema`, in that order.

    The defaults are those of a deletion.
    """

    pmid: int
    version: int
    title: str = ""
    abstract: str = ""
    year: int | None = None
    journal: str = ""
    deleted: bool = False
    languages: str = ""
    """NLM's codes, of the article: "eng", "eng fre"."""
    publication_types: str = ""
    """NLM's names: "Journal Article|Retracted Publication"."""
    fields: int = 0
    """How many of title and abstract it has."""
    words: int = 0
    cleaned: int = 0
    """A bit for each cleaning rule that changed the record: see `cleaning.clean`."""
    text_hash: int = 0
    """The hash of what equal texts have in common: see `duplicates.comparison_key`."""


def part_schema() -> pa.Schema:
    """The columns of a part. The type of `cleaned` depends on the number of cleaning rules."""
    return pa.schema(
        [
            *(SCHEMA.field(name) for name in COPIED),
            ("deleted", pa.bool_()),
            ("languages", pa.string()),
            ("publication_types", pa.string()),
            ("fields", pa.uint8()),
            ("words", pa.int32()),
            ("cleaned", pa.from_numpy_dtype(changed_type())),
            ("text_hash", pa.uint64()),
        ]
    )


def join_text(title: str, abstract: str) -> str:
    """What the model reads: title, a space, abstract; or the one of them that there is."""
    return f"{title} {abstract}" if title and abstract else title or abstract
