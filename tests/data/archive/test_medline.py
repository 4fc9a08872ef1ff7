"""data/archive/medline.py against the standard library's parser, NLM's files and hostile ones."""

import gzip
import re
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.archive.medline import Citation, Deletion, OtherRecord, read_medline
from data.common.files import UserError
from tests.data.citations import article_set, citation, citation_xml, one_line, read_with_elementtree, write_file
from tests.shared import NLM, ROOT, needs_shared

REAL_FILES = sorted(path for path in NLM.rglob("*.xml.gz") if path.parent.name != "malformed")
NAMES = [path.relative_to(NLM).as_posix() for path in REAL_FILES]
NLM_DOCTYPE = (
    '<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle//EN" "https://dtd.nlm.nih.gov/pubmed.dtd">\n'
)


def read_text(tmp_path: Path, content: str) -> list[Citation | Deletion | OtherRecord]:
    path = tmp_path / "made.xml"
    path.write_text(content, encoding="utf-8")
    return list(read_medline(path))


def read_one(tmp_path: Path, title: str = "T", abstract: str = "A") -> Citation:
    (record,) = read_text(tmp_path, article_set(f"<PubmedArticle>{citation_xml(citation(7, title, abstract))}"
                                                "</PubmedArticle>"))  # fmt: skip
    assert isinstance(record, Citation)
    return record


def refusal(tmp_path: Path, content: str) -> str:
    """The message with which a file is refused: one line that names it."""
    with pytest.raises(UserError) as caught:
        read_text(tmp_path, content)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'made.xml'}: ") and "\n" not in message
    return message


def real_content(path: Path) -> bytes:
    """A real file under one of NLM's roots: some test cases of other projects lack it."""
    content = gzip.decompress(path.read_bytes())
    root = re.search(rb"<([A-Za-z_]\w*)", content)
    assert root
    if root[1] == b"RAW_DATA":
        return content.replace(b"RAW_DATA>", b"PubmedArticleSet>")
    if root[1] == b"MedlineCitation":
        return b"<MedlineCitationSet>" + content[root.start() :] + b"</MedlineCitationSet>"
    return content


# What is read


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_real_file_equals_the_standard_librarys_reading(name: str, tmp_path: Path) -> None:
    """Every record: PMID, version, title, abstract with labels, year, journal, languages, types; deletions; in order.

    Formulas of MathML are written in another order ("3He"), so records with MathML are compared by their characters but
    white space; formulas have tests of their own in test_mathml.py.
    """
    content = real_content(NLM / name)
    path = tmp_path / "real.xml"
    path.write_bytes(content)
    ours = list(read_medline(path))
    others = [record for record in ours if isinstance(record, OtherRecord)]
    assert [record.name for record in others] == ["PubmedBookArticle"] * content.count(b"<PubmedBookArticle>")
    ours = [record for record in ours if not isinstance(record, OtherRecord)]
    reference = list(read_with_elementtree(content))
    print(f"{name}: {len(reference)} records compared, {sum(math for _, math in reference)} of them hold MathML")
    assert len(ours) == len(reference) > 0
    for record, (expected, math) in zip(ours, reference, strict=True):
        assert (record.pmid, record.version) == (expected.pmid, expected.version)
        if isinstance(record, Deletion):
            assert expected.deleted
            continue
        assert (record.year, record.journal) == (expected.year, expected.journal)
        assert (record.languages, record.publication_types) == (expected.languages, expected.publication_types)
        assert expected.title is not None and expected.abstract is not None
        if math:
            assert sorted("".join(record.title.split())) == sorted("".join(expected.title.split()))
            assert sorted("".join(record.abstract.split())) == sorted("".join(expected.abstract.split()))
        else:
            assert (record.title, record.abstract) == (expected.title, expected.abstract)


@needs_shared
@pytest.mark.parametrize(
    ("name", "records", "abstracts", "deletions"),
    [("medline16n0902", 604, 526, 1), ("pubmedsample18n0001", 177, 109, 0), ("assembled_3693", 3693, None, 0),
     ("updates/pubmed22n1115", None, None, 34), ("updates/pubmed22n1313", None, None, 559),
     ("updates/pubmed20n1203", None, None, 23), ("updates/versions_and_deletions", None, None, 3),
     ("medsamp2017", 95, None, 7)],
)  # fmt: skip
def test_counts_are_those_of_the_data_sheet(
    name: str, records: int | None, abstracts: int | None, deletions: int
) -> None:
    """shared/data/README.md counts these, and plain regular expressions on the raw file count the same."""
    path = NLM / f"{name}.xml.gz"
    read = list(read_medline(path))
    citations = [record for record in read if isinstance(record, Citation)]
    raw = gzip.decompress(path.read_bytes()).decode()
    assert len(citations) == len(re.findall(r"<MedlineCitation\b", raw))
    assert len(read) - len(citations) == deletions
    assert records in (None, len(citations))
    assert abstracts in (None, sum(bool(record.abstract) for record in citations))


@needs_shared
def test_samples_of_2021_have_258_abstracts() -> None:
    read = [record for path in NLM.glob("pubmed21n*.xml.gz") for record in read_medline(path)]
    assert len(read) == 319
    assert sum(isinstance(record, Citation) and bool(record.abstract) for record in read) == 258


@pytest.mark.parametrize("suffix", [".xml", ".xml.gz"])
def test_plain_and_gzipped_files(suffix: str, tmp_path: Path) -> None:
    path = write_file(tmp_path / f"a{suffix}", [citation(1, "Plain", "Text", version=3)])
    assert list(read_medline(path)) == [Citation(1, 3, "Plain", "Text", 2001, "J")]


def test_both_roots(tmp_path: Path) -> None:
    """Up to 2016 citations stand under MedlineCitationSet without a wrapper."""
    xml = citation_xml(citation(1)) + citation_xml(citation(2))
    old = f"<MedlineCitationSet>{xml}<DeleteCitation><PMID>9</PMID><PMID>8</PMID></DeleteCitation></MedlineCitationSet>"
    records = [record for record in read_text(tmp_path, old) if not isinstance(record, OtherRecord)]
    assert [(type(record), record.pmid) for record in records] == [
        (Citation, 1), (Citation, 2), (Deletion, 9), (Deletion, 8)]  # fmt: skip


# Text


def abstract_of(tmp_path: Path, sections: str) -> str:
    xml = citation_xml(citation(1, "T", "HERE")).replace("<AbstractText>HERE</AbstractText>", sections)
    (record,) = read_text(tmp_path, article_set(f"<PubmedArticle>{xml}</PubmedArticle>"))
    assert isinstance(record, Citation)
    return record.abstract


@pytest.mark.parametrize(
    ("xml", "text"),
    [
        ("H<sub>2</sub>O and Ca<sup>2+</sup>", "H2O and Ca2+"),
        ("<i>E. coli</i> <b>grew</b>", "E. coli grew"),
        ("<i>a<sub>b<sup>c</sup></sub></i>d", "abcd"),
        ("one<!-- a remark -->two <?pi inside?>three", "onetwo three"),
        ("&#945;-x &#x3B2; &lt;5 &amp;lt; &quot;q&quot;", "α-x β <5 &lt; \"q\""),
        ("<![CDATA[a < b & c]]> d", "a < b & c d"),
        ("  two\n\t lines\r\n here ", "two lines here"),
        ("thin\u2009space and no-break\u00a0space", "thin\u2009space and no-break\u00a0space"),
        ("\u2003em space at the edges\u2003", "\u2003em space at the edges\u2003"),
        ("so<DispFormula>x=1</DispFormula>holds", "so x=1 holds"),
    ],
)  # fmt: skip
def test_markup_is_flattened(xml: str, text: str, tmp_path: Path) -> None:
    record = read_one(tmp_path, xml, xml)
    assert (record.title, record.abstract) == (text, text)


piece = st.one_of(
    st.text(st.sampled_from("ab .\n\u2009é"), max_size=4).map(lambda text: (text, text)),
    st.integers(0x21, 0x2FF).map(lambda code: (f"&#{code};", chr(code))),
    st.sampled_from([("<!-- no -->", ""), ("<?no text?>", ""), ("&amp;", "&"), ("<![CDATA[<]]>", "<")]),
)


def joined(pieces: list[tuple[str, str]]) -> tuple[str, str]:
    return "".join(xml for xml, _ in pieces), "".join(text for _, text in pieces)


mixed = st.recursive(
    piece,
    lambda inner: st.tuples(st.sampled_from(["b", "i", "u", "sup", "sub"]), st.lists(inner, max_size=4)).map(
        lambda node: (f"<{node[0]}>{joined(node[1])[0]}</{node[0]}>", joined(node[1])[1])
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(mixed, max_size=6))
def test_no_character_of_generated_markup_is_lost(pieces: list[tuple[str, str]], tmp_path_factory) -> None:
    """Text is written as XML from known characters; these and no others come back."""
    xml, text = joined(pieces)
    record = read_one(tmp_path_factory.mktemp("markup"), title=xml, abstract="A" + xml)
    assert record.title == one_line(text)
    assert record.abstract == one_line("A" + text)


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ('<AbstractText Label="AIM" NlmCategory="OBJECTIVE">One.</AbstractText>'
         '<AbstractText Label="RESULTS">Two.</AbstractText>', "AIM: One. RESULTS: Two."),
        ('<AbstractText Label="UNLABELLED">One.</AbstractText><AbstractText Label="UNASSIGNED">Two.</AbstractText>',
         "UNLABELLED: One. UNASSIGNED: Two."),
        ('<AbstractText Label="AIM:">One.</AbstractText>', "AIM: One."),
        ('<AbstractText Label="A &amp; B">One.</AbstractText>', "A & B: One."),
        ('<AbstractText Label=" ">One.</AbstractText>', "One."),
        ('<AbstractText Label="AIM"/><AbstractText Label="RESULTS">Two.</AbstractText>', "RESULTS: Two."),
        ("<AbstractText>One.</AbstractText><CopyrightInformation>(c) Us</CopyrightInformation>", "One."),
    ],
)  # fmt: skip
def test_sections_follow_their_labels(sections: str, text: str, tmp_path: Path) -> None:
    assert abstract_of(tmp_path, sections) == text


def test_other_abstracts_are_left_out(tmp_path: Path) -> None:
    other = '<OtherAbstract Type="Publisher"><AbstractText>Elsewhere.</AbstractText></OtherAbstract>'
    xml = citation_xml(citation(1, "T", "Here.")).replace("</MedlineCitation>", f"{other}</MedlineCitation>")
    (record,) = read_text(tmp_path, article_set(f"<PubmedArticle>{xml}</PubmedArticle>"))
    assert isinstance(record, Citation) and record.abstract == "Here."


def test_missing_and_empty_title_and_abstract(tmp_path: Path) -> None:
    xml = "<PMID>1</PMID><Article><ArticleTitle/><Abstract><AbstractText/></Abstract></Article>"
    for body in (xml, "<PMID>1</PMID><Article/>", "<PMID>1</PMID>"):
        (record,) = read_text(tmp_path, f"<MedlineCitationSet><MedlineCitation>{body}</MedlineCitation>"
                                        "</MedlineCitationSet>")  # fmt: skip
        assert record == Citation(1, 1, "", "", None, "")


@pytest.mark.parametrize(
    ("date", "year"),
    [("<Year>1999</Year><Month>Dec</Month>", 1999), ("<MedlineDate>1998 Dec-1999 Jan</MedlineDate>", 1998),
     ("<MedlineDate>2000Spring</MedlineDate>", 2000), ("<MedlineDate>Spring</MedlineDate>", None), ("", None)],
)  # fmt: skip
def test_year_of_publication(date: str, year: int | None, tmp_path: Path) -> None:
    xml = citation_xml(citation(1)).replace("<Year>2001</Year>", date)
    (record,) = read_text(tmp_path, article_set(f"<PubmedArticle>{xml}</PubmedArticle>"))
    assert isinstance(record, Citation) and record.year == year


MATH = (
    '<mml:math xmlns:mml="http://www.w3.org/1998/Math/MathML">\n  <mml:msub>\n    <mml:mtext>Cu</mml:mtext>\n'
    "    <mml:mn>2</mml:mn>\n  </mml:msub>\n  <mml:mi>O</mml:mi>\n</mml:math>"
)


def test_indentation_of_mathml_is_layout(tmp_path: Path) -> None:
    assert read_one(tmp_path, abstract=f"oxide ({MATH}) and\n{MATH} too").abstract == "oxide (Cu2O) and Cu2O too"


def test_spaces_of_mathml_are_text(tmp_path: Path) -> None:
    """Only white space with a line break in it is indentation."""
    spaced = MATH.replace("Cu</mml:mtext>\n", "Cu</mml:mtext> ").replace(">O<", ">\n\u2003O\u2003<")
    assert read_one(tmp_path, abstract=spaced).abstract == "Cu 2 \u2003O\u2003"
    assert read_one(tmp_path, abstract=MATH.replace(">O<", ">\n\u2003<")).abstract == "Cu2 \u2003"


@needs_shared
def test_mathml_of_a_real_record(tmp_path: Path) -> None:
    path = tmp_path / "math.xml"
    path.write_bytes(real_content(NLM / "cases" / "doc_medline_mathml_newlines.xml.gz"))
    (record,) = read_medline(path)
    assert isinstance(record, Citation)
    assert "(Cu2O)" in record.title and "(Cu2O)" in record.abstract and "sizes of Cu2O." in record.abstract


def test_scripts_in_unicodes_characters(tmp_path: Path) -> None:
    """Off by default; a script of which Unicode lacks a character stays as it is."""
    xml = (
        "10<sup>-3</sup> M, m<sup>2</sup>, CO<sub>2</sub>, Ca<sup>2+</sup>, x<sup>n</sup>, V<sub>max</sub>, "
        "5<sup>th</sup>, a<sup>1,2</sup>, <i>r<sup>2</sup></i>, y<sup><i>2</i></sup>"
    )
    path = tmp_path / "a.xml"
    path.write_text(article_set(f"<PubmedArticle>{citation_xml(citation(7, 'T' + xml, xml))}</PubmedArticle>"))
    (plain,), (written,) = list(read_medline(path)), list(read_medline(path, unicode_scripts=True))
    assert isinstance(plain, Citation) and isinstance(written, Citation)
    assert plain.abstract == "10-3 M, m2, CO2, Ca2+, xn, Vmax, 5th, a1,2, r2, y2"
    assert written.abstract == "10⁻³ M, m², CO₂, Ca²⁺, xⁿ, Vmax, 5th, a1,2, r², y2"
    assert (plain.title, written.title) == ("T" + plain.abstract, "T" + written.abstract)


@needs_shared
def test_scripts_of_real_records_in_unicodes_characters() -> None:
    """Folded back by Unicode's own compatibility forms, every text is the plain one."""
    changed = total = 0
    for path in sorted(NLM.glob("*.xml.gz")):
        for plain, written in zip(read_medline(path), read_medline(path, unicode_scripts=True), strict=True):
            if isinstance(plain, Citation) and isinstance(written, Citation):
                for before, after in ((plain.title, written.title), (plain.abstract, written.abstract)):
                    assert folded(before) == folded(after)
                    changed, total = changed + (before != after), total + 1
    print(f"{changed} of {total} titles and abstracts have a script that Unicode has")
    assert changed > 50


def folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-")


def test_records_of_other_kinds_are_named(tmp_path: Path) -> None:
    book = "<PubmedBookArticle><BookDocument><PMID>5</PMID></BookDocument></PubmedBookArticle>"
    xml = article_set(f"{book}<PubmedArticle>{citation_xml(citation(1))}</PubmedArticle>{book}")
    records = read_text(tmp_path, xml)
    assert [type(record) for record in records] == [OtherRecord, Citation, OtherRecord]
    assert records[0] == OtherRecord("PubmedBookArticle")


# What is refused


@needs_shared
@pytest.mark.parametrize(
    ("name", "reason"),
    [("bare_ampersand.xml", "not well-formed"), ("no_root.xml", "root element is <PubmedArticle>"),
     ("quoted_string.xml", "not well-formed"), ("text_before_xml.xml", "not well-formed"),
     ("truncated.xml.gz", "truncated gzip")],
)  # fmt: skip
def test_malformed_real_file_is_refused(name: str, reason: str) -> None:
    path = NLM / "malformed" / name
    with pytest.raises(UserError) as caught:
        list(read_medline(path))
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value) and "\n" not in str(caught.value)


@needs_shared
def test_every_malformed_file_is_tested() -> None:
    tested = {"bare_ampersand.xml", "no_root.xml", "quoted_string.xml", "text_before_xml.xml", "truncated.xml.gz"}
    assert {path.name for path in (NLM / "malformed").iterdir()} == tested


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'no.xml'}: no such file")):
        list(read_medline(tmp_path / "no.xml"))


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    """Cut anywhere, plain or gzipped, a file never passes for a shorter one."""
    for suffix in (".xml", ".xml.gz"):
        whole = write_file(tmp_path / f"whole{suffix}", [citation(1), citation(2)]).read_bytes()
        cut = tmp_path / f"cut{suffix}"
        for length in range(0, len(whole) - 1, 7):
            cut.write_bytes(whole[:length])
            with pytest.raises(UserError, match=re.escape(f"{cut}: ")):
                list(read_medline(cut))


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.xml.gz", [citation(pmid) for pmid in range(1, 50)])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path}: ")):
        list(read_medline(path))
    path.write_bytes(b"not gzip at all")
    with pytest.raises(UserError, match="damaged or truncated gzip"):
        list(read_medline(path))


@pytest.mark.parametrize("pmid", ["", "abc", "-5", "1_000", "９", "1.0", "9" * 30])
def test_a_pmid_that_is_no_number_is_refused(pmid: str, tmp_path: Path) -> None:
    xml = article_set(f"<PubmedArticle>{citation_xml(citation(77)).replace('>77<', f'>{pmid}<')}</PubmedArticle>")
    assert "numeric PMID" in refusal(tmp_path, xml)


@pytest.mark.parametrize("pmid", ["<!-- a -->123", "1<?pi a?>23", " 12<!-- a -->3\n"])
def test_remarks_inside_a_pmid_are_passed_over(pmid: str, tmp_path: Path) -> None:
    (record,) = read_text(tmp_path, article_set("", f"<PMID>{pmid}</PMID>"))
    assert record == Deletion(123, 1)


def test_a_record_without_pmid_or_with_a_strange_version_is_refused(tmp_path: Path) -> None:
    assert "numeric PMID" in refusal(tmp_path, article_set("<PubmedArticle><MedlineCitation/></PubmedArticle>"))
    assert "numeric PMID" in refusal(tmp_path, article_set("", '<PMID Version="new">1</PMID>'))


def test_another_root_is_refused(tmp_path: Path) -> None:
    assert "<html>" in refusal(tmp_path, "<html><body>Not found</body></html>")
    assert "<Set>" in refusal(tmp_path, f"<Set>{citation_xml(citation(1))}</Set>")


# Hostile files. An entity could bring in characters of another file, blow up memory, or vanish from a text.


@pytest.mark.parametrize("place", ["title", "label"])
@pytest.mark.parametrize("doctype", ["", NLM_DOCTYPE])
def test_an_undefined_entity_is_refused(doctype: str, place: str, tmp_path: Path) -> None:
    """Where a DTD is named, XML takes the entity for defined there; its character would be missing from our text."""
    xml = citation_xml(citation(1, "a &alpha; b" if place == "title" else "T"))
    if place == "label":
        xml = xml.replace("<AbstractText>", '<AbstractText Label="&alpha;">')
    assert "alpha" in refusal(tmp_path, article_set(f"<PubmedArticle>{xml}</PubmedArticle>", doctype=doctype))


@pytest.mark.parametrize("place", ["title", "label", "unused"])
@pytest.mark.parametrize("declaration", ['<!ENTITY secret "boo">', '<!ENTITY secret SYSTEM "SECRET_FILE">'])
def test_a_declared_entity_is_refused(declaration: str, place: str, tmp_path: Path) -> None:
    hidden = tmp_path / "secret.txt"
    hidden.write_text("the hidden word")
    doctype = f"<!DOCTYPE PubmedArticleSet [{declaration.replace('SECRET_FILE', hidden.as_uri())}]>\n"
    xml = citation_xml(citation(1, "a &secret; b" if place == "title" else "T"))
    if place == "label":
        xml = xml.replace("<AbstractText>", '<AbstractText Label="&secret;">')
    message = refusal(tmp_path, article_set(f"<PubmedArticle>{xml}</PubmedArticle>", doctype=doctype))
    assert "boo" not in message and "hidden" not in message


@pytest.mark.parametrize("place", ["title", "label"])
def test_an_entity_bomb_is_refused_at_once(place: str, tmp_path: Path) -> None:
    """Ten billion characters if it were expanded."""
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    doctype = f'<!DOCTYPE PubmedArticleSet [<!ENTITY e0 "0123456789">{levels}]>\n'
    xml = citation_xml(citation(1, "&e9;" if place == "title" else "T"))
    if place == "label":
        xml = xml.replace("<AbstractText>", '<AbstractText Label="&e9;">')
    start = time.monotonic()
    refusal(tmp_path, article_set(f"<PubmedArticle>{xml}</PubmedArticle>", doctype=doctype))
    assert time.monotonic() - start < 5


def test_a_dtd_is_neither_read_nor_fetched(tmp_path: Path) -> None:
    """A DTD that would define an entity and a default label lies ready; nothing of it reaches the text."""
    dtd = tmp_path / "nlm.dtd"
    dtd.write_text('<!ATTLIST AbstractText Label CDATA "INJECTED"><!ENTITY alpha "a">')
    doctype = f'<!DOCTYPE PubmedArticleSet SYSTEM "{dtd.as_uri()}">\n'
    xml = f"<PubmedArticle>{citation_xml(citation(1, 'T', 'Text.'))}</PubmedArticle>"
    (record,) = read_text(tmp_path, article_set(xml, doctype=doctype))
    assert isinstance(record, Citation) and record.abstract == "Text."


BOMBS = {
    "deep": ("<b>" * 300 + "</b>" * 300, "depth"),
    "long text": ("x" * 11_000_000, "not well-formed"),
    "long attribute": (f'<b a="{"x" * 11_000_000}"/>', "not well-formed"),
    "endless record": ("<b/>" * 20_000_000, "16 MiB without the end of a record"),
    "endless list of authors": (
        "<Author><LastName>A</LastName></Author>" * 3_000_000,
        "MiB without the end of a record",
    ),
    "endless remarks": ("<!-- no -->" * 8_000_000, "MiB without the end of a record"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_absurd_elements_are_refused_in_bounded_memory(name: str, tmp_path: Path) -> None:
    """60 MB and more of XML under some 0.3 MB of gzip, in no more than 600 MB."""
    inner, reason = BOMBS[name]
    xml = article_set(f"<PubmedArticle>{citation_xml(citation(1, 'TITLE'))}</PubmedArticle>").replace("TITLE", inner)
    path = tmp_path / "bomb.xml.gz"
    path.write_bytes(gzip.compress(xml.encode(), 1))
    message, peak = refused_at(path)
    assert message.startswith(f"{path}: ") and reason in message and peak < 600


@pytest.mark.slow  # unpacks a gigabyte
def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    """Half a million equal records, 200 MB out of 1 MB: each is well-formed, but no file of NLM's is like that."""
    record = f"<PubmedArticle>{citation_xml(citation(1, 'T', 'word ' * 60))}</PubmedArticle>"
    path = tmp_path / "bomb.xml.gz"
    with gzip.open(path, "wt") as out:
        out.write("<PubmedArticleSet>")
        for _ in range(500):
            out.write(record * 1_000)
        out.write("</PubmedArticleSet>")
    message, peak = refused_at(path)
    assert "more than 100 times its size unpacked" in message and peak < 150


def refused_at(path: Path) -> tuple[str, float]:
    """The message with which a process of its own refuses the file, and its peak of memory in MB."""
    script = (
        "import re, sys; from pathlib import Path; from data.common.files import UserError\n"
        "from data.archive.medline import read_medline\n"
        "try: print(sum(1 for _ in read_medline(Path(sys.argv[1]))))\n"
        "except UserError as error: print(error)\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    message, peak = done.stdout.splitlines()
    print(f"{peak} KiB: {message}")
    return message, int(peak) * 1024 / 1e6


# Memory


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """20 times the records (24 MB of XML) need no more than 3 MB more; even emptied elements, if kept, take 7 MB."""
    script = (
        "import re, sys; from pathlib import Path; from data.archive.medline import read_medline\n"
        "count = sum(1 for _ in read_medline(Path(sys.argv[1])))\n"
        "print(count, re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    peaks = {}
    for count in (2_000, 40_000):
        records = [citation(number, abstract="word <i>x</i> " * 20) for number in range(1, count + 1)]
        path = write_file(tmp_path / f"{count}.xml", records)
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        read, peak = done.stdout.split()
        assert int(read) == count
        peaks[count] = int(peak)
    print(f"peak KiB by records: {peaks}")
    assert peaks[40_000] - peaks[2_000] < 3_000
