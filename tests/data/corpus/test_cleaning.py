"""data/corpus/cleaning.py: each rule on real records, counted independently, and on generated ones."""

import gzip
import html
import html.entities
import json
import re
import time
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.archive.medline import Citation, one_line, read_medline
from data.corpus import cleaning
from data.corpus.cleaning import (
    RECORDED_WHEN_OFF,
    RULES,
    SGML,
    CleaningSettings,
    Rule,
    changed_type,
    clean,
    cleaning_switches,
    drop_control_characters,
    drop_copyright_tails,
    drop_filler_labels,
    drop_publisher_notes,
    drop_truncation_marks,
    switch_value,
    unescape_entities,
)
from tests.data.pins import check_pin
from tests.shared import NLM, needs_shared

ALL = cleaning_switches(CleaningSettings())
NONE: dict[str, bool | int] = dict.fromkeys(ALL, False)
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
    """What Python's html module unescapes, and what a person found beside it."""
    changed = [text for text in real_texts() if unescape_entities(text) != text]
    reference = [text for text in real_texts() if re.search("&[a-z]+;", text) and html.unescape(text) != text]
    more = [text for text in changed if text not in reference]
    assert [text for text in changed if text not in more] == reference and (len(reference), len(more)) == (2, 4)
    assert set(re.findall("&[a-z]+;", " ".join(reference))) == {"&amp;", "&gt;", "&lt;", "&mdash;"}
    assert all(unescape_entities(text) == html.unescape(text) for text in reference)
    assert {sign for text in more for sign in re.findall("&[a-z]+;|</?PRE>", text)} == {"&onemacr;", "<PRE>", "</PRE>"}


@needs_shared
def test_names_of_sgml_are_those_of_nlms_dtd() -> None:
    """Every name in the ISO sets of NLM's DTD is known, to HTML or to us, and means the same."""
    missing = {}
    for path in sorted((NLM.parent / "dtd").glob("iso*.ent")):
        for name, value in re.findall(r'<!ENTITY\s+(\w+)\s+"([^"]*)"', path.read_text(errors="replace")):
            if f"{name};" not in html.entities.html5:
                missing[f"{name};"] = html.unescape(value)
    assert len(missing) == 69 and {**missing, "onemacr;": "1\u0304"} == SGML


@needs_shared
def test_publisher_notes_of_all_real_texts() -> None:
    """All 146 were read by a person and are notes: 67 at the end, 41 at the start, 38 inside."""
    others = cleaning_switches(CleaningSettings(drop_publisher_notes=False))
    texts = dict.fromkeys([*real_texts(), *abstract_texts(with_titles=True)])
    changes = [(text, note) for text in (clean(text, others)[0] for text in texts)
               if (note := drop_publisher_notes(text)) != text]  # fmt: skip
    tails = [text[len(note) :] for text, note in changes if text.startswith(note)]
    heads = [text[: -len(note)] for text, note in changes if note and text.endswith(note)]
    print(f"{len(changes)} texts: {len(tails)} at the end, {len(heads)} at the start")
    assert len(changes) == 146
    assert all(re.search(r"\d[.)\]]*$|abstract|\[corrected\]|\[This", tail, re.IGNORECASE) for tail in tails)
    assert {head.strip(" :.|—") for head in heads} == {"ABSTRACT", "Abstract", "[corrected]"}


@needs_shared
def test_control_characters_of_real_records() -> None:
    changed = [text for text in real_texts() if drop_control_characters(text) != text]
    odd = [text for text in real_texts() if any(unicodedata.category(each).startswith("C") for each in text)]
    assert changed == odd and len(changed) >= 3


@needs_shared
def test_copyright_tails_of_real_records() -> None:
    """Every tail found was read by a person; and no text ends in such a notice afterwards."""
    tails = [text[len(drop_copyright_tails(text)) :] for text in real_texts()]
    tails = [tail for tail in tails if tail]
    unmarked = " This article is protected by copyright. All rights reserved."
    marked = [tail for tail in tails if tail != unmarked]
    assert (len(marked), len(tails)) == (19, 21)
    assert all(re.match(r" ?\(?(PsycInfo Database Record \(c\)|Copyright ©|©) ?20\d\d ", tail) for tail in marked)
    assert {tail.strip() for tail in tails if len(tail) < 15} == {"©2015 AACR.", "©2017 AACR.", "©2018 AACR."}


def abstract_texts(with_titles: bool = False) -> Iterator[str]:
    """The 32,440 abstracts of other collections, in one line each."""
    for path in sorted((NLM.parent / "abstracts").glob("*.jsonl.gz")):
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            record = json.loads(line)
            if with_titles:
                yield " ".join((record.get("title") or "").split())
            yield " ".join((record.get("abstract") or record.get("text") or "").split())


@needs_shared
def test_copyright_tails_of_32440_abstracts() -> None:
    """All 175 were read by a person and are notices. 153 of them have a mark and a year."""
    cut = [(text, tail) for text in abstract_texts() if (tail := text[len(drop_copyright_tails(text)) :])]
    tails = [tail for _, tail in cut]
    marked = [tail for tail in tails if re.match(r"\s*(?:Copyright|©|\(c\)).{0,20}\b(?:19|20)\d\d", tail)]
    print(f"{len(tails)} tails, {len(marked)} of them with a mark and a year: {sorted(set(tails) - set(marked))}")
    assert (len(tails), len(marked)) == (175, 153) and max(map(len, tails)) < 200
    left = [text for text in abstract_texts() if text == drop_copyright_tails(text)
            and re.search(r"(©|opyright|\([cC]\)) ?[^.]{0,20}(19|20)\d\d.{0,80}$", text)]  # fmt: skip
    assert left == [], "a notice with a year that was missed"


def test_a_copyright_notice_is_searched_for_in_no_time() -> None:
    """Names may be many and long; none of these is a notice, and none takes more than a moment."""
    start = time.monotonic()
    for text in (
        "A" * 330 + " © 2002 " + "A of " * 60 + "b",
        ". Published by " + "Inc A " * 50 + "b",
        "(A) " * 80 + "©",
    ):
        assert drop_copyright_tails(text) == text
    assert time.monotonic() - start < 1


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
        *(
            (f"It works.{tail}", "It works.")
            for tail in (
                " This article is protected by copyright. All rights reserved.",
                " Prostate © 2013 Wiley Periodicals, Inc.",
                " Copyright Academic Press.",
                " Published 2001 Wiley-Liss, Inc.",
                " Published by Elsevier Ltd. All rights reserved.",
                " (c) International Cancer Imaging Society",
                " Copyright RSNA, 2003 [References: 35]",
                " c2003 COSPAR. Published by Elsevier Science Ltd. All rights reserved",
                " 2005 S. Karger AG, Basel [References: 15]",
                " Crown Copyright © 2010. Published by Elsevier Ltd. All rights reserved.",
            )
        ),
        *(
            (text, text)
            for text in (
                "We used a program (© 2012 Adobe Systems Inc.).",
                "This text is on law. Copyright law and society.",
                "The guideline was used. 2006 patients of the American Cancer Society took part.",
                "The guideline is old. Published by the society, it helped.",
                "Lists are: (a) one (b) two. (c) American Society.",
                "No rights are reserved.",
                "All features(c)generated by MAP2B can discriminate IBD.",
            )
        ),
        ("80 &mgr;m P&onemacr; C/EBP&egr; &THgr;", "80 μm P1\u0304 C/EBPε Θ"),
        ("&lt;i&gt;E. coli&lt;/i&gt;&lt;br/&gt;grew, mm<PRE>3</PRE>", "E. coli grew, mm3"),
        *((text, text) for text in ("P<0.001", "x<b and c>d", "a mean of <u> and <E0>", "&fourmacr;")),
        *(
            (f"It works. {tail}", "It works.")
            for tail in (
                "J Am Geriatr Soc 67:2568-2573, 2019.",
                "JAMA. 2000;284:465-471",
                "Journal of Human Hypertension (2000) 14, 75-78.",
                "Cancer Res; 77(22); 6321-9. ©2017 AACR.",
                "(Hepatology 2017;66:389–397).",
                "How to cite this article: Kumar Y. A Trial. Int J Clin Pediatr Dent 2015;8(2):123-126.",
                "Video Abstract.",
                "VIDEO ABSTRACT",
                "[corrected]",
            )
        ),
        ("ABSTRACT: We did.", "We did."),
        (f"Abstract We did. {'It works. ' * 40}", f"We did. {'It works. ' * 40}".strip()),
        (
            "A dose of 5 mg [corrected] was given [published erratum appears in X 2001;3:4].",
            "A dose of 5 mg was given.",
        ),
        ("[This corrects the article DOI: 10.1/x].", ""),
        *(
            (text, text)
            for text in (
                "Abstract Reasoning in Children",
                "It was found by Vadash and Bjarngard [Med. Phys. 20, 733-734 (1993)]",
                "Suicide in an ethical light. Response to Br J Anaesth 2024; 132: 1179-83.",
                "The ratio was 2. Group 1: 23-45.",
                "Registered as CTRI/2009/091/000099, 31-03-2009",
                "[Erratum to: A study of the heart].",
                "We made a graphical abstract of it.",
            )
        ),
        ("[Not Available].", ""),
        ("[In process citation]", ""),
        ("[Not available in this country].", "[Not available in this country]."),
        ("PI3K\ue232AKT, \ue009CF- and (\ue000)", "PI3K AKT, CF- and ()"),
        ("Ob\u00adjec\u00adti\u00adve, Peripro\x99sthetic", "Objective, Periprosthetic"),
        ("5\x9610 mg, 10\u00ad000, a\u200b\ue0005, e\u0301\ue000x", "5 10 mg, 10000, a 5, e\u0301 x"),
        ("Done. © 2018 X. " + "Much more text follows. " * 20, "Done. © 2018 X. " + "Much more text follows. " * 20),
    ],
)
def test_all_rules_on_a_text(text: str, cleaned: str) -> None:
    assert clean(text, ALL) == (cleaned, clean(text, ALL)[1]) and bool(clean(text, ALL)[1]) == (cleaned != text)


@settings(max_examples=2_000, deadline=None)
@given(text=nasty)
def test_generated_texts(text: str) -> None:
    """No rule brings in a character but unescaping; what is dropped is gone; each bit says what its rule did."""
    shown = "".join(" " * c.isspace() if unicodedata.category(c)[0] == "C" else c for c in text)
    kept = drop_control_characters(text)
    assert kept.replace(" ", "") == shown.replace(" ", "") and len(kept) >= len(shown)
    assert all(unicodedata.category(character)[0] != "C" for character in kept)
    for rule in (drop_filler_labels, drop_truncation_marks, drop_copyright_tails):
        position = -1
        for character in rule(text):
            position = text.index(character, position + 1)  # a subsequence of the text
    assert text.startswith(drop_copyright_tails(text))
    assert not re.search(r"\(ABSTRACT TRUNCATED\)", drop_truncation_marks(drop_truncation_marks(text)))
    assert all(character in html.unescape(html.unescape(html.unescape(text))) + " " or character in text
               for character in unescape_entities(text))  # fmt: skip
    result, changed = clean(text, ALL)
    stepwise, bits = text, 0
    for bit, rule in enumerate(RULES):
        bits |= (rule.apply(stepwise) != stepwise) << bit
        stepwise = rule.apply(stepwise)
    assert changed == bits and result == (re.sub("[ \t\r\n]+", " ", stepwise).strip(" ") if bits else text)


# Names, switches, versions

every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
PROBES = [
    "Rats &amp;lt; 5 &#945; &#xB5;m, 37 &degrees;C, AT&T; &mdash; &amp;amp;gt;",
    "zero\u200bwidth soft\u00adhyphen bell\x07 \ufeffmark, line\nbreak\ttab\x85next, private \ue000 thin\u2009space",
    "UNLABELLED: One. UNASSIGNED:Two. RESULTS: Three were UNLABELLED in xUNASSIGNED: green.",
    "It was good.(ABSTRACT TRUNCATED AT 250 WORDS) More (ABSTRACT TRUNCATED AT 400 WORDS)",
    "cut in the mid (ABSTRACT TRUNCATED) and (ABSTRACT TRUNCATED AT LAST)",
    "It works. Copyright (c) 2007 S. Karger AG, Basel.",
    "It works. © 2018 The Authors. Published by X. All rights reserved.",
    "It works. (PsycINFO Database Record (c) 2016 APA, all rights reserved).",
    "Done. Copyright 1999 by the Authors. " + "Much more text follows. " * 20,
    "Doses were (a) 5, (b) 10 or so. (c) 2000 IU daily.",
    "UNLABELLED: a &lt; b\u200b.(ABSTRACT TRUNCATED AT 250 WORDS) © 2018 X.",
    "Nothing to clean in this one: 5 < 10 & α-β (n = 12).",
    "",
]
MORE_PROBES: dict[str, list[str]] = {
    "unescape_entities": ["80 &mgr;m P&onemacr; &THgr; &lt;i&gt;E. coli&lt;/i&gt;<br/>mm<PRE>3</PRE> <u> P<0.001 &x;"],
    "drop_placeholders": ["[Not Available].", "[In Process Citation]", "[Not Available]. More", "Not Available."],
    "drop_publisher_notes": [
        "A. J Am Geriatr Soc 67:2568-2573, 2019.",
        "A. JAMA. 2000;284:465-471",
        "A. Journal of Human Hypertension (2000) 14, 75-78.",
        "A. Cancer Res; 77(22); 6321-9.",
        "A. J Pediatr Surg 36:1829-1831.",
        "A. Cite this article: Bone Joint J 2016;98-B:1240-47.",
        "ABSTRACT: A.",
        "Abstract Reasoning",
        "A [corrected] b. [corrected]. c [published erratum appears in X 2001;3:4].",
        "[This corrects the article DOI: 10.1/x].",
        "A. Video Abstract",
        "A. Graphical Abstract Figure. No Caption available. Highlights",
    ],
    "drop_control_characters": [
        "PI3K\ue232AKT \ue009CF- a\u200b\ue000b 5\x9610 mg 10\u00ad000 F\xc5\x93tus e\u0301\ue000x"
    ],
    "drop_copyright_tails": [
        "A. This article is protected by copyright. All rights reserved.",
        "A. Prostate © 2013 Wiley Periodicals, Inc.",
        "A. Copyright Academic Press.",
        "A. Published 2001 Wiley-Liss, Inc.",
        "A. Published by Elsevier Inc.",
        "A. c2003 COSPAR. Published by Elsevier Science Ltd. All rights reserved",
        "A. 2005 S. Karger AG, Basel [References: 15]",
        "A. Published by the society, it helped.",
    ],
}  # rule name -> texts for it alone: more of PROBES would change every pin
PINS = {  # in the order of RULES
    ("unescape_entities", 1): "3787c5cbc9fe93c6",
    ("unescape_entities", 2): "f8d417b95775299d",
    ("drop_control_characters", 1): "fea9db5d3de8cdd5",
    ("drop_control_characters", 2): "51ca4486361b00eb",
    ("drop_filler_labels", 1): "52cb4c111612af51",
    ("drop_truncation_marks", 1): "84a68ad53bf3671a",
    ("drop_copyright_tails", 1): "22486e617c2f62b6",
    ("drop_copyright_tails", 2): "7c84ea1a53e53107",
    ("drop_publisher_notes", 1): "085879a406114343",
    ("drop_placeholders", 1): "1921c040e56625cd",
}


def probes(rule: Rule) -> list[str]:
    return PROBES + MORE_PROBES.get(rule.name, [])


@every_rule
def test_what_a_rule_does_changes_with_its_version_only(rule: Rule) -> None:
    texts = probes(rule)
    outputs = [rule.apply(text) for text in texts]
    assert outputs != texts, f"no probe is changed by {rule.name}; give it some in MORE_PROBES"
    check_pin(PINS, "rule", "data/corpus/cleaning.py", rule.name, rule.version, outputs)


@every_rule
def test_every_rule_has_its_switch(rule: Rule) -> None:
    assert isinstance(getattr(CleaningSettings(), rule.name), bool)
    text = next(text for text in probes(rule) if rule.apply(text) != text)
    cleaned, changed = clean(text, NONE | {rule.name: True})
    assert cleaned == one_line(rule.apply(text)) and changed == 1 << RULES.index(rule)
    assert clean(text, {}) == (text, 0)


def test_a_rule_keeps_its_place() -> None:
    """The place is the bit in parts that were made before; see the comment at RULES."""
    assert list(dict.fromkeys(name for name, _ in PINS)) == [rule.name for rule in RULES]


def test_every_switch_has_its_rule() -> None:
    assert set(CleaningSettings.model_fields) == {rule.name for rule in RULES}


def test_version_1_is_recorded_as_it_was_before_rules_had_versions() -> None:
    """Bytes of receipts and manifests: the first five rules by true and false, later ones only where they are on."""
    names = [rule.name for rule in RULES[:5]]
    assert set(names) == RECORDED_WHEN_OFF
    off = CleaningSettings.model_validate({rule.name: False for rule in RULES})
    assert json.dumps(cleaning_switches(off)) == json.dumps(dict.fromkeys(names, False))
    on = off.model_copy(update=dict.fromkeys(names, True))
    versions = {rule.name: True if rule.version == 1 else rule.version for rule in RULES[:5]}
    assert json.dumps(cleaning_switches(on)) == json.dumps(versions)
    raised = RULES[0]._replace(version=2)
    assert (switch_value(raised, True), switch_value(raised, False)) == (2, False)
    assert switch_value(raised._replace(version=1), True) is True


@pytest.mark.parametrize(("number", "bits"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (64, 64)])
def test_the_bits_of_all_rules_have_room(number: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    appends = [Rule(f"append_{index}", 1, lambda text: text + "x") for index in range(number)]
    monkeypatch.setattr(cleaning, "RULES", appends)
    assert changed_type().itemsize * 8 == bits
    text, changed = clean("", {rule.name: True for rule in appends})
    assert text == "x" * number and changed == (1 << number) - 1
    assert int(np.array([changed], changed_type())[0]) == changed


def test_more_rules_than_bits_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "RULES", RULES[:1] * 65)
    with pytest.raises(ValueError, match="65 cleaning rules"):
        changed_type()
