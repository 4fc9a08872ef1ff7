"""tests/bench/rouge.py against plain counts of n-grams and a plain longest common subsequence."""

import random
from collections import Counter

import pytest

from tests.bench.rouge import lead_sentence, rouge_scores


def f1(common: int, right: int, found: int) -> float:
    return 200 * common / (right + found) if right + found else 0.0


def plain_ngrams(reference: list[str], prediction: list[str], size: int) -> float:
    right, found = (Counter(zip(*(text[k:] for k in range(size)), strict=False)) for text in (reference, prediction))
    return f1((right & found).total(), right.total(), found.total())


def plain_longest(one: list[str], other: list[str]) -> int:
    """The length of the longest common subsequence, by its definition."""
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + plain_longest(one[:-1], other[:-1])
    return max(plain_longest(one[:-1], other), plain_longest(one, other[:-1]))


def test_scores_are_those_of_plain_counts() -> None:
    """The stemmer leaves words of up to three letters as they are."""
    draw = random.Random(1)
    pairs = [
        [draw.choices(["a", "of", "the", "flu", "mg"], k=draw.randrange(1, 8)) for _ in range(2)] for _ in range(60)
    ]
    each = [rouge_scores([" ".join(reference)], [" ".join(prediction)]) for reference, prediction in pairs]
    for found, (reference, prediction) in zip(each, pairs, strict=True):
        longest = plain_longest(reference, prediction)
        assert found == pytest.approx(
            {
                "rouge1": plain_ngrams(reference, prediction, 1),
                "rouge2": plain_ngrams(reference, prediction, 2),
                "rougeL": f1(longest, len(reference), len(prediction)),
            }
        )
    references, predictions = ([" ".join(pair[k]) for pair in pairs] for k in (0, 1))
    means = {kind: sum(found[kind] for found in each) / 60 for kind in ("rouge1", "rouge2", "rougeL")}
    assert rouge_scores(references, predictions) == pytest.approx(means)


def test_known_cases() -> None:
    """Counted by hand: of 9 and 8 words 6 are common, 2 pairs of neighbours, and 5 words in order."""
    found = rouge_scores(["The quick brown fox jumps over the lazy dog"], ["The quick brown dog jumps on the log."])
    assert found == pytest.approx({"rouge1": 200 * 6 / 17, "rouge2": 200 * 2 / 15, "rougeL": 200 * 5 / 17})
    stemmed = rouge_scores(["Treatments of β-blockers."], ["treatment, of blocker"])
    assert stemmed == pytest.approx({"rouge1": 100, "rouge2": 100, "rougeL": 100})
    assert rouge_scores(["A title."], [""]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    with pytest.raises(ValueError, match="zip"):
        rouge_scores(["A title.", "Another."], ["A title."])


@pytest.mark.parametrize(
    ("abstract", "sentence"),
    [
        ("We did it. It fell.", "We did it."),
        ("BACKGROUND: It is not known. METHODS: We did it.", "It is not known."),
        ("AIMS/HYPOTHESIS: Does it help? We asked.", "Does it help?"),
        ("Purpose: To see 5.3 mg of it. It fell.", "To see 5.3 mg of it."),
        ("We grew S. Aureus, e.g. in milk vs. water. It grew.", "We grew S. Aureus, e.g. in milk vs. water."),
        ("It has no end", "It has no end"),
        ("", ""),
    ],
)
def test_the_lead_sentence(abstract: str, sentence: str) -> None:
    assert lead_sentence(abstract) == sentence
