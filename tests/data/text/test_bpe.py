"""data/text/bpe.py against subword-nmt's own text interface and transformers' BioGptTokenizer."""

import io
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe
from transformers import BioGptTokenizer

from data.archive.medline import Citation, read_medline
from data.text import bpe, moses
from data.text.bpe import END_OF_WORD, Merge, Segmenter, learn_merges
from tests.shared import NLM, SHARED, needs_shared

BIOGPT = SHARED / "tokenizers" / "biogpt" / "bpecodes"
SEPARATOR = "\ue000"  # of subword-nmt's output; a private character, where "@@" might be text


def subword_nmt_merges(lines: list[str], merges: int) -> list[Merge]:
    """What subword-nmt learns when it reads the text itself."""
    learned = io.StringIO()
    learn_bpe(io.StringIO("\n".join(lines)), learned, merges)
    rules = [line.split(" ") for line in learned.getvalue().split("\n")[1:-1]]
    return [(first, second) for first, second in rules]


def subword_nmt(merges: list[Merge]) -> BPE:
    rules = "".join(f"{first} {second}\n" for first, second in merges)
    return BPE(io.StringIO("#version: 0.2\n" + rules), separator=SEPARATOR)


def pieces_of(bpe: BPE, word: str) -> list[str]:
    """subword-nmt's pieces as HF writes them."""
    pieces = bpe.segment_tokens([word])
    return [piece[:-1] if piece.endswith(SEPARATOR) else piece + END_OF_WORD for piece in pieces]


def hf_tokenizer(folder, merges: list[Merge]) -> BioGptTokenizer:
    (folder / "vocab.json").write_text('{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}')
    (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    return BioGptTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def real_lines() -> list[str]:
    """The Moses tokens of real citations, a line each."""
    files = [*NLM.glob("pubmed21n*.xml.gz"), NLM / "pubmedsample18n0001.xml.gz"]
    records = [record for file in sorted(files) for record in read_medline(file) if isinstance(record, Citation)]
    return [" ".join(moses.tokenize(f"{record.title} {record.abstract}")) for record in records]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return real_lines()


@pytest.fixture(scope="module")
def published() -> list[Merge]:
    """BioGPT's 40,000 merges; a count stands in the third column."""
    rules = [line.split(" ") for line in BIOGPT.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    return [(rule[0], rule[1]) for rule in rules]


# Learning


@needs_shared
def test_merges_of_real_text_equal_subword_nmts(lines: list[str]) -> None:
    counts = Counter(word for line in lines for word in line.split(" ") if word)
    ours, theirs = learn_merges(counts, 1_500), subword_nmt_merges(lines, 1_500)
    print(f"{len(theirs)} merges compared on {counts.total()} words")
    assert ours == theirs and len(ours) == 1_500


@pytest.mark.parametrize("seed", range(400))
def test_merges_of_random_text_equal_subword_nmts(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few letters, so that ties, overlaps (aaa), symbols made twice and the stop at pairs seen once all happen."""
    rng = random.Random(seed)
    monkeypatch.setattr(bpe, "MANY", rng.choice((0, 3, 128)))  # the ways for many occurrences and for few
    letters = rng.choice(("ab", "abc", "aé中-", "abcdefgh", "aab"))
    longest, most = rng.choice((4, 7, 20)), rng.choice((20, 60, 200))
    words = ["".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(rng.randint(2, most))]
    lines = [" ".join(words), "ab ba"]
    merges = rng.choice((0, 1, 5, 400))
    ours = learn_merges(Counter(" ".join(lines).split()), merges)
    assert ours == subword_nmt_merges(lines, merges)
    assert len(ours) <= merges


def test_merges_depend_on_the_counts_alone() -> None:
    counts = {"low": 5, "lower": 2, "newest": 6, "widest": 3, "wolf": 5}
    expected = learn_merges(Counter(counts), 30)
    assert expected and all(learn_merges(Counter(dict(order)), 30) == expected
                            for order in (sorted(counts.items()), sorted(counts.items(), reverse=True)))  # fmt: skip


def test_nothing_to_merge() -> None:
    assert learn_merges(Counter(), 10) == []
    assert learn_merges(Counter({"a": 5, "b": 9}), 10) == []
    assert learn_merges(Counter({"ab": 1}), 10) == []  # a pair seen once is no pair


def test_learning_is_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    learn_merges(Counter({"low": 5, "lower": 2}), 10)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


# Applying


@needs_shared
def test_biogpts_merges_on_real_words(lines: list[str], published: list[Merge], tmp_path) -> None:
    """Every distinct word, three ways."""
    words = sorted({word for line in lines for word in line.split()})
    segment, theirs, hf = Segmenter(published), subword_nmt(published), hf_tokenizer(tmp_path, published)
    different = [word for word in words
                 if not segment(word) == pieces_of(theirs, word) == hf.bpe(word).split(" ")]  # fmt: skip
    print(f"{len(words)} words compared under {len(published)} merges, {len(different)} differences")
    assert different == [] and len(words) > 8_000


@needs_shared
def test_learned_merges_on_real_words(lines: list[str], tmp_path) -> None:
    words = sorted({word for line in lines for word in line.split()})
    merges = learn_merges(Counter(word for line in lines[:200] for word in line.split()), 800)
    segment, theirs, hf = Segmenter(merges), subword_nmt(merges), hf_tokenizer(tmp_path, merges)
    for word in words[::2]:
        assert segment(word) == pieces_of(theirs, word) == hf.bpe(word).split(" ")


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
        assert segment(word) == pieces_of(theirs, word)


@given(st.text(st.characters(codec="utf-8", exclude_characters=" <\n\r"), min_size=1, max_size=20))
def test_pieces_join_to_the_word(word: str) -> None:
    pieces = Segmenter([("a", "b"), ("ab", "c</w>")])(word)
    assert "".join(pieces) == word + END_OF_WORD
    assert not any(re.search(END_OF_WORD, piece) for piece in pieces[:-1])
