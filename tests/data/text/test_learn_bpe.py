"""data/text/learn_bpe.py against subword-nmt's own text interface."""

import random
from collections import Counter

import pytest

from data.text import learn_bpe
from data.text.learn_bpe import learn_merges
from tests.data.text.subword import subword_nmt_merges
from tests.shared import needs_shared


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
    monkeypatch.setattr(learn_bpe, "USE_NUMPY", rng.choice((0, 3, 128)))  # numpy always, at 3 entries, at 128
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
