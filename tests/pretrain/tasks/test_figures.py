"""The scorers: known answers, plain slow scorers, and intervals that hold what they should."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

from pretrain.tasks import TASKS
from pretrain.tasks.bc5cdr_relations import ChemicalDiseaseRelations
from pretrain.tasks.figures import Answers, Figure, accuracy, interval, macro_f1, micro_f1
from tests.pretrain.tasks.invented import REAL, WRITE
from tests.shared import needs_shared

LABELS = ("yes", "no", "maybe")
Scored = list[tuple[Answers, Answers]]
"""The right answers and the given ones of each item."""


def value(figure: Figure, scored: Scored) -> float:
    right, given = zip(*scored, strict=True)
    return float(figure.value(figure.counts(right, given).sum(0)))


def plain_f1(hits: int, missed: int, false: int) -> float:
    precision = hits / (hits + false) if hits + false else 0
    recall = hits / (hits + missed) if hits + missed else 0
    return 100 * 2 * precision * recall / (precision + recall) if precision + recall else 0


def plain_accuracy(scored: Scored) -> float:
    return 100 * len([1 for right, given in scored if right == given]) / len(scored)


def plain_macro_f1(scored: Scored) -> float:
    """As scikit-learn averages: over the labels that occur among the right or the given answers."""
    scores = []
    for label in {label for pair in scored for (label,) in pair}:
        hits = sum(right == given == (label,) for right, given in scored)
        missed = sum(right == (label,) != given for right, given in scored)
        false = sum(given == (label,) != right for right, given in scored)
        scores.append(plain_f1(hits, missed, false))
    return sum(scores) / len(scores)


def plain_micro_f1(scored: Scored) -> float:
    """Over lists of triples (item, answer, answer), as the published scripts write them into files."""
    right = {(number, answer) for number, (answers, _) in enumerate(scored) for answer in answers}
    given = {(number, answer) for number, (_, answers) in enumerate(scored) for answer in answers}
    hits = [answer for answer in given if answer in right]
    return plain_f1(len(hits), len(right) - len(hits), len(given) - len(hits))


def one_label(random: Random) -> Answers:
    return (random.choice(LABELS),)


def some_labels(random: Random) -> Answers:
    return tuple(random.choices("abcdefgh", k=random.randint(0, 3)))  # with duplicates


def some_pairs(random: Random) -> Answers:
    return tuple((random.choice(("D1", "D2", "-1")), random.choice("DE")) for _ in range(random.randint(0, 3)))


def some_spans(random: Random) -> Answers:
    starts = random.sample(range(6), k=random.randint(0, 3))
    return tuple((start, start + random.randint(1, 2), random.choice(("Chemical", "Disease"))) for start in starts)


@pytest.mark.parametrize(
    ("figure", "plain", "draw"),
    [
        (accuracy(), plain_accuracy, one_label),
        (macro_f1(LABELS), plain_macro_f1, one_label),
        (micro_f1(), plain_micro_f1, some_labels),
        (micro_f1(), plain_micro_f1, some_pairs),
        (micro_f1(), plain_micro_f1, some_spans),
    ],
)
def test_figures_agree_with_plain_ones_on_1000_random_answers(
    figure: Figure, plain: Callable[[Scored], float], draw: Callable[[Random], Answers]
) -> None:
    random = Random(7)
    scored = [(draw(random), draw(random)) for _ in range(1000)]
    assert value(figure, scored) == pytest.approx(plain(scored), abs=1e-9)
    assert 0 < value(figure, scored) < 100
    few = scored[:2]  # some labels do not occur
    assert value(figure, few) == pytest.approx(plain(few), abs=1e-9)


@needs_shared
def test_always_yes_is_55_percent() -> None:
    test = TASKS["pubmedqa"](REAL["pubmedqa"], "test").items
    scored = [(item.answers, ("yes",)) for item in test]
    assert value(accuracy(), scored) == pytest.approx(55.2)
    assert value(macro_f1(LABELS), scored) == pytest.approx(100 * 2 * 276 / (276 + 500) / 3)


@needs_shared
@pytest.mark.parametrize("name", TASKS)
def test_the_right_answers_score_100_and_shuffled_ones_as_a_plain_scorer_says(name: str) -> None:
    task = TASKS[name](REAL[name], "test")
    right = [item.answers for item in task.items]
    shuffled = Random(3).sample(right, k=len(right))
    plain = {"accuracy": plain_accuracy, "macro F1": plain_macro_f1, "micro F1": plain_micro_f1}
    for figure in task.figures:
        assert value(figure, list(zip(right, right, strict=True))) == 100
        scored = list(zip(right, shuffled, strict=True))
        assert value(figure, scored) == pytest.approx(plain[figure.name](scored), abs=1e-9)
        assert value(figure, scored) < 75


def test_written_relations_are_found(tmp_path: Path) -> None:
    """As BioGPT's script finds them: what is no sentence of that form is skipped, an unknown name has identifier -1."""
    WRITE["bc5cdr-relations"](tmp_path)
    task = ChemicalDiseaseRelations(tmp_path, "test")
    for item in task.items:
        assert task.parse(item.target) == item.answers
    assert task.parse("the relation between kalitinib and snow exists; and so on; the relation between x") == (
        ("D4", "-1"),
    )
    assert task.parse("") == ()
    assert task.parse("the relation between dravonin and itch exists and more.") == (("D1", "D2"),)


def test_no_answers_at_all_score_0() -> None:
    assert value(micro_f1(), [((), ()), ((), ())]) == 0


def test_an_interval_of_accuracy_is_the_binomial_one() -> None:
    counts = np.array([[1, 1]] * 300 + [[0, 1]] * 200, float)
    figure = interval(accuracy(), counts)
    margin = 1.96 * 100 * (0.6 * 0.4 / 500) ** 0.5
    assert figure.value == 60 and figure == interval(accuracy(), counts)  # seeded
    assert figure.low == pytest.approx(60 - margin, abs=0.3) and figure.high == pytest.approx(60 + margin, abs=0.3)


def test_a_difference_is_paired() -> None:
    """Of 500 items two models differ in ten, all won by the first: its interval is far narrower than the figures'."""
    base = np.array([[1, 1]] * 250 + [[0, 1]] * 250, float)
    better = base.copy()
    better[250:260, 0] = 1
    difference = interval(accuracy(), better, base)
    assert difference.value == pytest.approx(2)
    margin = 1.96 * 100 * (0.02 * 0.98 / 500) ** 0.5
    assert difference.low == pytest.approx(2 - margin, abs=0.25) and difference.low > 0
    assert interval(accuracy(), better).low < interval(accuracy(), base).high  # these overlap
    assert interval(micro_f1(), base, base) == (0, 0, 0)
