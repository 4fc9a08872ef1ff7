"""One MEDLINE XML file -> citations and deletions, streaming.

Both of NLM's root elements are read: `PubmedArticleSet` (today) and `MedlineCitationSet` (until 2016). Entities,
network and DTD loading are off. libxml2 bounds the depth (256) and the length of a text (10 MB); this module bounds
the size of a record and the growth of a gzip file. NLM describes the elements at
https://www.nlm.nih.gov/bsd/licensee/elements_descriptions.html.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from isal import igzip, isal_zlib
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]  (a C extension without stubs)

from data.archive.mathml import NAMESPACE, SPACES, linear, unicode_script
from data.common.files import UserError

BOOK = "PubmedBookArticle"
ROOTS = ("PubmedArticleSet", "MedlineCitationSet")
# Bytes of XML in which a record must end. They become a tree of 500 MB at worst. NLM's longest records have about 5 MB.
MAX_RECORD = 16 << 20
MAX_GROWTH = 100  # a gzip file may unpack to this times its size, plus MAX_RECORD; NLM's unpack to 9 times
# Of a gzip file. isal's stub says that its error is an instance.
DAMAGED = (EOFError, igzip.BadGzipFile, cast(type[Exception], isal_zlib.error))
NUMBER = re.compile("[0-9]{1,9}")
YEAR = re.compile(r"(?<!\d)(1[6-9]|20)\d\d(?!\d)")


class Citation(NamedTuple):
    """One version of one record. `title` and `abstract` are "" if the record has none."""

    pmid: int
    version: int
    title: str
    abstract: str
    year: int | None
    journal: str
    languages: str = ""
    """The languages of the article, by NLM's codes: "eng", "eng fre"."""
    publication_types: str = ""
    """NLM's names of its types, between bars: "Journal Article|Published Erratum"."""


class Deletion(NamedTuple):
    """A record that NLM withdrew."""

    pmid: int
    version: int


class OtherRecord(NamedTuple):
    """A record of a kind that is not read, such as a book."""

    name: str
    """The name of its element: "PubmedBookArticle"."""


def read_medline(path: Path, unicode_scripts: bool = False) -> Iterator[Citation | Deletion | OtherRecord]:
    """The records of an `.xml` or `.xml.gz` file, in order. The memory used does not grow with the file.

    unicode_scripts: see `flatten`, of titles and abstracts.

    Raises UserError, which names the file, if it is missing, truncated, not well-formed or not NLM's. Some records of a
    damaged file may come before the error.
    """
    try:
        with _open(path) as stream:
            yield from _parse(path, _Bounded(path, stream), unicode_scripts)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except DAMAGED as error:
        raise UserError(f"{path}: damaged or truncated gzip ({error}); download it again") from None


def _open(path: Path) -> BinaryIO:
    if path.suffix != ".gz":
        return path.open("rb")
    with path.open("rb") as stream:
        unpacked = stream.read(4).lstrip(b"\xef\xbb\xbf").startswith(b"<")  # a browser did it and kept the name
    return path.open("rb") if unpacked else igzip.open(path, "rb")  # type: ignore[return-value]


class _Bounded:
    """A stream that raises UserError if a record does not end within MAX_RECORD, or the file unpacks to too much."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path, self._stream = path, stream
        self._left = MAX_RECORD + path.stat().st_size * (MAX_GROWTH if path.suffix == ".gz" else 1)
        self.since_record = 0

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._left -= len(content)
        self.since_record += len(content)
        if self._left < 0:
            raise UserError(
                f"{self._path}: more than {MAX_GROWTH} times its size unpacked; it is not one of NLM's files"
            )
        if self.since_record > MAX_RECORD:
            raise UserError(
                f"{self._path}: more than {MAX_RECORD >> 20} MiB without the end of a record; it is not NLM's"
            )
        return content


def _parse(path: Path, stream: _Bounded, unicode_scripts: bool) -> Iterator[Citation | Deletion | OtherRecord]:
    context = etree.iterparse(
        stream,
        tag=("MedlineCitation", "DeleteCitation", BOOK),
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
        remove_comments=True,
        remove_pis=True,
        collect_ids=False,
    )
    checked = False
    for element in _elements(path, context):
        stream.since_record = 0
        if not checked:
            _check_root(path, element.getroottree().getroot())
            _check_entities(path, element.getroottree().docinfo)
            checked = True
        tag = element.tag
        if tag == "MedlineCitation":
            yield _citation(path, element, unicode_scripts)
        elif tag == "DeleteCitation":
            for pmid in element.iterchildren("PMID"):
                yield Deletion(*_pmid(path, pmid))
        else:
            yield OtherRecord(tag)
        parent = element.getparent()
        element.clear()
        if parent.tag == "PubmedArticle":  # its own end is no event, so it is removed at the next record
            element, parent = parent, parent.getparent()
        while element.getprevious() is not None:
            del parent[0]
    if not checked:
        _check_root(path, context.root)
    for entry in context.error_log:  # only a warning if the file names a DTD, which might declare it
        if entry.type_name == "WAR_UNDECLARED_ENTITY":
            raise UserError(f"{path}: {entry.message.strip()}, line {entry.line}; NLM's files use characters instead")


def _elements(path: Path, context: Any) -> Iterator[Any]:
    try:
        for _, element in context:
            yield element
    except etree.XMLSyntaxError as error:
        fatal = list(context.error_log.filter_from_fatals())  # the exception itself may name only a consequence
        reason = f"{fatal[0].message.strip()}, line {fatal[0].line}" if fatal else error.msg
        raise UserError(f"{path}: not well-formed XML ({reason}); download it again") from None


def _check_entities(path: Path, docinfo: Any) -> None:
    """Refuse a file that declares entities. They are not expanded, so text would be lost. NLM's files declare none."""
    declared = [] if docinfo.internalDTD is None else [entity.name for entity in docinfo.internalDTD.iterentities()]
    if declared:
        raise UserError(f"{path}: declares the entity {declared[0]!r}; NLM's files declare none")


def _check_root(path: Path, root: Any) -> None:
    if root.tag not in ROOTS:
        raise UserError(
            f"{path}: its root element is <{root.tag}>; expected {' or '.join(f'<{tag}>' for tag in ROOTS)}"
        )


def _citation(path: Path, element: Any, unicode_scripts: bool) -> Citation:
    whole = _child(element, "Article")
    article = _children(whole)
    languages = () if whole is None else whole.iterchildren("Language")
    journal = _children(article.get("Journal"))
    date = _child(journal.get("JournalIssue"), "PubDate")
    year = _child(date, "Year")
    found = YEAR.search(flatten(year) or flatten(_child(date, "MedlineDate")))
    pmid, version = _pmid(path, _child(element, "PMID"))
    return Citation(
        pmid=pmid,
        version=version,
        title=flatten(article.get("ArticleTitle"), unicode_scripts),
        abstract=_abstract(article.get("Abstract"), unicode_scripts),
        year=int(found.group()) if found else None,
        journal=flatten(journal.get("Title")) or flatten(_child(_child(element, "MedlineJournalInfo"), "MedlineTA")),
        languages=" ".join([flatten(each) for each in languages]),
        publication_types="|".join([flatten(each) for each in article.get("PublicationTypeList", [])]),
    )


def _child(element: Any, tag: str) -> Any:
    """The first child with this tag, or None if there is none or no element. Much faster than `find`."""
    return None if element is None else next(element.iterchildren(tag), None)


def _children(element: Any) -> dict[str, Any]:
    """Tag -> the first child with it; empty if there is no element. Where several are needed, faster than `_child`."""
    first: dict[str, Any] = {}
    for child in () if element is None else element:
        first.setdefault(child.tag, child)
    return first


def _pmid(path: Path, element: Any) -> tuple[int, int]:
    if element is not None:
        pmid, version = (element.text or "").strip(SPACES), element.get("Version", "1").strip(SPACES)
        if NUMBER.fullmatch(pmid) and NUMBER.fullmatch(version):
            return int(pmid), int(version)
    raise UserError(f"{path}: a record without a numeric PMID and version; the file is not NLM's")


def _abstract(element: Any, unicode_scripts: bool) -> str:
    """All sections of an abstract in one line, each with its label before it: "METHODS: ... RESULTS: ..."."""
    if element is None:
        return ""
    sections = []
    for section in element.iterchildren("AbstractText"):
        text, label = flatten(section, unicode_scripts), section.get("Label", "").strip(SPACES)
        if text and label:
            text = f"{label}{'' if label.endswith(':') else ':'} {text}"
        sections.append(text)
    return " ".join(section for section in sections if section)


def flatten(element: Any, unicode_scripts: bool = False) -> str:
    """The text of an element without its markup, in one line. No character is lost, and no words are glued together.

    MathML is written linearly: see `data.archive.mathml`. A formula that is displayed on a line of its own
    (DispFormula) gets spaces around it.

    unicode_scripts: write superscripts and subscripts in Unicode's characters where it has all of them ("10⁻³", "m²",
    "CO₂"), instead of as ordinary characters ("10-3", "m2", "CO2"). It is off by default, because today's full text
    does not read so: of NLM's own texts in the shared data, 481 scripts are markup and 14 are such characters, and in
    32,440 abstracts without markup there are 84. A model trained with it would read others' plain "m2" as something it
    has hardly seen.
    """
    if element is None:
        return ""
    if not len(element):  # most elements have no markup
        return one_line(element.text or "")
    for math in list(element.iter(NAMESPACE + "math")):
        text = linear(math, unicode_scripts)
        math.clear(keep_tail=True)
        math.text = text
    for formula in element.iter("DispFormula"):
        formula.text, formula.tail = f" {formula.text or ''}", f" {formula.tail or ''}"
    if unicode_scripts:
        for script in element.iter("sup", "sub"):
            if not len(script):
                script.text = unicode_script(script.tag, script.text or "")
    return one_line("".join(element.itertext()))


def one_line(text: str) -> str:
    """The text with XML's white space (not Unicode's) collapsed. Much faster than a regular expression."""
    text = text.replace("\n", " ").replace("\t", " ").replace("\r", " ")
    while "  " in text:
        text = text.replace("  ", " ")
    return text.strip(" ")
