"""Cleaning rules: functions that change titles and abstracts while pass one reads a file.

Every rule has a name, a version, and a switch of the same name in the section `[corpus]`. The manifest of a corpus
counts the records that each rule changed.

To add a rule, write its function, list it at the end of RULES and give it a switch in CleaningSettings, all in this
file. Then add its tests and its pinned hash to tests/data/corpus/test_cleaning.py.

To change what a rule does, raise its version in RULES. Receipts and manifests record the versions, so parts made with
the older version are made again, and a corpus made with it is not taken for one made with the newer.
"""

import html.entities
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from data.archive.medline import one_line
from data.common.settings import Section


class Rule(NamedTuple):
    """A cleaning rule."""

    name: str
    """The name of its switch in `[corpus]` and of its count in the manifest."""
    version: int
    """From 1. Raise it whenever the rule gives another result for any text."""
    apply: Callable[[str], str]
    """Returns the cleaned text. It need not collapse the spaces that it leaves: `clean` does."""


# HTML entities. They stand in PubMed where a publisher escaped a text that NLM escaped again.

ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,30}|#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6});")
# Names that HTML lacks: those of SGML's Greek sets ISOgrk1 and ISOgrk2 (all other names of the ISO sets in NLM's DTD
# are HTML's, but for bold Greek, which those sets put into private use), and one of crystallography's publishers.
GREEK = (
    "a=α b=β g=γ d=δ e=ε z=ζ ee=η th=θ i=ι k=κ l=λ m=μ n=ν x=ξ o=ο p=π r=ρ s=σ t=τ u=υ ph=φ kh=χ ps=ψ oh=ω"
    " aac=ά eac=έ eeac=ή iac=ί idi=ϊ oac=ό uac=ύ udi=ϋ ohac=ώ"
)
SGML = {"sfgr;": "ς", "idiagr;": "ΐ", "udiagr;": "ΰ", "onemacr;": "1\u0304"}
for _name, _, _letter in (entry.partition("=") for entry in GREEK.split(" ")):
    SGML[f"{_name}gr;"] = _letter
    _capitals = 2 if _name[:2] in ("ee", "th", "ph", "kh", "ps", "oh") else 1
    SGML[f"{_name[:_capitals].upper()}{_name[_capitals:]}gr;"] = _letter.upper()
TAG = re.compile(r"<(/?)(i|b|u|p|em|strong|sub|sup|italic|bold|sc|pre|br)( ?/)?>", re.IGNORECASE)  # written as text


def unescape_entities(text: str) -> str:
    """Replace HTML's and SGML's entities by their characters: `&amp;lt;` in XML arrives as `&lt;`, and `<` was meant.

    An entity of an unknown name stays as it is. Tags of inline markup that stand in the text are dropped, as markup is:
    `&amp;lt;i&amp;gt;` arrives as `&lt;i&gt;`. A tag that is never closed stays: "<u>" may be a mean velocity. So does
    all other text between < and >, such as "P<0.001" and "<E0>".
    """
    if "&" in text:
        for _ in range(3):  # escaped three times is the most that was seen
            text = ENTITY.sub(_unescape, text)
    return TAG.sub(_drop_tag, text) if "<" in text and ("</" in text or "<br" in text.lower()) else text


def _unescape(found: re.Match[str]) -> str:
    """The character of one entity. html.unescape alone would read `&degrees;` as `&deg;` and "rees;"."""
    entity = found[0]
    if entity[1] == "#":
        return html.unescape(entity)
    return html.entities.html5.get(entity[1:]) or SGML.get(entity[1:], entity)


def _drop_tag(found: re.Match[str]) -> str:
    """Nothing for a tag inside a line, a space for one that ends a line or paragraph, the tag if nothing closes it."""
    name = found[2].lower()
    if name in ("br", "p") and (name == "br" or "</p>" in found.string.lower()):
        return " "
    return "" if found[1] or f"</{name}>" in found.string.lower() else found[0]


# Control characters

# Private use and unassigned: a character of a publisher's own font that stood for an arrow, a slash or a Greek letter.
SHOWN_ONCE = frozenset({"Co", "Cn"})


def drop_control_characters(text: str) -> str:
    """Drop Unicode's category C: control and zero-width characters, soft hyphens, private use.

    Those that are white space (line feeds, tabs) become a space. What stood on both sides of the others is joined: a
    soft hyphen shows nothing inside a word ("Ob\u00adjec\u00adti\u00adve"), and a control character is what is left
    of a damaged letter or nothing ("Peripro\x99sthetic"). That is so for all 7 that stand inside a word in the real
    data. Two things leave a space: characters of private use between two letters or digits, because something was shown
    there ("PI3K\ue232AKT"), and control characters between two digits, because joining them makes another number:
    \x96 is the dash of Windows' code page ("5\x9610 mg").
    """
    if text.isprintable():
        return text
    dropped = {each for each in set(text) if unicodedata.category(each)[0] == "C"}
    if not dropped:
        return text
    return re.sub(f"[{re.escape(''.join(sorted(dropped)))}]+", _what_is_left, text)


def _what_is_left(found: re.Match[str]) -> str:
    """What a run of dropped characters leaves: its white space as spaces, a space or nothing."""
    if spaces := " " * sum(each.isspace() for each in found[0]):
        return spaces
    categories = {unicodedata.category(each) for each in found[0]}
    around = found.string[max(0, found.start() - 1) : found.start()] + found.string[found.end() : found.end() + 1]
    if len(around) < 2:
        return ""
    between_words = all(unicodedata.category(each)[0] in "LMN" for each in around)
    between_digits = around[0].isdigit() and around[1].isdigit()
    return " " * ((between_words and bool(categories & SHOWN_ONCE)) or (between_digits and "Cc" in categories))


# NLM's filler labels

FILLER_LABEL = re.compile(r"(?<!\S)(?:UNLABELLED|UNASSIGNED): ?")


def drop_filler_labels(text: str) -> str:
    """Drop the labels that NLM gives to a section without one: UNLABELLED and UNASSIGNED."""
    return FILLER_LABEL.sub("", text) if "UNLABELLED:" in text or "UNASSIGNED:" in text else text


# NLM's truncation marks

TRUNCATED = re.compile(r" ?\(ABSTRACT TRUNCATED(?: AT [0-9]+ WORDS)?\)")


def drop_truncation_marks(text: str) -> str:
    """Drop marks like "(ABSTRACT TRUNCATED AT 250 WORDS)", which NLM wrote until 2000."""
    return TRUNCATED.sub("", text) if "(ABSTRACT TR" in text else text


# Copyright notices

AFTER_SENTENCE = r"(?<=[.!?)\]])\s*"
MARK = r"(?:Copyright(?: ?©| ?\([cC]\))?|©|\([cC]\)),?\s?"
YEAR = r"(?:19|20)\d\d\b"
# Names and what joins them, and nothing else; among them a word that only publishers and societies have.
WORD = r"(?:[A-Z&][^\s()]*|\([^\s()]+\)[.,]?|of|and|for|the|on|in|behalf|by|und|de|[12]\d{3}\.?)"
NAMES = (
    r"(?=.{0,110}\b(?:Wiley|Elsevier|Springer|Karger|Blackwell|Liss|Lippincott|Saunders|Mosby|Churchill|Thieme|Macmillan|"
    r"Munksgaard|Dekker|Kluwer|COSPAR|RSNA|AACR|AlphaMed|BMJ|Press|Society|Association|College|Academy|Federation|"
    rf"Campaign|Research|Publishers|Publishing|Publications|Authors?|Inc|Ltd|LLC|GmbH|AG|BV|Verlag)\b){WORD}(?:\s{WORD}){{0,15}}"
)
ENDING = r"(?:\s(?:This article is protected by copyright|All rights reserved)\.?){0,2}(?:\s\[References: \d+\])?$"
NOTICES = (
    # A mark, perhaps a name, and a year, at the start of the text or after a sentence, and anything up to the end.
    re.compile(
        r"(?:^|(?<=[.!?)\]]))\s*\(?(?:PsycINFO Database Record |Crown )?(?:Copyright(?: ?©| ?\(c\))?|©|\(c\)),? ?"
        rf"(?:by )?(?:the authors?(?:\(s\))?,? |[A-Z]\w+ )?{YEAR}.{{0,250}}$",
        re.IGNORECASE,
    ),
    # "Copyright Academic Press.", "(c) International Cancer Imaging Society", "Copyright Blackwell Munksgaard, 2004"
    re.compile(rf"{AFTER_SENTENCE}{MARK}(?:by )?{NAMES}{ENDING}"),
    # "Prostate © 2013 Wiley Periodicals, Inc.", "... www.bjcancer.com © 2002 Cancer Research UK"
    re.compile(rf"(?:{AFTER_SENTENCE}(?:[A-Z][\w:&-]*\s){{1,5}}|\s)©\s?{YEAR},?\s{NAMES}{ENDING}"),
    # "c2003 COSPAR. Published by Elsevier Ltd. All rights reserved", "2005 S. Karger AG, Basel [References: 15]"
    re.compile(rf"(?<=[.!?])\sc?{YEAR},?\s{NAMES}{ENDING}"),
    # "Published 2001 Wiley-Liss, Inc.", "Published by Elsevier Inc."
    re.compile(rf"(?<=[.!?])\sPublished(?: online| in)?(?: {YEAR}| by| {YEAR} by)\s{NAMES}{ENDING}"),
    re.compile(
        r"(?<=[.!?)\]])\s*(?:This article is protected by copyright\.?(?:\s*All rights reserved\.?)?|"
        r"(?:All )?rights reserved\.?)$"
    ),
)
SIGNS = ("©", "(c)", "copyright", "reserved", "published")
YEAR_FIRST = re.compile(rf"[.!?]\sc?{YEAR},?\s[A-Z]")
COPYRIGHT_TAIL = 330  # characters at the end of a text, in which such a notice begins


def drop_copyright_tails(text: str) -> str:
    """Drop a copyright notice at the end: "Copyright 2003 S. Karger AG, Basel", "Published by Elsevier Inc."

    It has a mark and a year, or one of both and the name of a publisher or society, or it reserves all rights.
    """
    start = max(0, len(text) - COPYRIGHT_TAIL)
    tail = text[start:].lower()
    has_year = "19" in tail or "20" in tail  # much faster than the search
    if not any(sign in tail for sign in SIGNS) and not (has_year and YEAR_FIRST.search(text, start)):
        return text  # most texts end here
    found = [match.start() for notice in NOTICES if (match := notice.search(text, start)) and _is_notice(match)]
    return text[: min(found)] if found else text


def _is_notice(found: re.Match[str]) -> bool:
    """Whether this is not the third item of a list: "(a) 5, (b) 10 or so. (c) 2000 IU daily"."""
    return not (found[0].lstrip()[:3].lower() == "(c)" and "(b)" in found.string[: found.start()])


# Notes of publishers

JOURNAL = r"[A-Z][\w&:'-]*\.?(?:\s(?:of|and|the|in|for|&|\(?[A-Z][\w&:'-]*\.?\)?)){0,9}"
PAGES = r"[eSEL]?\d+(?:\s?[-–‐]\s?[eSEL]?\d+)?"
RANGE = r"[eSEL]?\d+\s?[-–‐]\s?[eSEL]?\d+"
VOLUME = r"\d{1,4}(?:-[A-Z])?(?:\s?\([\w -]+\))?"
REFERENCE = (  # of the article itself
    rf"(?:{JOURNAL},?\s{YEAR}\s?;\s?{VOLUME}\s?:\s?{PAGES}|"  # JAMA. 2000;284:465-471
    rf"{JOURNAL}\s{VOLUME}\s?[:,]\s?{RANGE}(?:,\s{YEAR}|\s\({YEAR}\))|"  # J Am Geriatr Soc 67:2568-2573, 2019
    rf"{JOURNAL}\s\({YEAR}\)\s{VOLUME}\s?[,:]\s?{RANGE}|"  # Journal of Human Hypertension (2000) 14, 75-78
    rf"{JOURNAL};\s{VOLUME};\s{RANGE}|"  # Cancer Res; 77(22); 6321-9
    r"[A-Z]\w*\.?(?:\s[A-Z]\w*\.?){1,6}\s\d{1,3}\s?[:,]\s?\d{3,5}[-–‐]\d{2,5})"  # J Pediatr Surg 36:1829-1831
)
CITATION = re.compile(
    rf"(?<=[.!?)\]])\s*(?:\(|\[)?(?:Cite this article:\s)?{REFERENCE}[.)\]]{{0,3}}$|"
    r"(?:How to cite|Cite) this article:.{0,300}$"
)
CITATION_TAIL = 330  # characters at the end of a text, in which such a reference begins
HEADING = re.compile(r"^(?:ABSTRACT|Abstract)(?:\s?[:.|—–]+\s*|\s(?=[A-Z]))")
LONG = 300  # characters: shorter texts may be titles, such as "Abstract Reasoning in Children"
CORRECTED = re.compile(
    r"(?<=\.)\s\[corrected\]\.|"
    r"\s*\[(?:corrected|correction of [^\[\]]*|(?:published )?erratum (?:appears )?in[^\[\]]*)\]|"
    r"^\[This (?:corrects|retracts) the [^\[\]]*\]\.?$"
)
OTHER_FORM = re.compile(
    r"(?<=[.!?)\]])\s*(?:(?:Video|Graphical) abstract[.:]*$|"
    r"Graphical abstract(?: Figure\. No caption available\.|(?=[A-Z])))",
    re.IGNORECASE,
)


def drop_publisher_notes(text: str) -> str:
    """Drop what publishers write around an abstract.

    - The reference of the article at its end: "J Am Geriatr Soc 67:2568-2573, 2019."
    - A heading at its start: "ABSTRACT: ...". Without a colon only a long text loses it.
    - Notes of corrections: "[corrected]", "[published erratum appears in ...]"; a text that is only "[This corrects the
      article DOI: ...]" becomes empty.
    - Notes of other forms at its end: "Video abstract", "Graphical abstract".
    """
    found = HEADING.match(text) if text[:8] in ("ABSTRACT", "Abstract") else None
    if found and (len(text) >= LONG or len(found[0].strip()) > 8):  # there is a colon
        text = text[found.end() :]
    if "[" in text and any(sign in text for sign in ("[correct", "erratum", "[This ")):
        text = CORRECTED.sub("", text)
    if any(sign in text for sign in ("eo abstract", "eo Abstract", "EO ABSTRACT", "cal abs", "cal Abs", "CAL ABS")):
        text = OTHER_FORM.sub(" ", text)
    ends_in_number = text[-4:].rstrip(".)]")[-1:].isdigit()
    found = CITATION.search(text, max(0, len(text) - CITATION_TAIL)) if ends_in_number else None
    return text[: found.start()] if found and _closes_what_it_opens(found[0]) else text


def _closes_what_it_opens(reference: str) -> bool:
    """Whether no bracket is closed that was not opened: else the reference is part of a sentence."""
    return reference.count(")") <= reference.count("(") and reference.count("]") <= reference.count("[")


# NLM's placeholders

PLACEHOLDER = re.compile(r"\[(?:Not Available|In Process Citation|Title Not Available)\]\.?", re.IGNORECASE)


def drop_placeholders(text: str) -> str:
    """Nothing for a text that is NLM's placeholder of a missing title: "[Not Available]."."""
    return "" if text[:1] == "[" and PLACEHOLDER.fullmatch(text) else text


# Rules are applied in this order: an entity may stand for a control character. The place of a rule is also its bit in
# the column `cleaned` of parts, so add new rules at the end. To put one elsewhere, raise the version of "corpus part"
# in data/common/files.py, so that all parts are made again.
RULES = (
    Rule("unescape_entities", version=2, apply=unescape_entities),
    Rule("drop_control_characters", version=2, apply=drop_control_characters),
    Rule("drop_filler_labels", version=1, apply=drop_filler_labels),
    Rule("drop_truncation_marks", version=1, apply=drop_truncation_marks),
    Rule("drop_copyright_tails", version=2, apply=drop_copyright_tails),
    Rule("drop_publisher_notes", version=1, apply=drop_publisher_notes),
    Rule("drop_placeholders", version=1, apply=drop_placeholders),
)


class CleaningSettings(Section):
    """The switches of the cleaning rules in `[corpus]`."""

    unescape_entities: bool = True
    """Replace HTML's and SGML's entities by their characters, `&lt;` by `<`; drop inline markup written as text."""
    drop_control_characters: bool = True
    """Drop control and zero-width characters, soft hyphens and private-use characters; of the last, one between two
    letters or digits leaves a space."""
    drop_filler_labels: bool = True
    """Drop NLM's labels of sections without a label: UNLABELLED, UNASSIGNED."""
    drop_truncation_marks: bool = True
    """Drop NLM's marks of shortened abstracts: (ABSTRACT TRUNCATED AT 250 WORDS)."""
    drop_copyright_tails: bool = True
    """Drop a copyright notice at the end of a text."""
    drop_publisher_notes: bool = True
    """Drop the article's own reference at the end, the heading "Abstract", and notes of corrections and of other forms:
    "[corrected]", "Video abstract"."""
    drop_placeholders: bool = True
    """Take NLM's placeholder of a missing title, "[Not Available].", for no title."""


# Receipts and manifests have always recorded these as false where they are off. Later rules are recorded only where
# they are on, so that a new rule that is off leaves finished work valid.
RECORDED_WHEN_OFF = frozenset(
    {
        "unescape_entities",
        "drop_control_characters",
        "drop_filler_labels",
        "drop_truncation_marks",
        "drop_copyright_tails",
    }
)


def cleaning_switches(settings: CleaningSettings) -> dict[str, bool | int]:
    """Rule name -> `switch_value`, as receipts and manifests record it and `clean` takes it."""
    switches = {rule.name: switch_value(rule, getattr(settings, rule.name)) for rule in RULES}
    return {name: value for name, value in switches.items() if value or name in RECORDED_WHEN_OFF}


def switch_value(rule: Rule, on: bool) -> bool | int:
    """False for a rule that is off, otherwise its version, where True stands for version 1.

    Receipts and manifests held only true and false before rules had versions. A rule of version 1 is still recorded as
    true, so finished work of that time stays valid.
    """
    if not on:
        return False
    return True if rule.version == 1 else rule.version


def clean(text: str, switches: Mapping[str, bool | int]) -> tuple[str, int]:
    """Apply the rules that are on. Returns the text and a number with a bit for each rule that changed it.

    switches: those of `cleaning_switches`; a rule that is missing in them is off. Bit 0 belongs to the first of RULES.
    The white space of a text that changed is collapsed again.
    """
    changed = 0
    for bit, rule in enumerate(RULES):
        if switches.get(rule.name):
            cleaned = rule.apply(text)
            if cleaned != text:
                text, changed = cleaned, changed | 1 << bit
    return one_line(text) if changed else text, changed


def rule_bit(name: str) -> int:
    """The bit of a rule in the numbers of `clean`, as a number."""
    return 1 << [rule.name for rule in RULES].index(name)


def changed_type() -> np.dtype:
    """The smallest unsigned integer type with a bit for each rule: uint8 for up to 8 rules, uint64 for up to 64."""
    if len(RULES) > 64:
        raise ValueError(f"{len(RULES)} cleaning rules, but a part's column `cleaned` has at most 64 bits")
    return np.min_scalar_type((1 << len(RULES)) - 1)
