"""data/text/moses.py against sacremoses as transformers calls it."""

import random

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sacremoses import MosesTokenizer

from data.text import moses
from tests.data.nasty import nasty
from tests.data.reference import texts_of
from tests.shared import NLM, SHARED, needs_shared

REFERENCE = MosesTokenizer(lang="en")


def reference(text: str) -> list[str]:
    tokens = REFERENCE.tokenize(text, aggressive_dash_splits=True, return_str=False, escape=True)
    assert isinstance(tokens, list)
    return tokens


def in_bulk(texts: list[str]) -> list[list[str]]:
    """The tokens of each text, put together from its fragments."""
    fragments = moses.take_apart(pa.array(texts))
    tokens = list(moses.tokenize_fragments(fragments.distinct))
    starts = [0, *fragments.ends[:-1].tolist()]
    return [
        [token for code in fragments.codes[start:end].tolist() for token in tokens[code]]
        for start, end in zip(starts, fragments.ends.tolist(), strict=True)
    ]


def count_differences(texts: list[str]) -> tuple[int, int]:
    """In how many texts the single and the bulk path differ from sacremoses."""
    expected = [reference(text) for text in texts]
    single = sum(moses.tokenize(text) != tokens for text, tokens in zip(texts, expected, strict=True))
    return single, sum(found != tokens for found, tokens in zip(in_bulk(texts), expected, strict=True))


@needs_shared
@pytest.mark.parametrize("name", ["medline16n0902", "pubmedsample18n0001", "medsamp2012"])
def test_real_texts_equal_sacremoses(name: str) -> None:
    texts = texts_of(NLM / f"{name}.xml.gz")
    differences = count_differences(texts)
    print(f"{name}: {len(texts)} texts compared, {differences} differences of the single and the bulk path")
    assert differences == (0, 0) and len(texts) > 100


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in (SHARED / "data" / "abstracts").glob("*.jsonl.gz")))
def test_all_abstracts_equal_sacremoses(name: str) -> None:
    texts = texts_of(SHARED / "data" / "abstracts" / name)
    differences = count_differences(texts)
    print(f"{name}: {len(texts)} texts compared, {differences} differences of the single and the bulk path")
    assert differences == (0, 0) and len(texts) > 1_000


@needs_shared
@pytest.mark.slow
def test_all_citations_equal_sacremoses() -> None:
    files = [*NLM.glob("*.xml.gz"), *NLM.glob("updates/*.xml.gz")]
    texts = [text for file in files for text in texts_of(file)]
    differences = count_differences(texts)
    print(f"{len(files)} files, {len(texts)} texts compared, {differences} differences of the single and the bulk path")
    assert differences == (0, 0) and len(texts) > 5_000


WORDS = [
    "et al.", "Fig.", "No.", "no.", "e.g.", "i.e.", "U.S.", "p.", "Dr.", "vs.", "approx.", "mg.", "É.", "é.", "ß.",
    "5", "5.2.", "the", "The", "α", "Α.", "ǅ.", "中", "中.", "...", "....", ". . .", "'s", "dogs'", "don't", "'", "''",
    "COVID-19", "--", "a-b-c", "a/b", "1,000", "a,b", ",", "@-@", "&amp;", "&", "<", "|", "[", "x\u00a0y", "\u2028",
    "\u0301", "a\u0301.", "\t", "\x00", "\ufeff", ",5", ",,5", "5,", "5,,", "x,", "'5", "5'", "'a", "a'", "a.'", "5.'",
    "'.", "'a'", "''5''", "\x01'", "'\x02", "\ue000", "a\ue000'", "DOTMULTI", "..MULTI", "A", "a", "0", "\n",
]  # fmt: skip


def test_all_pairs_of_words_equal_sacremoses() -> None:
    """What a word's tokens depend on is its neighbours: each word first, last, alone, and before each other."""
    texts = [first + between + second for first in WORDS for second in ["", *WORDS] for between in (" ", " \x00 ", "")]
    differences = count_differences(texts)
    print(f"{len(texts)} texts compared, {differences} differences of the single and the bulk path")
    assert differences == (0, 0)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS)).map(" ".join), min_size=1, max_size=10))
def test_generated_texts_equal_sacremoses(texts: list[str]) -> None:
    """Abbreviations, apostrophes, commas, full stops and what may follow them, of many scripts."""
    assert count_differences(texts) == (0, 0)


@settings(max_examples=1_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(nasty, min_size=1, max_size=10))
def test_nasty_texts_equal_sacremoses(texts: list[str]) -> None:
    assert count_differences(texts) == (0, 0)


def test_white_space_in_bulk_is_pythons() -> None:
    """Which of all characters are; and each of them where Moses looks at neighbours."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    found = moses.pc.match_substring_regex(pa.array(characters), moses.WHITE_SPACE).to_pylist()
    assert found == [character.isspace() and character != " " for character in characters]
    spaces = [character for character in characters if character.isspace()]
    patterns = [
        "vs.{}a",
        "vs. {} a",
        "'{}'",
        "5'{}'5",
        "5' {}'5",
        "{}'a{}",
        " {},5",
        "a'{} ",
        "x{}{}y.",
        "{}",
        " {} {} ",
    ]
    texts = [pattern.replace("{}", space) for pattern in patterns for space in spaces]
    assert count_differences(texts) == (0, 0)


def test_batches_are_all_texts_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moses, "BATCH_BYTES", 10)
    texts = ["ééé", "abcd", "e", "", "a text longer than a batch", "", "x"]
    cut = [batch.to_pylist() for batch in moses.batches(pa.array(texts))]
    assert cut == [["ééé", "abcd"], ["e", ""], ["a text longer than a batch"], ["", "x"]]
    assert list(moses.batches(pa.array(texts).slice(1, 2))) == [pa.array(["abcd", "e"])]
    assert list(moses.batches(pa.array([], pa.string()))) == []


def test_fragments_are_counted() -> None:
    """A word counts by what its neighbours make of it."""
    counts = moses.count_fragments(pa.array(["vs. a vs. A vs.", "vs. 5 'a' b", "'a'"]))
    assert counts == {"vs.\na": 1, "vs.\n0": 1, "vs.": 2, "a": 1, "A": 1, "5": 1, "b": 1, "A\n'a'\nA": 1, "'a'": 1}


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
