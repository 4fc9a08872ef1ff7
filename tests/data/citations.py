"""Small NLM files for tests, and a reader of NLM files that shares no code with ours."""

import gzip
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Record(NamedTuple):
    """One occurrence of a record in a file; a deletion has neither title nor abstract nor year."""

    pmid: int
    version: int
    title: str | None
    abstract: str | None
    year: int | None = None
    journal: str = ""
    languages: str = ""
    publication_types: str = ""

    @property
    def deleted(self) -> bool:
        return self.title is None


def deletion(pmid: int, version: int = 1) -> Record:
    return Record(pmid, version, None, None)


def citation(pmid: int, title: str = "A title.", abstract: str = "An abstract.", version: int = 1) -> Record:
    return Record(pmid, version, title, abstract)


def citation_xml(record: Record) -> str:
    """Title and abstract go in as XML: with markup and references."""
    abstract = f"<Abstract><AbstractText>{record.abstract}</AbstractText></Abstract>" if record.abstract else ""
    return (
        f'<MedlineCitation Owner="NLM" Status="MEDLINE"><PMID Version="{record.version}">{record.pmid}</PMID>'
        f"<Article><Journal><JournalIssue><PubDate><Year>2001</Year></PubDate></JournalIssue><Title>J</Title></Journal>"
        f"<ArticleTitle>{record.title}</ArticleTitle>{abstract}</Article></MedlineCitation>"
    )


def article_set(citations: str, deletions: str = "", doctype: str = "") -> str:
    """A PubmedArticleSet around the XML of citations and of PMIDs to delete."""
    deleted = f"<DeleteCitation>{deletions}</DeleteCitation>" if deletions else ""
    return f'<?xml version="1.0" encoding="utf-8"?>\n{doctype}<PubmedArticleSet>{citations}{deleted}</PubmedArticleSet>'


def write_file(path: Path, records: list[Record]) -> Path:
    """An NLM file: the citations, then one block of deletions, as in NLM's update files."""
    citations = "".join(f"<PubmedArticle>{citation_xml(r)}</PubmedArticle>\n" for r in records if not r.deleted)
    deletions = "".join(f'<PMID Version="{r.version}">{r.pmid}</PMID>' for r in records if r.deleted)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = article_set(citations, deletions).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def one_line(text: str) -> str:
    """White space of XML (not Unicode's) collapsed."""
    return re.sub("[ \t\r\n]+", " ", text).strip(" ")


def read_with_elementtree(content: bytes) -> Iterator[tuple[Record, bool]]:
    """The records of an NLM file by the standard library, and whether title or abstract hold MathML."""
    for element in ElementTree.fromstring(content).iter():
        if element.tag == "DeleteCitation":
            for pmid in element:
                yield deletion(int(pmid.text or ""), int(pmid.get("Version", 1))), False
        elif element.tag == "MedlineCitation":
            pmid, article = element.find("PMID"), element.find("Article")
            assert pmid is not None and article is not None
            title, abstract = article.find("ArticleTitle"), article.find("Abstract")
            sections = []
            for section in [] if abstract is None else abstract.findall("AbstractText"):
                text, label = one_line("".join(section.itertext())), section.get("Label", "")
                if text and label:
                    text = f"{label.rstrip(':')}: {text}"
                sections += [text] if text else []
            date = article.find("Journal/JournalIssue/PubDate")
            years = re.findall(r"\d{4}", "".join(date.itertext()) if date is not None else "")
            record = Record(
                pmid=int(pmid.text or ""),
                version=int(pmid.get("Version", 1)),
                title="" if title is None else one_line("".join(title.itertext())),
                abstract=" ".join(sections),
                year=int(years[0]) if years else None,
                journal=one_line(article.findtext("Journal/Title") or ""),
                languages=" ".join(language.text or "" for language in article.findall("Language")),
                publication_types="|".join(one_line(each.text or "") for each in article.iter("PublicationType")),
            )
            math = "{http://www.w3.org/1998/Math/MathML}math"
            yield record, any(next(part.iter(math), None) is not None for part in (title, abstract) if part is not None)
