"""data/text/bpe.py against subword-nmt's own text interface and transformers' BioGptTokenizer."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BioGptTokenizer

from data.text.bpe import END_OF_WORD, Merge, Segmenter
from data.text.learn_bpe import learn_merges
from tests.data.text.subword import subword_nmt, subwords_of
from tests.shared import SHARED, needs_shared

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
