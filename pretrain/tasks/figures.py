"""How answers are scored: figures in percent, their bootstrap intervals, and paired differences.

A figure is a function of counts summed over the items, so a bootstrap adds up the counts of the items that it draws.
Letters: N items, K counts of an item, R resamples.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Answers = tuple[Any, ...]
"""Labels, pairs of identifiers, or spans (start, end, label): what is right about an item, or what a model says."""
RESAMPLES = 10_000
SEED = 1
LEVEL = 95
"""Percent of the resamples that lie inside an interval."""


@dataclass(frozen=True)
class Figure:
    """A figure that compares what a model answers with what is right."""

    name: str
    count: Callable[[Answers, Answers], Sequence[float]]
    """The right answers to an item and the model's -> K counts."""
    value: Callable[[np.ndarray], np.ndarray]
    """Counts (..., K), summed over items -> the figure in percent (...)."""

    def counts(self, right: Sequence[Answers], given: Sequence[Answers]) -> np.ndarray:
        """Counts (N, K) of items."""
        return np.array([self.count(*each) for each in zip(right, given, strict=True)], np.float64)


class Interval(NamedTuple):
    """A figure, or a difference of two, in percent or points, and the interval that holds 95 % of its resamples."""

    value: float
    low: float
    high: float


def _f1(counts: np.ndarray) -> np.ndarray:
    """Counts (..., 2) of hits and of all right and given answers -> F1 in percent; 0 where there are none."""
    hits, answers = counts[..., 0], counts[..., 1]
    return 100 * 2 * hits / np.where(answers, answers, 1)


def accuracy() -> Figure:
    """The share of items whose answers are right, all of them and no others."""
    return Figure(
        "accuracy",
        lambda right, given: (set(right) == set(given), 1),
        lambda counts: 100 * counts[..., 0] / counts[..., 1],
    )


def micro_f1() -> Figure:
    """F1 of all answers of all items together, as scikit-learn's `average="micro"`. An item's answers are a set."""

    def count(right: Answers, given: Answers) -> tuple[int, int]:
        right_set, given_set = set(right), set(given)
        return len(right_set & given_set), len(right_set) + len(given_set)

    return Figure("micro F1", count, _f1)


def macro_f1(labels: Sequence[str]) -> Figure:
    """The mean of the labels' F1, as scikit-learn's `average="macro"`: a label that nothing has is left out."""

    def count(right: Answers, given: Answers) -> list[int]:
        hits, answers = Counter({*right} & {*given}), Counter((*right, *given))
        return [counter[label] for label in labels for counter in (hits, answers)]

    def value(counts: np.ndarray) -> np.ndarray:
        of_labels = counts.reshape(*counts.shape[:-1], len(labels), 2)
        occurs = of_labels[..., 1] > 0
        return (_f1(of_labels) * occurs).sum(-1) / np.maximum(occurs.sum(-1), 1)

    return Figure("macro F1", count, value)


def interval(figure: Figure, counts: np.ndarray, other: np.ndarray | None = None) -> Interval:
    """A figure of counts (N, K) with its interval.

    other: counts of the same items by another model; then the figure is the difference of the other from the first, and
    each resample draws the same items for both.
    """
    together = counts if other is None else np.concatenate([counts, other], 1)
    width = counts.shape[1]

    def value(summed: np.ndarray) -> np.ndarray:
        own = figure.value(summed[..., :width])
        return own if other is None else own - figure.value(summed[..., width:])

    generator, items = np.random.default_rng(SEED), len(counts)
    draws = (np.bincount(generator.integers(items, size=items), minlength=items) for _ in range(RESAMPLES))
    resampled = value(np.array([drawn @ together for drawn in draws]))
    low, high = np.percentile(resampled, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Interval(float(value(together.sum(0))), float(low), float(high))
