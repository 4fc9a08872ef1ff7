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


def drop_control_characters(text: str) -> str:
    """Drop Unicode's category C: control and zero-width characters, soft hyphens, private use.

    Those that are white space (line feeds, tabs) become a space. What stood on both sides of the others is joined.
    """
    if text.isprintable():
        return text
    dropped = {ord(each): " " * each.isspace() for each in set(text) if unicodedata.category(each)[0] == "C"}
    return text.translate(dropped) if dropped else text


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

# A notice starts the text or follows the end of a sentence. It has a mark, perhaps a name, then a year, and ends the
# text within 250 characters.
COPYRIGHT = re.compile(
    r"(?:^|(?<=[.!?)\]]))\s*\(?(?:PsycINFO Database Record )?(?:Copyright(?: ?©| ?\(c\))?|©|\(c\)),? ?"
    r"(?:by )?(?:the authors?(?:\(s\))?,? |[A-Z]\w+ )?(?:19|20)\d\d\b.{0,250}$",
    re.IGNORECASE,
)
COPYRIGHT_TAIL = 330  # characters at the end of a text, in which such a notice begins


def drop_copyright_tails(text: str) -> str:
    """Drop a copyright notice at the end, with a mark and a year: "Copyright 2003 S. Karger AG, Basel"."""
    tail = text[-COPYRIGHT_TAIL:].lower()
    if not ("©" in tail or "(c)" in tail or "copyright" in tail):  # most texts end here, without a regular expression
        return text
    found = COPYRIGHT.search(text, max(0, len(text) - COPYRIGHT_TAIL))
    if not found:
        return text
    is_list_item = found[0].lstrip()[:3].lower() == "(c)" and "(b)" in text[: found.start()]  # (a), (b), (c)
    return text if is_list_item else text[: found.start()]


# Rules are applied in this order: an entity may stand for a control character. The place of a rule is also its bit in
# the column `cleaned` of parts, so add new rules at the end. To put one elsewhere, raise the version of "corpus part"
# in data/common/files.py, so that all parts are made again.
RULES = (
    Rule("unescape_entities", version=1, apply=unescape_entities),
    Rule("drop_control_characters", version=1, apply=drop_control_characters),
    Rule("drop_filler_labels", version=1, apply=drop_filler_labels),
    Rule("drop_truncation_marks", version=1, apply=drop_truncation_marks),
    Rule("drop_copyright_tails", version=1, apply=drop_copyright_tails),
)


class CleaningSettings(Section):
    """The switches of the cleaning rules in `[corpus]`."""

    unescape_entities: bool = True
    """Replace HTML entities by their characters: `&lt;` becomes `<`."""
    drop_control_characters: bool = True
    """Drop control and zero-width characters, soft hyphens and private-use characters."""
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
