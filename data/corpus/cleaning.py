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


def unescape_entities(text: str) -> str:
    """Replace HTML's entities by their characters: `&amp;lt;` in XML arrives as `&lt;`, and `<` was meant.

    An entity whose name HTML does not know stays as it is.
    """
    if "&" in text:
        for _ in range(3):  # escaped three times is the most that was seen
            text = ENTITY.sub(_unescape, text)
    return text


def _unescape(found: re.Match[str]) -> str:
    """The character of one entity. html.unescape alone would read `&degrees;` as `&deg;` and "rees;"."""
    entity = found[0]
    return html.unescape(entity) if entity[1] == "#" else html.entities.html5.get(entity[1:], entity)


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
    return FILLER_LABEL.sub("", text) if "UN" in text else text


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
    if not any(sign in tail for sign in SIGNS) and not YEAR_FIRST.search(text, start):
        return text  # most texts end here
    found = [match.start() for notice in NOTICES if (match := notice.search(text, start)) and _is_notice(match)]
    return text[: min(found)] if found else text


def _is_notice(found: re.Match[str]) -> bool:
    """Whether this is not the third item of a list: "(a) 5, (b) 10 or so. (c) 2000 IU daily"."""
    return not (found[0].lstrip()[:3].lower() == "(c)" and "(b)" in found.string[: found.start()])


# Rules are applied in this order: an entity may stand for a control character. The place of a rule is also its bit in
# the column `cleaned` of parts, so add new rules at the end. To put one elsewhere, raise the version of "corpus part"
# in data/common/files.py, so that all parts are made again.
RULES = (
    Rule("unescape_entities", version=1, apply=unescape_entities),
    Rule("drop_control_characters", version=2, apply=drop_control_characters),
    Rule("drop_filler_labels", version=1, apply=drop_filler_labels),
    Rule("drop_truncation_marks", version=1, apply=drop_truncation_marks),
    Rule("drop_copyright_tails", version=2, apply=drop_copyright_tails),
)


class CleaningSettings(Section):
    """The switches of the cleaning rules in `[corpus]`."""

    unescape_entities: bool = True
    """Replace HTML entities by their characters: `&lt;` becomes `<`."""
    drop_control_characters: bool = True
    """Drop control and zero-width characters, soft hyphens and private-use characters; of the last, one between two
    letters or digits leaves a space."""
    drop_filler_labels: bool = True
    """Drop NLM's labels of sections without a label: UNLABELLED, UNASSIGNED."""
    drop_truncation_marks: bool = True
    """Drop NLM's marks of shortened abstracts: (ABSTRACT TRUNCATED AT 250 WORDS)."""
    drop_copyright_tails: bool = True
    """Drop a copyright notice at the end of a text."""


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


def changed_type() -> np.dtype:
    """The smallest unsigned integer type with a bit for each rule: uint8 for up to 8 rules, uint64 for up to 64."""
    if len(RULES) > 64:
        raise ValueError(f"{len(RULES)} cleaning rules, but a part's column `cleaned` has at most 64 bits")
    return np.min_scalar_type((1 << len(RULES)) - 1)
