"""data/shards/noise.py: exact properties of thousands of random blocks, and the distributions that it promises."""

import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sacremoses import MosesTokenizer

from data.shards.noise import draw_spans, draws_of, fill_in_the_middle, infill, word_ends
from data.text.ids import EOS_ID
from data.text.tokenizer import Tokenizer

VOCABULARY = 20_000
MASK = VOCABULARY
SENTINELS = VOCABULARY + 1, VOCABULARY + 2, VOCABULARY + 3
ENDS = np.arange(VOCABULARY + 4) % 3 == 0  # every third token ends a word; `</s>` does not


def random_block(rng: random.Random, length: int = 256) -> list[int]:
    """A block of documents of 0 to 120 tokens. No token but `</s>` occurs twice, so that each can be found again."""
    tokens = rng.sample(range(4, VOCABULARY), length)
    place = rng.randrange(120)
    while place < length:
        tokens[place] = EOS_ID
        place += rng.randint(1, 120)
    return tokens


def documents(tokens: list[int]) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in tokens:
        if token == EOS_ID:
            found.append([])
        else:
            found[-1].append(token)
    return found


def begins_a_word(text: list[int], place: int) -> bool:
    return place in (0, len(text)) or bool(ENDS[text[place - 1]])


def masked_runs(text: list[int], source: list[int]) -> list[tuple[int, int, int]]:
    """(first, last, masks) for each place of a text where its source has masks. The rest of both must be equal."""
    runs, place, index = [], 0, 0
    while index < len(source):
        if source[index] != MASK:
            assert source[index] == text[place]
            place, index = place + 1, index + 1
            continue
        masks = next((n for n, token in enumerate(source[index:]) if token != MASK), len(source) - index)
        index += masks
        last = text.index(source[index]) if index < len(source) else len(text)
        assert last >= place
        runs.append((place, last, masks))
        place = last
    assert place == len(text)
    return runs


def test_infilling_masks_whole_words_inside_documents() -> None:
    """And the block is the source with what each mask stands for; the source is never longer."""
    rng, tokens, masked, shares = random.Random(1), 0, 0, []
    for number in range(1_000):
        block = random_block(rng)
        source = infill(np.array(block), ENDS, MASK, 0.3, 3.0, draws_of(7, number)).tolist()
        assert len(source) <= len(block) and not set(source) & set(SENTINELS)
        pairs = zip(documents(block), documents(source), strict=True)
        of_block = 0
        for text, noised in pairs:
            for first, last, _ in masked_runs(text, noised):
                assert begins_a_word(text, first) and begins_a_word(text, last)
                of_block += last - first
        tokens, masked = tokens + sum(map(len, documents(block))), masked + of_block
        shares.append(of_block / len(block))
    print(f"masked {masked / tokens:.4f} of {tokens:,} tokens")
    assert masked / tokens == pytest.approx(0.3, abs=0.005)
    assert min(shares) > 0.1 and max(shares) < 0.5


def test_spans_are_drawn_by_poisson_and_lie_anywhere() -> None:
    lengths, covered, documents_drawn = Counter[int](), np.zeros(400), 1_000
    for number in range(documents_drawn):
        spans = draw_spans(400, 0.3, 3.0, draws_of(1, number))
        assert (spans[1:, 0] >= spans[:-1, 1]).all() and spans[0, 0] >= 0 and spans[-1, 1] <= 400
        assert (spans[:, 1] - spans[:, 0]).sum() == 120
        lengths.update((spans[:, 1] - spans[:, 0]).tolist())
        for first, last in spans:
            covered[first:last] += 1
    drawn = lengths.total()
    for length in range(10):
        assert lengths[length] / drawn == pytest.approx(3**length * math.exp(-3) / math.factorial(length), abs=0.01)
    assert drawn / documents_drawn == pytest.approx(120 / 3, abs=1)
    inside = covered[20:-20]  # a span reaches the first and the last words from one side alone
    assert np.abs(inside / documents_drawn - 0.3).max() < 5 * math.sqrt(0.3 * 0.7 / documents_drawn)


def test_short_texts_have_their_share_too() -> None:
    """Rounded at random: of one word it is masked in 30 % of the cases."""
    masked = [draw_spans(1, 0.3, 3.0, draws_of(2, number)).tolist() for number in range(2_000)]
    assert set(map(str, masked)) == {"[]", "[[0, 1]]"}
    assert masked.count([[0, 1]]) / len(masked) == pytest.approx(0.3, abs=0.03)
    assert draw_spans(0, 0.99, 3.0, draws_of(2, 0)).shape == (0, 2)


def middle_of(text: list[int], rearranged: list[int]) -> tuple[int, int]:
    """Where the middle of a rearranged text lies in the text, which is checked."""
    before, after, last = (rearranged.index(sentinel) for sentinel in SENTINELS)
    prefix, suffix, middle = rearranged[before + 1 : after], rearranged[after + 1 : last], rearranged[last + 1 :]
    assert before == 0 and prefix + middle + suffix == text
    return len(prefix), len(prefix) + len(middle)


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_rearranged_documents_are_whole_and_cut_between_words(rate: float) -> None:
    """But the last of a block, which is cut back to its length."""
    rng, found, rearranged = random.Random(1), 0, 0
    for number in range(800):
        block = random_block(rng)
        result = fill_in_the_middle(np.array(block), ENDS, SENTINELS, rate, draws_of(7, number)).tolist()
        assert len(result) == len(block) and MASK not in result
        *whole, cut = documents(result)
        for text, other in zip(documents(block), whole, strict=False):
            found += bool(text)
            if text and other[0] == SENTINELS[0]:
                rearranged += 1
                assert all(begins_a_word(text, place) for place in middle_of(text, other))
            else:
                assert text == other
        kept = [token for token in cut if token not in SENTINELS]
        assert set(kept) <= set(documents(block)[len(whole)])
    assert found > 2_000 and rearranged / found == pytest.approx(rate, abs=0.03)


def test_cuts_are_drawn_evenly_from_the_places_between_words() -> None:
    """Four words have five places; of two even draws each pair of different ones comes up twice as often."""
    text = [3 * place for place in range(2, 6)]
    pairs = Counter[tuple[int, int]]()
    for number in range(4_000):
        block = np.array([*text, EOS_ID, *[4] * 9])
        result = fill_in_the_middle(block, ENDS, SENTINELS, 1.0, draws_of(3, number)).tolist()
        pairs[middle_of(text, documents(result)[0])] += 1
    assert len(pairs) == 15
    for (first, last), count in pairs.items():
        assert count / 4_000 == pytest.approx((1 + (first < last)) / 25, abs=0.02)


def test_noise_is_a_pure_function_of_seed_and_number() -> None:
    """Whatever was drawn before; other numbers and other seeds give other noise."""
    block = np.array(random_block(random.Random(5)))

    def noised(seed: int, number: int) -> list[list[int]]:
        source = infill(block, ENDS, MASK, 0.3, 3.0, draws_of(seed, number))
        return [source.tolist(), fill_in_the_middle(block, ENDS, (1, 2, 3), 1.0, draws_of(seed, number)).tolist()]

    first = noised(1, 0)
    others = [noised(1, number) for number in range(1, 30)] + [noised(seed, 0) for seed in range(2, 30)]
    for place in (0, 1):
        assert len({str(other[place]) for other in [first, *others]}) == 58
    assert noised(1, 0) == first
    before = block.copy()
    noised(1, 1)
    assert (block == before).all()


def test_word_ends_are_those_of_the_tokenizer(sample_folder: Path) -> None:
    """As many as Moses finds words in a text; `<unk>` is one, `</s>` is none."""
    ends, ours = word_ends(sample_folder / "tokenizer"), Tokenizer(sample_folder / "tokenizer")
    moses = MosesTokenizer(lang="en")
    for text in ("The role of IL-2 in fever (n = 5) was studied.", "Kalitinib", "antidisestablishmentarianism, 10%"):
        words = moses.tokenize(text, aggressive_dash_splits=True, escape=True)
        assert ends[ours.encode(text)].sum() == len(words) and ends[ours.encode(text)[-1]]
    assert len(ends) == len(ours.vocabulary) and ends[:4].tolist() == [False, False, False, True]
