"""One MEDLINE XML file -> citations and deletions, streaming.

Both of NLM's roots are read: `PubmedArticleSet` (today) and `MedlineCitationSet` (up to 2016). Entities, network and
DTD loading are off. The elements are described at https://www.nlm.nih.gov/bsd/licensee/elements_descriptions.html.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]  (a C extension without stubs)

from data.files import UserError

ROOTS = ("PubmedArticleSet", "MedlineCitationSet")
RECORDS = ("PubmedArticle", "PubmedBookArticle")  # children of a PubmedArticleSet
MATHML = "{http://www.w3.org/1998/Math/MathML}math"
UNNAMED_LABELS = ("UNLABELLED", "UNASSIGNED")  # NLM's fillers for a section without a label
SPACES = " \t\r\n"  # XML's; Unicode's other spaces are characters of the text
WHITESPACE = re.compile(f"[{SPACES}]+")
YEAR = re.compile(r"(?<!\d)(1[6-9]|20)\d\d(?!\d)")


@dataclass(frozen=True)
class Citation:
    """One version of one record. `title` and `abstract` are "" where the record has none."""

    pmid: int
    version: int
    title: str
    abstract: str
    year: int | None
    journal: str


@dataclass(frozen=True)
class Deletion:
    """A record that NLM withdrew."""

    pmid: int
    version: int


def read_medline(path: Path) -> Iterator[Citation | Deletion]:
    """The records of an `.xml` or `.xml.gz` file in its order, in memory that does not grow with the file.

    Raises UserError, naming the file, where it is missing, truncated, not well-formed or not NLM's; of a damaged file
    some records may have come before.
    """
    try:
        with _open(path) as stream:
            yield from _parse(path, stream)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or truncated gzip ({error}); download it again") from None


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _parse(path: Path, stream: BinaryIO) -> Iterator[Citation | Deletion]:
    tags = ("MedlineCitation", "DeleteCitation", *RECORDS)
    context = etree.iterparse(
        stream,
        tag=tags,
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
        remove_comments=True,
        remove_pis=True,
    )
    checked = False
    for element in _elements(path, context):
        if not checked:
            _check_root(path, element.getroottree().getroot())
            _check_entities(path, element.getroottree().docinfo)
            checked = True
        if element.tag == "MedlineCitation":
            yield _citation(path, element)
        elif element.tag == "DeleteCitation":
            for pmid in element.iterfind("PMID"):
                yield Deletion(*_pmid(path, pmid))
        if element.tag in RECORDS or element.getparent().tag in ROOTS:
            element.clear()
            while element.getprevious() is not None:
                del element.getparent()[0]
    if not checked:
        _check_root(path, context.root)
    for entry in context.error_log:  # only a warning where the file names a DTD, which might define it
        if entry.type_name == "WAR_UNDECLARED_ENTITY":
            raise UserError(f"{path}: {entry.message.strip()}, line {entry.line}; NLM's files use characters instead")


def _elements(path: Path, context: Any) -> Iterator[Any]:
    try:
        for _, element in context:
            yield element
    except etree.XMLSyntaxError as error:
        fatal = list(context.error_log.filter_from_fatals())  # the exception itself may tell only what came of it
        reason = f"{fatal[0].message.strip()}, line {fatal[0].line}" if fatal else error.msg
        raise UserError(f"{path}: not well-formed XML ({reason}); download it again") from None


def _check_entities(path: Path, docinfo: Any) -> None:
    """Refuse a file that declares entities: they are not expanded, so text would be lost. NLM's files have none."""
    declared = [] if docinfo.internalDTD is None else [entity.name for entity in docinfo.internalDTD.iterentities()]
    if declared:
        raise UserError(f"{path}: declares the entity {declared[0]!r}; NLM's files declare none")


def _check_root(path: Path, root: Any) -> None:
    if root.tag not in ROOTS:
        raise UserError(
            f"{path}: its root element is <{root.tag}>; expected {' or '.join(f'<{tag}>' for tag in ROOTS)}"
        )


def _citation(path: Path, element: Any) -> Citation:
    year = element.findtext("Article/Journal/JournalIssue/PubDate/Year") or element.findtext(
        "Article/Journal/JournalIssue/PubDate/MedlineDate"
    )
    found = YEAR.search(year or "")
    pmid, version = _pmid(path, element.find("PMID"))
    return Citation(
        pmid=pmid,
        version=version,
        title=flatten(element.find("Article/ArticleTitle")),
        abstract=_abstract(element.find("Article/Abstract")),
        year=int(found.group()) if found else None,
        journal=flatten(element.find("Article/Journal/Title")) or flatten(element.find("MedlineJournalInfo/MedlineTA")),
    )


def _pmid(path: Path, element: Any) -> tuple[int, int]:
    if element is not None:
        pmid, version = (element.text or "").strip(SPACES), element.get("Version", "1").strip(SPACES)
        if re.fullmatch("[0-9]{1,18}", pmid) and re.fullmatch("[0-9]{1,9}", version):
            return int(pmid), int(version)
    raise UserError(f"{path}: a record without a numeric PMID and version; it is not NLM's")


def _abstract(element: Any) -> str:
    """The sections of an abstract in one line, each after its label: "METHODS: ... RESULTS: ..."."""
    if element is None:
        return ""
    sections = []
    for section in element.iterfind("AbstractText"):
        text, label = flatten(section), section.get("Label", "").strip(SPACES)
        if text and label and label not in UNNAMED_LABELS:
            text = f"{label}{'' if label.endswith(':') else ':'} {text}"
        sections.append(text)
    return " ".join(section for section in sections if section)


def flatten(element: Any) -> str:
    """The text of an element without its markup, in one line: every character of it, no words glued together.

    Indentation between MathML elements is layout, not text: without it "Cu<sub>2</sub>O" stays one word. A formula
    displayed on a line of its own (DispFormula) has spaces around it.
    """
    if element is None:
        return ""
    for math in element.iter(MATHML):
        for node in math.iter():
            if _is_layout(node.text):
                node.text = None
            if node is not math and _is_layout(node.tail):
                node.tail = None
    for formula in element.iter("DispFormula"):
        formula.text, formula.tail = f" {formula.text or ''}", f" {formula.tail or ''}"
    return WHITESPACE.sub(" ", "".join(element.itertext())).strip(" ")


def _is_layout(text: str | None) -> bool:
    return bool(text) and "\n" in text and not text.strip(SPACES)
