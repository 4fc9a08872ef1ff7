"""Filters: they decide which records stay, once the newest version of each PMID is known.

FILTERS are tried in order, and a record counts for the first one that drops it. They read the parts that pass one
wrote, so you can change a filter's settings without parsing the XML again.

To add a filter, write its function, list it in FILTERS and give its keys a field in FilterSettings, all in this file.
Then add its tests and its pinned hash to tests/data/corpus/test_filters.py.

To change what a filter does, raise its version in FILTERS. The manifest of a corpus records the versions of the
filters in use, so a corpus filtered by an older version is not taken for one filtered by the newer.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from data.common.files import UserError
from data.common.settings import Section
from data.corpus.cleaning import rule_bit

pc: Any = pyarrow.compute  # pyright cannot see its functions: pyarrow creates them at run time
RETRACTED, ERRATUM = "Retracted Publication", "Published Erratum"  # NLM's names
MAX_TYPES = 200  # to drop. The number of what drops a record is stored in a byte: see `first_filter`


def _split_codes(given: Any) -> Any:
    return tuple(given.split(",")) if isinstance(given, str) else given


def _split_types(given: Any) -> Any:
    return tuple(given.split("|")) if isinstance(given, str) else given


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for each in names if (name := each.strip())))


TypeNames = Annotated[
    tuple[str, ...], BeforeValidator(_split_types), AfterValidator(_distinct), Field(max_length=MAX_TYPES)
]


class FilterSettings(Section):
    """The keys of the filters in `[corpus]`."""

    title_and_abstract: bool = True
    """Drop citations that lack a title or an abstract. If false, one of the two is enough."""
    languages: Annotated[tuple[str, ...], BeforeValidator(_split_codes)] = ()
    """Keep only articles in these languages, given by NLM's codes ("eng,ger"). Empty: keep all; PubMed's abstracts are
    in English whatever the language of the article."""
    first_year: int | None = Field(default=None, ge=1000, le=9999)
    """Drop what was published before this year or in an unknown year."""
    last_year: int | None = Field(default=None, ge=1000, le=9999)
    """Drop what was published after this year or in an unknown year."""
    minimum_words: int = Field(default=0, ge=0)
    """Drop texts with fewer words, counted between spaces. PubMedBERT used 128."""
    drop_withdrawn: bool = True
    """Drop articles whose title says so: "WITHDRAWN: ...". NLM has no type of its own for them."""
    drop_publication_types: TypeNames = (RETRACTED, ERRATUM)
    """Drop articles of these types, by NLM's names in capitals or not. As one text they stand between bars, because
    some names hold commas: "Letter|Research Support, U.S. Gov't, P.H.S."."""
    exclude_pmids: str = ""
    """A file with one PMID on each line: those of your benchmarks. These records and equal texts are dropped."""

    @model_validator(mode="before")
    @classmethod
    def _read_drop_retracted(cls, given: Any) -> Any:
        """`drop_retracted`, which settings files of earlier versions have, means what it meant: that type or none."""
        if not isinstance(given, dict) or "drop_publication_types" in given or "drop_retracted" not in given:
            return given
        others = {key: value for key, value in given.items() if key != "drop_retracted"}
        return others | {"drop_publication_types": (RETRACTED,) if given["drop_retracted"] else ()}


Drops = Callable[[pa.RecordBatch, FilterSettings, np.ndarray], np.ndarray]


class Filter(NamedTuple):
    """A filter."""

    name: str
    """Its name in the counts of the manifest and in the report."""
    version: int
    """From 1. Raise it whenever the filter decides differently about any record."""
    keys: tuple[str, ...]
    """Its keys in `[corpus]`. A filter is off if all its keys are false, 0 or empty, unless it is `always_on`."""
    columns: tuple[str, ...]
    """The columns of a part that it reads: see `schema.part_schema`. If you add a column there, raise the version of
    "corpus part" in data/common/files.py, so that all parts are made again."""
    drops: Drops
    """(records, settings, excluded PMIDs) -> bool array, true for the records to drop. With `counted_by`, it has a row
    for each value of that key."""
    always_on: bool = False
    """Whether it drops some records whatever its keys say, or has no keys."""
    counted_by: str = ""
    """One of its keys. What each value of this key drops is counted by itself."""


def _without_title_or_abstract(records: pa.RecordBatch, settings: FilterSettings, _: np.ndarray) -> np.ndarray:
    needed = np.where(_from_pubmed(records) & settings.title_and_abstract, 2, 1)
    return records["fields"].to_numpy() < needed


def _with_a_placeholder_title(records: pa.RecordBatch, settings: FilterSettings, excluded: np.ndarray) -> np.ndarray:
    had_one = records["cleaned"].to_numpy() & rule_bit("drop_placeholders") > 0
    return had_one & _without_title_or_abstract(records, settings, excluded)


def _excluded(records: pa.RecordBatch, _: FilterSettings, excluded: np.ndarray) -> np.ndarray:
    return np.isin(records["pmid"].to_numpy(), excluded)


def _other_language(records: pa.RecordBatch, settings: FilterSettings, _: np.ndarray) -> np.ndarray:
    wanted = set(settings.languages)
    if not wanted:
        return np.zeros(len(records), bool)
    is_other = {codes: wanted.isdisjoint(codes.split()) for codes in records["languages"].unique().to_pylist()}
    return _from_pubmed(records) & np.array([is_other[codes] for codes in records["languages"].to_pylist()], bool)


def _other_year(records: pa.RecordBatch, settings: FilterSettings, _: np.ndarray) -> np.ndarray:
    year = pc.fill_null(records["year"], -1).to_numpy()
    first, last = settings.first_year or -1, settings.last_year or 9999
    unknown = (year < 0) & (settings.last_year is not None)  # for first_year, -1 is early enough to be dropped
    return _from_pubmed(records) & ((year < first) | (year > last) | unknown)


def _short(records: pa.RecordBatch, settings: FilterSettings, _: np.ndarray) -> np.ndarray:
    return records["words"].to_numpy() < settings.minimum_words


def _withdrawn(records: pa.RecordBatch, settings: FilterSettings, _: np.ndarray) -> np.ndarray:
    says_so = pc.match_substring_regex(records["title"], r"^\[?withdrawn:", ignore_case=True).to_numpy(False)
    return _from_pubmed(records) & says_so & settings.drop_withdrawn


def _of_publication_types(records: pa.RecordBatch, settings: FilterSettings, _: np.ndarray) -> np.ndarray:
    """A row for each type to drop. A record of two of them is in both rows, and counts for the first."""
    coded = records["publication_types"].dictionary_encode()
    has = [set(types.casefold().split("|")) for types in coded.dictionary.to_pylist()]
    wanted = [name.casefold() for name in settings.drop_publication_types]
    dropped = np.array([[name in types for types in has] for name in wanted], bool).reshape(len(wanted), len(has))
    return dropped[:, coded.indices.to_numpy()]


def _from_pubmed(records: pa.RecordBatch) -> np.ndarray:
    """Mask of PubMed's records. Other text has negative numbers, and neither title nor year nor language."""
    return records["pmid"].to_numpy() >= 0


EXCLUDED = "excluded"  # by name, because selection also drops the texts equal to those that it drops
FILTERS = (
    Filter(  # before the next, to have a count of its own
        "placeholder_title",
        version=1,
        keys=("title_and_abstract",),
        columns=("pmid", "fields", "cleaned"),
        drops=_with_a_placeholder_title,
    ),
    Filter(
        "without_title_or_abstract",
        version=1,
        keys=("title_and_abstract",),
        columns=("pmid", "fields"),
        drops=_without_title_or_abstract,
        always_on=True,
    ),
    Filter(EXCLUDED, version=1, keys=("exclude_pmids",), columns=("pmid",), drops=_excluded),
    Filter("other_language", version=1, keys=("languages",), columns=("pmid", "languages"), drops=_other_language),
    Filter("other_year", version=1, keys=("first_year", "last_year"), columns=("pmid", "year"), drops=_other_year),
    Filter("short", version=1, keys=("minimum_words",), columns=("words",), drops=_short),
    Filter("withdrawn", version=1, keys=("drop_withdrawn",), columns=("pmid", "title"), drops=_withdrawn),
    Filter(
        "publication_types",
        version=1,
        keys=("drop_publication_types",),
        columns=("publication_types",),
        drops=_of_publication_types,
        counted_by="drop_publication_types",
    ),
)


def reasons(settings: FilterSettings) -> list[tuple[str, str]]:
    """What is counted, in order: (filter, ""), or (filter, value) for each value of its key `counted_by`."""
    values = {each.name: getattr(settings, each.counted_by) if each.counted_by else ("",) for each in FILTERS}
    return [(name, value) for name, counted in values.items() for value in counted]


def first_filter(records: pa.RecordBatch, settings: FilterSettings, excluded: np.ndarray) -> np.ndarray:
    """For each record 1 + the index in `reasons` of the first that drops it, or 0 if none does.

    records: the columns that FILTERS name, and any others; excluded: the PMIDs in the file `exclude_pmids`.
    """
    masks = [mask for each in FILTERS for mask in np.atleast_2d(each.drops(records, settings, excluded))]
    return np.select(masks, range(1, len(masks) + 1), 0)


def filter_code(name: str, settings: FilterSettings) -> int:
    """What `first_filter` returns for a record that this filter drops."""
    return 1 + [each for each, _ in reasons(settings)].index(name)


def filter_versions(settings: FilterSettings) -> dict[str, int]:
    """Filter name -> version, as manifests record it beside the keys.

    Only filters in use are recorded. Version 1 is recorded only of filters without keys: manifests held no versions
    before filters had them, and corpora of that time stay valid.
    """
    in_use = [each for each in FILTERS if each.always_on or any(getattr(settings, key) for key in each.keys)]
    return {each.name: each.version for each in in_use if each.version > 1 or not each.keys}


def read_excluded(settings: FilterSettings) -> np.ndarray:
    """The PMIDs in the file `exclude_pmids` as int64; empty if none is given. UserError names a line without a PMID."""
    pmids = read_pmids(Path(settings.exclude_pmids)) if settings.exclude_pmids else []
    return np.array(pmids, np.int64)


def read_pmids(path: Path) -> list[int]:
    """PMIDs from a file with one on each line. UserError names the file, and the line if it is not a PMID."""
    if path.exists() and not path.is_file():
        raise UserError(f"corpus.exclude_pmids = {str(path)!r}: is no file (a folder, or a special file)")
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"corpus.exclude_pmids = {str(path)!r}: cannot be read ({error})") from None
    for line in lines:
        if not re.fullmatch("[0-9]{1,18}", line):
            raise UserError(f"{path}: {line!r} is not a PMID; write one PMID on each line")
    return [int(line) for line in lines]
