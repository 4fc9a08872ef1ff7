"""data/moses.py against sacremoses as transformers calls it."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacremoses import MosesTokenizer

from data import moses
from data.medline import Citation, read_medline
from tests.shared import NLM, needs_shared

REFERENCE = MosesTokenizer(lang="en")


def reference(text: str) -> list[str]:
    tokens = REFERENCE.tokenize(text, aggressive_dash_splits=True, return_str=False, escape=True)
    assert isinstance(tokens, list)
    return tokens


@needs_shared
@pytest.mark.parametrize("name", ["medline16n0902", "pubmedsample18n0001", "medsamp2012"])
def test_real_texts_equal_sacremoses(name: str) -> None:
    records = [r for r in read_medline(Path(NLM / f"{name}.xml.gz")) if isinstance(r, Citation)]
    texts = [f"{record.title} {record.abstract}" for record in records][:250]
    differences = sum(moses.tokenize(text) != reference(text) for text in texts)
    print(f"{name}: {len(texts)} texts compared, {differences} differences")
    assert differences == 0 and len(texts) > 100


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from([
    "et al.", "Fig.", "No.", "no.", "e.g.", "i.e.", "U.S.", "p.", "Dr.", "vs.", "approx.", "mg.", "É.", "é.", "ß.",
    "5", "5.2.", "the", "The", "α", "Α.", "ǅ.", "中", "中.", "...", "....", ". . .", "'s", "dogs'", "don't", "'", "''",
    "COVID-19", "--", "a-b-c", "a/b", "1,000", "a,b", ",", "@-@", "&amp;", "&", "<", "|", "[", "x\u00a0y", "\u2028",
    "\u0301", "a\u0301.", "\t", "\x00", "\ufeff",
])).map(" ".join))  # fmt: skip
def test_generated_texts_equal_sacremoses(text: str) -> None:
    """Abbreviations, full stops and what may follow them, of many scripts."""
    assert moses.tokenize(text) == reference(text)


def test_letters_by_moses_own_lists() -> None:
    """Whether a letter is one, and a lower-case one, is asked before and after full stops: of Moses, not of Python.

    All those characters in question on which the two disagree, and a sample of the others.
    """
    lower, alpha = set(REFERENCE.IsLower), set(REFERENCE.IsAlpha)
    characters = [chr(code) for code in range(1, 0x20000) if not 0xD800 <= code < 0xE000]
    rng = random.Random(1)
    disputed_lower = [c for c in characters if c.islower() != (c in lower)]
    disputed_alpha = [c for c in characters if c.isalpha() != (c in alpha)]
    chosen = [*rng.sample(disputed_lower, min(300, len(disputed_lower))),
              *rng.sample(disputed_alpha, min(300, len(disputed_alpha))),
              *rng.sample(characters, 300), *characters[:0x250]]  # fmt: skip
    print(f"{len(disputed_lower)} and {len(disputed_alpha)} characters in dispute, {len(chosen)} compared")
    for character in chosen:
        for text in (
            f"word. {character} a",
            f"1.{character}. B",
            f"{character}.1. B",
            f"a.{character}. {character}. b",
        ):
            assert moses.tokenize(text) == reference(text), hex(ord(character))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("COVID-19 is bad.", ["COVID", "@-@", "19", "is", "bad", "."]),
        ("a < b & c [d] 'e' f", ["a", "&lt;", "b", "&amp;", "c", "&#91;", "d", "&#93;", "&apos;", "e", "&apos;", "f"]),
        ("</s> <pad>", ["&lt;", "/", "s", "&gt;", "&lt;", "pad", "&gt;"]),
        ("", []),
        (" \t\u2003\n", []),
    ],
)
def test_examples(text: str, tokens: list[str]) -> None:
    """Worked out by hand from Moses' rules."""
    assert moses.tokenize(text) == tokens


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_no_token_holds_white_space_or_an_angle_bracket(text: str) -> None:
    """What the merges file and the special tokens rely on."""
    for token in moses.tokenize(text):
        assert token.split() == [token] and "<" not in token and ">" not in token
