"""data/text/bpe.py against subword-nmt's own text interface and transformers' BioGptTokenizer."""

import random
import re
import string
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BioGptTokenizer

from data.text.bpe import END_OF_WORD, Merge, Segmenter
from data.text.learn_bpe import learn_merges
from tests.data.text.subword import subword_nmt, subwords_of
from tests.shared import SHARED, needs_shared

PARTS = ["a", "b", "c", "ab", "bc", "ca", "abc", "aa", "cab", "a</w>", "b</w>", "bc</w>", "abc</w>"]
BIOGPT = SHARED / "tokenizers" / "biogpt" / "bpecodes"


def hf_tokenizer(folder, merges: list[Merge]) -> BioGptTokenizer:
    (folder / "vocab.json").write_text('{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}')
    (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    return BioGptTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


@pytest.fixture(scope="module")
def published() -> list[Merge]:
    """BioGPT's 40,000 merges; a count stands in the third column."""
    rules = [line.split(" ") for line in BIOGPT.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    return [(rule[0], rule[1]) for rule in rules]


@needs_shared
def test_biogpts_merges_on_real_words(lines: list[str], published: list[Merge], tmp_path) -> None:
    """Every distinct word, three ways."""
    words = sorted({word for line in lines for word in line.split()})
    segment, theirs, hf = Segmenter(published), subword_nmt(published), hf_tokenizer(tmp_path, published)
    different = [word for word in words
                 if not segment(word) == subwords_of(theirs, word) == hf.bpe(word).split(" ")]  # fmt: skip
    print(f"{len(words)} words compared under {len(published)} merges, {len(different)} differences")
    assert different == [] and len(words) > 8_000


@needs_shared
def test_learned_merges_on_real_words(lines: list[str], tmp_path) -> None:
    words = sorted({word for line in lines for word in line.split()})
    merges = learn_merges(Counter(word for line in lines[:200] for word in line.split()), 800)
    segment, theirs, hf = Segmenter(merges), subword_nmt(merges), hf_tokenizer(tmp_path, merges)
    for word in words[::2]:
        assert segment(word) == subwords_of(theirs, word) == hf.bpe(word).split(" ")


@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(st.text(st.sampled_from("abcé中\u0301@&"), min_size=1, max_size=8), min_size=1, max_size=30),
    merges=st.integers(1, 40),
)
def test_random_words_equal_subword_nmt(words: list[str], merges: int) -> None:
    learned = learn_merges(Counter(words), merges)
    segment = Segmenter(learned)
    if not learned:  # subword-nmt cannot read an empty file of merges
        assert segment(words[0]) == [*words[0][:-1], words[0][-1] + END_OF_WORD]
        return
    theirs = subword_nmt(learned)
    for word in [*words, *words]:  # again from memory
        assert segment(word) == subwords_of(theirs, word)


@given(st.text(st.characters(codec="utf-8", exclude_characters=" <\n\r"), min_size=1, max_size=20))
def test_tokens_join_to_the_word(word: str) -> None:
    tokens = Segmenter([("a", "b"), ("ab", "c</w>")])(word)
    assert "".join(tokens) == word + END_OF_WORD
    assert not any(re.search(END_OF_WORD, token) for token in tokens[:-1])


@settings(max_examples=500, deadline=None)
@given(
    word=st.text(st.sampled_from("abc"), min_size=1, max_size=60),
    merges=st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from(PARTS)), max_size=40, unique=True),
)
def test_long_words_are_segmented_as_short_ones(word: str, merges: list[Merge]) -> None:
    """Under merges in any order: the product of one may be part of a pair that comes before it."""
    segment = Segmenter(merges)
    expected = segment(word)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.text.bpe.LONG", 0)
        assert segment(word) == expected


@needs_shared
@pytest.mark.slow
def test_words_of_many_letters_take_time_in_proportion(published: list[Merge], tmp_path) -> None:
    """A sequence, base64, one letter again and again: the tokens of subword-nmt, and a million letters in seconds."""
    rng, theirs, segment = random.Random(1), subword_nmt(published), Segmenter(published)
    alphabets = {"sequence": "acgt", "base64": string.ascii_letters + string.digits + "+/", "letter": "a"}
    for name, letters in alphabets.items():
        word = "".join(rng.choices(letters, k=20_000))
        assert segment(word) == subwords_of(theirs, word), name
        seconds = {}
        for length in (100_000, 1_000_000):
            word, before = "".join(rng.choices(letters, k=length)), time.process_time()
            tokens = segment(word)
            seconds[length] = time.process_time() - before
            assert "".join(tokens) == word + END_OF_WORD
        print(f"{name}: {seconds}")
        assert seconds[1_000_000] < 30 * seconds[100_000]  # the square would be 100 times
