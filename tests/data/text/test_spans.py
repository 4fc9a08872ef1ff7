"""data/text/spans.py against a plain slow aligner, and there and back on all of BC5CDR."""

import gzip
import random
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data.text.spans import Offsets, Span, fault_of, find_spans, tag_tokens, tags_of
from data.text.train import tokenizer_from_biogpt
from tests.shared import SHARED, needs_shared


def plain_tags(spans: list[Span], offsets: Offsets) -> list[str]:
    """A span for each character, the first of those of a token, "B" where that span was not seen before."""
    owner = {place: span for span in spans for place in range(span.start, span.end)}
    tags, seen = [], set()
    for start, end in offsets:
        owners = sorted(owner[place] for place in range(start, end) if place in owner)
        tags.append(f"{'I' if owners[0] in seen else 'B'}-{owners[0].label}" if owners else "O")
        seen |= set(owners[:1])
    return tags


def random_text(draw: random.Random) -> tuple[list[Span], list[tuple[int, int]], int]:
    """Spans, offsets of tokens with gaps between some of them, and the number of characters."""
    length = draw.randint(1, 40)
    cuts = sorted(draw.sample(range(length + 1), draw.randint(2, length + 1)))
    offsets = [pair for pair in pairwise(cuts) if draw.random() < 0.8]
    ends = sorted(draw.sample(range(length + 1), draw.randint(2, length + 1)))
    spans = [Span(a, b, draw.choice("XY")) for a, b in pairwise(ends) if draw.random() < 0.5]
    return spans, offsets, length


def test_tags_are_those_of_a_plain_aligner() -> None:
    draw, cut = random.Random(1), 0
    for _ in range(3_000):
        spans, offsets, length = random_text(draw)
        assert not fault_of(spans, "x" * length)
        tags = tag_tokens(draw.sample(spans, len(spans)), offsets)  # the order of the spans does not matter
        assert tags == plain_tags(spans, offsets)
        starts, ends = {start for start, _ in offsets}, {end for _, end in offsets}
        kept = [span for span in spans if span.start in starts and span.end in ends]
        found = find_spans(tags, offsets)
        assert set(kept) <= set(found)
        cut += len(spans) - len(kept)
    assert cut > 1_000


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-X I-X O", [Span(1, 3, "X")]),
        ("B-X B-X I-X I-X", [Span(0, 1, "X"), Span(1, 4, "X")]),
        ("I-X I-X O I-X", [Span(0, 2, "X"), Span(3, 4, "X")]),
        ("B-X I-Y I-Y B-Y", [Span(0, 1, "X"), Span(1, 3, "Y"), Span(3, 4, "Y")]),
        ("O O O O", []),
    ],
)
def test_spans_of_tags(tags: str, expected: list[Span]) -> None:
    assert find_spans(tags.split(), [(0, 1), (1, 2), (2, 3), (3, 4)]) == expected


def test_tags_of_labels() -> None:
    assert tags_of(["Chemical", "Disease"]) == ["O", "B-Chemical", "I-Chemical", "B-Disease", "I-Disease"]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([Span(2, 4, "X"), Span(0, 2, "X")], ""),
        ([Span(0, 3, "X"), Span(2, 4, "Y")], "the spans 0 to 3 (X) and 2 to 4 (Y) overlap"),
        ([Span(0, 3, "X"), Span(0, 3, "X")], "the spans 0 to 3 (X) and 0 to 3 (X) overlap"),
        ([Span(3, 7, "X")], "the span 3 to 7 (X) is not inside the 6 characters"),
        ([Span(-1, 2, "X")], "the span -1 to 2 (X) is not inside the 6 characters"),
        ([Span(2, 2, "X")], "the span 2 to 2 (X) is not inside the 6 characters"),
    ],
)
def test_bad_spans_are_named(spans: list[Span], expected: str) -> None:
    assert fault_of(spans, "abcdef") == expected


def bc5cdr() -> list[tuple[str, list[Span]]]:
    """Texts and spans of all 1,500 articles."""
    articles = []
    for path in sorted((SHARED / "data" / "benchmarks" / "bc5cdr").glob("*.PubTator.txt.gz")):
        for block in gzip.decompress(path.read_bytes()).decode().strip().split("\n\n"):
            title, abstract, *rows = block.split("\n")
            text = title.split("|t|")[1] + " " + abstract.split("|a|")[1]
            fields = [row.split("\t") for row in rows if "\tCID\t" not in row]
            spans = [Span(int(field[1]), int(field[2]), field[4]) for field in fields]
            assert [text[span.start : span.end] for span in spans] == [field[3] for field in fields]
            articles.append((text, spans))
    return articles


@needs_shared
def test_gold_spans_of_bc5cdr_come_back(tmp_path: Path) -> None:
    """All but those that cut a token, such as "vitamin E" before a stop: Moses takes "E." for an abbreviation."""
    tokenizer_from_biogpt(SHARED / "tokenizers" / "biogpt", tmp_path / "tokenizer")
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    articles = bc5cdr()
    gold, lost, cut = 0, [], []
    for text, spans in articles:
        assert not fault_of(spans, text)
        offsets = fast.encode(text, add_special_tokens=False).offsets
        found = set(find_spans(tag_tokens(spans, offsets), offsets))
        starts, ends = {start for start, _ in offsets}, {end for _, end in offsets}
        gold += len(spans)
        lost += [text[span.start : span.end] for span in spans if span not in found]
        cut += [text[span.start : span.end] for span in spans if not (span.start in starts and span.end in ends)]
        assert len(found) == len(spans)  # a span that cuts a token is only wider
    print(f"BC5CDR: {gold} spans of {len(articles)} articles, {len(lost)} cut a token and are lost")
    assert len(articles) == 1_500 and gold == 28_785
    assert lost == cut and len(lost) == 49
