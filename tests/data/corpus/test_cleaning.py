"""data/corpus/cleaning.py: each rule on real records, counted independently, and on generated ones."""

import gzip
import html
import json
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.archive.medline import Citation, read_medline
from data.common.files import UserError
from data.corpus.cleaning import (
    CLEAN,
    CLEANING,
    clean,
    cleaning_switches,
    drop_control_characters,
    drop_copyright_tails,
    drop_filler_labels,
    drop_truncation_marks,
    load_corpus_settings,
    normalised,
    read_pmids,
    unescape_entities,
)
from tests.shared import NLM, needs_shared

ALL = cleaning_switches(CLEAN)
NONE = dict.fromkeys(ALL, False)
JUNK = ["&lt;", "&amp;", "amp;", "UNLABELLED: ", "UNASSIGNED:", "(c) 2003 X", "Copyright ", "\u200b", ". ", "A", " "]
JUNK += ["(ABSTRACT TRUNCATED AT 250 WORDS)", "(ABSTRACT TRUNCATED)", "&#7;", "\u00ad", "&#x200b;", "\x07", "  "]
nasty = st.text(max_size=40) | st.lists(st.sampled_from(JUNK) | st.text(max_size=3), max_size=9).map("".join)


@cache
def real_fields() -> tuple[tuple[Path, str, str], ...]:
    """(file, title, abstract) of every record of NLM's files that has NLM's roots."""
    found = []
    for path in sorted(NLM.glob("*.xml.gz")) + sorted((NLM / "updates").glob("*.xml.gz")):
        records = [record for record in read_medline(path) if isinstance(record, Citation)]
        found += [(path, record.title, record.abstract) for record in records]
    return tuple(found)


def real_texts() -> Iterator[str]:
    for _, title, abstract in real_fields():
        yield from (title, abstract)


def raw_count(pattern: str) -> int:
    """Occurrences in the bytes of the same files, whatever a parser makes of them."""
    return sum(len(re.findall(pattern, gzip.decompress(path.read_bytes()).decode()))
               for path in {path for path, _, _ in real_fields()})  # fmt: skip


# Each rule on real records


@needs_shared
def test_filler_labels_of_real_records() -> None:
    changed = [text for text in real_texts() if drop_filler_labels(text) != text]
    assert len(changed) == raw_count(r'Label="(?:UNLABELLED|UNASSIGNED)"[^>]*>\s*\S') >= 30
    assert not any(re.search("UNLABELLED|UNASSIGNED", drop_filler_labels(text)) for text in changed)


@needs_shared
def test_truncation_marks_of_real_records() -> None:
    changed = [text for text in real_texts() if drop_truncation_marks(text) != text]
    assert len(changed) == raw_count(r"\(ABSTRACT TRUNCATED AT \d+ WORDS\)") >= 19
    assert not any("TRUNCATED" in drop_truncation_marks(text) for text in changed)


@needs_shared
def test_double_escaped_entities_of_real_records() -> None:
    changed = [text for text in real_texts() if unescape_entities(text) != text]
    reference = [text for text in real_texts() if re.search("&[a-z]+;", text) and html.unescape(text) != text]
    assert changed == reference and len(changed) == 2
    assert set(re.findall("&[a-z]+;", " ".join(changed))) == {"&amp;", "&gt;", "&lt;", "&mdash;"}
    assert all(unescape_entities(text) == html.unescape(text) for text in changed)


@needs_shared
def test_control_characters_of_real_records() -> None:
    changed = [text for text in real_texts() if drop_control_characters(text) != text]
    odd = [text for text in real_texts() if any(unicodedata.category(each).startswith("C") for each in text)]
    assert changed == odd and len(changed) >= 3


@needs_shared
def test_copyright_tails_of_real_records() -> None:
    """Every tail found was read by a person: a mark and a year; and no text ends in such a notice afterwards."""
    tails = [text[len(drop_copyright_tails(text)) :] for text in real_texts()]
    tails = [tail for tail in tails if tail]
    assert len(tails) == 19 and all(re.match(r" ?\(?(PsycInfo Database Record \(c\)|Copyright ©|©) ?20\d\d ", tail)
                                    for tail in tails)  # fmt: skip
    assert {tail.strip() for tail in tails if len(tail) < 15} == {"©2015 AACR.", "©2017 AACR.", "©2018 AACR."}


@needs_shared
def test_copyright_tails_of_32440_abstracts() -> None:
    tails, left = [], 0
    for path in sorted((NLM.parent / "abstracts").glob("*.jsonl.gz")):
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            record = json.loads(line)
            text = " ".join((record.get("abstract") or record.get("text") or "").split())
            tail = text[len(drop_copyright_tails(text)) :]
            tails += [tail] if tail else []
            left += not tail and bool(re.search(r"(©|opyright|\([cC]\)) ?[^.]{0,20}(19|20)\d\d.{0,80}$", text))
    assert len(tails) == 151 and max(map(len, tails)) < 200
    assert left == 2  # "Copyright RSNA, 2003", and one after an address that ends without a full stop


@needs_shared
def test_real_texts_without_junk_are_left_as_they_are() -> None:
    unchanged = 0
    for text in real_texts():
        cleaned, changed = clean(text, ALL)
        assert bool(changed) == (cleaned != text) and clean(text, NONE) == (text, 0)
        unchanged += cleaned == text
    assert unchanged > 0.98 * 2 * len(real_fields())


# And on made ones


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("p &lt; 0.05 and &amp;gt; 3", "p < 0.05 and > 3"),
        ("AT&T; R&D &unknownname; &", "AT&T; R&D &unknownname; &"),
        ("&#945;-x, &#x3B2;", "α-x, β"),
        ("&amp;amp;lt;", "<"),
        ("zero\u200bwidth soft\u00adhyphen bell\x07 \ufeffmark", "zerowidth softhyphen bell mark"),
        ("thin\u2009space stays", "thin\u2009space stays"),
        ("line&#10;break,\x85tab\x0bbed", "line break, tab bed"),
        ("37 &degrees;C, &section; 2, Wnt&notch;", "37 &degrees;C, &section; 2, Wnt&notch;"),
        (
            "Rats had (a) 5, (b) 10 or (c) 2000 IU daily. All did.",
            "Rats had (a) 5, (b) 10 or (c) 2000 IU daily. All did.",
        ),
        ("Rats (a, b).(b) 1000 IU (n = 12) (c) 2000 IU daily.", "Rats (a, b).(b) 1000 IU (n = 12) (c) 2000 IU daily."),
        ("UNLABELLED: One. UNASSIGNED: Two. RESULTS: Three.", "One. Two. RESULTS: Three."),
        ("These were UNLABELLED in green.", "These were UNLABELLED in green."),
        ("It was good.(ABSTRACT TRUNCATED AT 250 WORDS)", "It was good."),
        ("cut in the mid (ABSTRACT TRUNCATED)", "cut in the mid"),
        ("It works. Copyright (c) 2007 S. Karger AG, Basel.", "It works."),
        ("It works. © 2018 The Authors. Published by X.", "It works."),
        ("(b) the cost, and (c) 2010 was a good year.", "(b) the cost, and (c) 2010 was a good year."),
        ("Copyright law changed in 1976. We study it.", "Copyright law changed in 1976. We study it."),
        ("Done. © 2018 X. " + "Much more text follows. " * 20, "Done. © 2018 X. " + "Much more text follows. " * 20),
    ],
)
def test_all_rules_on_a_text(text: str, cleaned: str) -> None:
    assert clean(text, ALL) == (cleaned, clean(text, ALL)[1]) and bool(clean(text, ALL)[1]) == (cleaned != text)


@settings(max_examples=2_000, deadline=None)
@given(text=nasty)
def test_generated_texts(text: str) -> None:
    """No rule brings in a character but unescaping; what is dropped is gone; each bit says what its rule did."""
    shown = (" " * c.isspace() if unicodedata.category(c)[0] == "C" else c for c in text)
    assert drop_control_characters(text) == "".join(shown)
    for rule in (drop_filler_labels, drop_truncation_marks, drop_copyright_tails):
        position = -1
        for character in rule(text):
            position = text.index(character, position + 1)  # a subsequence of the text
    assert text.startswith(drop_copyright_tails(text))
    assert not re.search(r"\(ABSTRACT TRUNCATED\)", drop_truncation_marks(drop_truncation_marks(text)))
    assert all(character in html.unescape(html.unescape(html.unescape(text))) or character in text
               for character in unescape_entities(text))  # fmt: skip
    result, changed = clean(text, ALL)
    stepwise, bits = text, 0
    for bit, rule in enumerate(CLEANING):
        bits |= (rule(stepwise) != stepwise) << bit
        stepwise = rule(stepwise)
    assert changed == bits and result == (re.sub("[ \t\r\n]+", " ", stepwise).strip(" ") if bits else text)


@pytest.mark.parametrize("rule", CLEANING, ids=lambda rule: rule.__name__)
def test_every_rule_has_its_switch(rule) -> None:
    text = "UNLABELLED: a &lt; b\u200b.(ABSTRACT TRUNCATED AT 250 WORDS) © 2018 X."
    assert rule(text) != text
    cleaned, changed = clean(text, NONE | {rule.__name__: True})
    assert cleaned == rule(text) and changed == 1 << CLEANING.index(rule)


def test_texts_that_count_as_equal() -> None:
    assert normalised("The ﬁrst  Title.") == normalised("the first title") == b"thefirsttitle"
    assert len({normalised(text) for text in ("IL-2", "IL2", "il 2.", "IL 2\n")}) == 1
    assert normalised("α-1") != normalised("β-1") and normalised("naïve") != normalised("naive")


# Settings


def test_profiles_and_what_is_put_over_them(tmp_path: Path) -> None:
    assert load_corpus_settings(None) == CLEAN and CLEAN.drop_retracted and CLEAN.last_year is None
    biogpt = load_corpus_settings(None, ["corpus.profile=biogpt"])
    assert cleaning_switches(biogpt) == NONE | {"drop_control_characters": True}
    assert not biogpt.drop_duplicates and not biogpt.drop_retracted and biogpt.last_year == 2020
    path = tmp_path / "corpus.toml"
    path.write_text('[corpus]\nprofile = "biogpt"\nlanguages = ["eng"]\nminimum_words = 5\n')
    both = load_corpus_settings(path, ["corpus.minimum_words=7", "corpus.drop_duplicates=true"])
    assert load_corpus_settings(None, ["corpus.languages=eng,ger"]).languages == ("eng", "ger")
    assert (both.languages, both.minimum_words, both.drop_duplicates, both.last_year) == (("eng",), 7, True, 2020)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("corpus.minimum_word=3", "unknown key corpus.minimum_word; did you mean corpus.minimum_words?"),
        ("corpus.minimum_words=-3", "corpus.minimum_words = -3"),
        ("corpus.profile=dirty", "corpus.profile = 'dirty'"),
        ("corpora.languages=eng", "unknown key corpora; did you mean corpus?"),
        ("corpus.languages", "not of the form section.key=value"),
    ],
)
def test_mistakes_in_settings_are_named(given: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        load_corpus_settings(None, [given])


def test_files_of_settings_and_pmids_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.toml: no such file"):
        load_corpus_settings(tmp_path / "no.toml")
    (tmp_path / "pmids").write_text("12\n\n34\n")
    assert read_pmids(tmp_path / "pmids") == [12, 34]
    (tmp_path / "pmids").write_text("12\nPMC34\n")
    with pytest.raises(UserError, match="'PMC34' is no PMID"):
        read_pmids(tmp_path / "pmids")
    with pytest.raises(UserError, match="exclude_pmids"):
        read_pmids(tmp_path / "absent")
