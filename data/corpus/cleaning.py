"""What is done to a text and which records stay: rules with names, a switch each, a count each in the manifest.

Cleaning rules change titles and abstracts while a file is read; a record counts for a rule that changed it. Filters
decide on a record when the newest version of each PMID is known; it counts for the first that drops it.
"""

import html.entities
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from data.archive.medline import one_line
from data.common.files import UserError
from data.common.settings import Section, override, read_toml, validate

ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,30}|#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6});")
FILLER_LABEL = re.compile(r"(?<!\S)(?:UNLABELLED|UNASSIGNED): ?")
TRUNCATED = re.compile(r" ?\(ABSTRACT TRUNCATED(?: AT [0-9]+ WORDS)?\)")
# After the end of a sentence or at the start: a mark, perhaps a name, a year, and at most 250 characters to the end.
COPYRIGHT = re.compile(
    r"(?:^|(?<=[.!?)\]]))\s*\(?(?:PsycINFO Database Record )?(?:Copyright(?: ?©| ?\(c\))?|©|\(c\)),? ?"
    r"(?:by )?(?:the authors?(?:\(s\))?,? |[A-Z]\w+ )?(?:19|20)\d\d\b.{0,250}$",
    re.IGNORECASE,
)
COPYRIGHT_TAIL = 330  # characters: where such a notice begins


def unescape_entities(text: str) -> str:
    """`&amp;lt;` in XML is `&lt;` in the text, and < was meant. HTML's names; of others nothing is changed."""
    if "&" in text:
        for _ in range(3):  # escaped thrice is the most that was seen
            text = ENTITY.sub(_unescape, text)
    return text


def _unescape(found: re.Match[str]) -> str:
    """html.unescape alone would take &degrees; for &deg; and "rees;"."""
    entity = found[0]
    return html.unescape(entity) if entity[1] == "#" else html.entities.html5.get(entity[1:], entity)


def drop_control_characters(text: str) -> str:
    """Unicode's category C: control and zero-width characters, soft hyphens, private use. Joins what they parted.

    Those that are white space (line feeds, tabs) become a space.
    """
    if text.isprintable():
        return text
    dropped = {ord(each): " " * each.isspace() for each in set(text) if unicodedata.category(each)[0] == "C"}
    return text.translate(dropped) if dropped else text


def drop_filler_labels(text: str) -> str:
    """NLM's fillers for a section without a label: UNLABELLED, UNASSIGNED."""
    return FILLER_LABEL.sub("", text) if "UN" in text else text


def drop_truncation_marks(text: str) -> str:
    """(ABSTRACT TRUNCATED AT 250 WORDS), as NLM wrote up to 2000."""
    return TRUNCATED.sub("", text) if "(ABSTRACT TR" in text else text


def drop_copyright_tails(text: str) -> str:
    """A notice at the end: a mark and a year, `Copyright 2003 S. Karger AG, Basel`."""
    tail = text[-COPYRIGHT_TAIL:].lower()
    if not ("©" in tail or "(c)" in tail or "copyright" in tail):  # so it is with most, and quickly seen
        return text
    found = COPYRIGHT.search(text, max(0, len(text) - COPYRIGHT_TAIL))
    if not found or (found[0].lstrip()[:3].lower() == "(c)" and "(b)" in text[: found.start()]):  # (a), (b), (c)
        return text
    return text[: found.start()]


CLEANING: tuple[Callable[[str], str], ...] = (  # in this order: an entity may be a control character
    unescape_entities,
    drop_control_characters,
    drop_filler_labels,
    drop_truncation_marks,
    drop_copyright_tails,
)


def _codes(given: Any) -> Any:
    return tuple(given.split(",")) if isinstance(given, str) else given


class CorpusSection(Section):
    """`[corpus]`: the switches of `biogpt corpus`. The defaults are the profile `clean`."""

    profile: Literal["clean", "biogpt"] = "clean"
    """biogpt: as far as is known what the model of 2022 saw. The keys below change single switches of it."""
    title_and_abstract: bool = True
    """Drop citations that lack either; otherwise one suffices."""
    languages: Annotated[tuple[str, ...], BeforeValidator(_codes)] = ()
    """Keep articles in these only, by NLM's codes ("eng,ger"); empty: all, whose abstracts in PubMed are English."""
    first_year: int | None = Field(default=None, ge=1000, le=9999)
    """Drop what was published earlier, or in no known year."""
    last_year: int | None = Field(default=None, ge=1000, le=9999)
    """Drop what was published later, or in no known year."""
    minimum_words: int = Field(default=0, ge=0)
    """Drop shorter texts, in words between spaces. PubMedBERT's was 128."""
    drop_retracted: bool = True
    text_column: str = "text"
    """Of files that are not PubMed's."""
    exclude_pmids: str = ""
    """A file of PMIDs, one a line, that must not be trained on: those of your benchmarks. Nor are equal texts."""
    drop_duplicates: bool = True
    """Of texts that differ in case, white space, compatibility forms or ASCII punctuation at most, one stays."""
    drop_near_duplicates: bool = False
    """Of texts that have most runs of five words in common (Jaccard similarity 0.7 and more), one stays."""
    unescape_entities: bool = True
    drop_control_characters: bool = True
    drop_filler_labels: bool = True
    drop_truncation_marks: bool = True
    drop_copyright_tails: bool = True


CLEAN = CorpusSection()
PROFILES: dict[str, dict[str, Any]] = {
    "clean": {},
    "biogpt": {  # PubMed before 2021; junk was kept, but no character of category C occurs
        "last_year": 2020,
        "drop_retracted": False,
        "drop_duplicates": False,
        "unescape_entities": False,
        "drop_filler_labels": False,
        "drop_truncation_marks": False,
        "drop_copyright_tails": False,
    },
}


def load_corpus_settings(path: Path | None, overrides: list[str] | tuple[str, ...] = ()) -> CorpusSection:
    """The section [corpus] of a TOML file (None: defaults) with `corpus.key=value` over it, over its profile."""
    source = str(path or "biogpt corpus")
    try:
        settings = read_toml(path) if path else {}
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file of settings") from None
    override(settings, overrides, source)
    given = validate(_Root, settings, source).corpus
    return validate(CorpusSection, PROFILES[given.profile] | given.model_dump(exclude_unset=True), source)


class _Root(Section):
    corpus: CorpusSection = CorpusSection()


def cleaning_switches(settings: CorpusSection) -> dict[str, bool]:
    """The switches of the cleaning rules: all that a corpus part depends on."""
    return {rule.__name__: getattr(settings, rule.__name__) for rule in CLEANING}


def clean(text: str, switches: dict[str, bool]) -> tuple[str, int]:
    """The text after the rules that are on, and a bit for each that changed it, in the order of CLEANING."""
    changed = 0
    for bit, rule in enumerate(CLEANING):
        if switches[rule.__name__]:
            cleaned = rule(text)
            if cleaned != text:
                text, changed = cleaned, changed | 1 << bit
    return one_line(text) if changed else text, changed


def folded(text: str) -> str:
    """Compatibility forms and case are one."""
    return unicodedata.normalize("NFKC", text).casefold()


def normalised(text: str) -> bytes:
    """What equal texts have in common: compatibility forms and case folded; no white space, no ASCII punctuation."""
    return folded(text).encode().translate(None, IGNORED)


IGNORED = bytes(code for code in range(128) if not chr(code).isalnum())


def read_pmids(path: Path) -> list[int]:
    """PMIDs, one a line; UserError names a line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"corpus.exclude_pmids = {str(path)!r}: cannot be read ({error})") from None
    for line in lines:
        if not re.fullmatch("[0-9]{1,18}", line):
            raise UserError(f"{path}: {line!r} is no PMID; one a line")
    return [int(line) for line in lines]
