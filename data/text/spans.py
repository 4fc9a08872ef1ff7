"""Character spans of a text <-> a tag for each of its tokens, by BIO: the first token of a span is "B-LABEL", those
after it "I-LABEL", all others "O".

Tokens are known by their offsets: where each begins and ends in the text, as a fast tokenizer says.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

OUTSIDE = "O"
Offsets = Sequence[tuple[int, int]]


class Span(NamedTuple):
    """The characters from `start` up to `end` (exclusive) of a text, and what they are."""

    start: int
    end: int
    label: str


def fault_of(spans: Iterable[Span], text: str) -> str:
    """What is wrong with the spans of a text, or "": one is empty or outside the text, or two overlap."""
    ordered = sorted(spans)
    for span in ordered:
        if not 0 <= span.start < span.end <= len(text):
            return f"the span {span.start} to {span.end} ({span.label}) is not inside the {len(text)} characters"
    for one, other in pairwise(ordered):
        if other.start < one.end:
            return (
                f"the spans {one.start} to {one.end} ({one.label}) and {other.start} to {other.end} ({other.label})"
                " overlap"
            )
    return ""


def tags_of(labels: Iterable[str]) -> list[str]:
    """The tags for these labels of spans: "O" first, then "B-" and "I-" of each label."""
    return [OUTSIDE, *(f"{place}-{label}" for label in labels for place in "BI")]


def tag_tokens(spans: Iterable[Span], offsets: Offsets) -> list[str]:
    """The tag of each token. A token belongs to the first span with which it shares a character.

    So a span that cuts a token gets the whole token, and `find_spans` gives it back wider than it was.
    """
    tags, rest, begun = [], sorted(spans, reverse=True), None
    for start, end in offsets:
        while rest and rest[-1].end <= start:
            rest.pop()
        if start < end and rest and rest[-1].start < end:
            tags.append(f"{'I' if begun == rest[-1] else 'B'}-{rest[-1].label}")
            begun = rest[-1]
        else:
            tags.append(OUTSIDE)
    return tags


def find_spans(tags: Iterable[str], offsets: Offsets) -> list[Span]:
    """The spans that tags say. An "I" that continues no span of its label begins one.

    transformers' pipeline for token classification groups tokens in the same way (`aggregation_strategy="simple"`).
    """
    spans: list[Span] = []
    before = OUTSIDE
    for tag, (start, end) in zip(tags, offsets, strict=True):
        label = tag[2:]
        if tag.startswith("I-") and before[2:] == label:
            spans[-1] = spans[-1]._replace(end=end)
        elif tag != OUTSIDE:
            spans.append(Span(start, end, label))
        before = tag
    return spans
