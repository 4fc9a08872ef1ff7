"""data/shards/mixture.py against a plain count, and the examples of several folders against those of each alone."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.shards.blocks import MixedBlocks, TokenStream, TrainingBlocks
from data.shards.mixture import MixedOrder, Mixture, pattern_of, period_of
from data.shards.order import EpochOrder
from tests.data.shards.test_blocks import random_shards, write_shards

CONTEXT = 16
WEIGHTS = [Fraction(7, 10), Fraction(1, 4), Fraction(1, 20)]


def shares(parts: list[int]) -> list[Fraction]:
    """Shares that sum to 1, in this proportion."""
    return [Fraction(part, sum(parts)) for part in parts]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_every_prefix_has_its_shares(parts: list[int]) -> None:
    """To within Tijdeman's bound, which is less than a block, counted plainly over two and a half periods."""
    weights = shares(parts)
    mixture, period = Mixture(weights), period_of(weights)
    bound = 1 - Fraction(1, max(2 * len(parts) - 2, 1))
    taken = [0] * len(parts)
    for number in range(5 * period // 2):
        assert mixture.counts(number) == taken
        index, own = mixture.locate(number)
        assert own == taken[index]
        taken[index] += 1
        assert all(abs(blocks - (number + 1) * weight) <= bound for blocks, weight in zip(taken, weights, strict=True))


@given(st.lists(st.integers(1, 12), min_size=2, max_size=4))
def test_the_pattern_is_tijdemans(parts: list[int]) -> None:
    """His rule in exact fractions: of the folders that may have a block now, the one whose block is due first."""
    weights = shares(parts)
    slack = Fraction(1, 2 * len(parts) - 2)
    taken, expected = [0] * len(parts), []
    for number in range(period_of(weights)):
        due = []
        for index, weight in enumerate(weights):
            if (number + 1) * weight - taken[index] >= slack:
                last = number
                while (last + 1) * weight - taken[index] <= 1 - slack:
                    last += 1
                due.append((last, index))
        expected.append(min(due)[1])
        taken[expected[-1]] += 1
    assert pattern_of(weights) == expected


@pytest.mark.parametrize("parts", [[1], [9, 1], [7000, 2500, 500], [3333, 3333, 3334], [1, 1, 1, 1, 1, 9995]])
def test_any_block_is_found_at_once(parts: list[int]) -> None:
    """Block 10^8 and those after it: as many of each folder lie before as its share says, and they count on."""
    mixture, first = Mixture(shares(parts)), 10**8 + 7
    counts = mixture.counts(first)
    assert sum(counts) == first
    assert all(abs(count - first * share) < 1 for count, share in zip(counts, shares(parts), strict=True))
    for number in range(first, first + 300):
        index, own = mixture.locate(number)
        assert own == counts[index]
        counts[index] += 1


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> list[TokenStream]:
    """Three folders of different size."""
    made = []
    for seed, sizes in enumerate([[60, 40], [30], [9]]):
        folder = tmp_path_factory.mktemp("mixture")
        made.append(TokenStream(folder, write_shards(folder, random_shards(seed, sizes)), "train"))
    return made


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_three_folders_over_three_epochs_are_the_same_batches_on_any_ranks(
    ranks: int, streams: list[TokenStream]
) -> None:
    """Each rank reads micro-batches of 3 of a global batch of 24, and begins anew in the middle of the run.

    Expected: the number of a block among its folder's, counted plainly, and the block as that folder alone gives it.
    """
    alone = [TrainingBlocks(streams[0], CONTEXT, 4)]
    mixed = MixedBlocks(streams, WEIGHTS, CONTEXT, 4)
    alone += mixed._folders[1:]  # their seeds are checked below
    pattern, taken, expected = pattern_of(WEIGHTS), [0, 0, 0], []
    steps = math.ceil(3 * max(each.blocks_per_epoch / weight for each, weight in zip(alone, WEIGHTS, strict=True)) / 24)
    for number in range(steps * 24):
        index = pattern[number % len(pattern)]
        expected.append(alone[index].read(taken[index]))
        taken[index] += 1
        shares_kept = (abs(blocks - (number + 1) * weight) < 1 for blocks, weight in zip(taken, WEIGHTS, strict=True))
        assert all(shares_kept)
    assert all(blocks >= 3 * each.blocks_per_epoch for blocks, each in zip(taken, alone, strict=True))
    assert mixed.epochs(steps * 24) == [
        blocks / each.blocks_per_epoch for blocks, each in zip(taken, alone, strict=True)
    ]
    for rank in range(ranks):
        for begun in (0, steps // 2):
            own = MixedBlocks(streams, WEIGHTS, CONTEXT, 4)
            for step in range(begun, steps):
                for first in range(step * 24 + 3 * rank, (step + 1) * 24, 3 * ranks):
                    inputs, targets = own.batch(range(first, first + 3))
                    assert inputs.tolist() == [block[0].tolist() for block in expected[first : first + 3]]
                    assert targets.tolist() == [block[1].tolist() for block in expected[first : first + 3]]


def test_a_table_of_one_gives_the_folders_own_blocks(streams: list[TokenStream]) -> None:
    mixed, alone = MixedBlocks(streams[:1], [Fraction(1)], CONTEXT, 9), TrainingBlocks(streams[0], CONTEXT, 9)
    numbers = range(3 * alone.blocks_per_epoch)
    assert all(torch.equal(a, b) for a, b in zip(mixed.batch(numbers), alone.batch(numbers), strict=True))


def test_equal_folders_are_shuffled_each_in_its_own_way(streams: list[TokenStream]) -> None:
    """The same folder twice: in an epoch, few blocks stand at the same place of both."""
    stream = streams[0]
    mixed = MixedBlocks([stream, stream], [Fraction(1, 2)] * 2, CONTEXT, 3)
    size = TrainingBlocks(stream, CONTEXT, 3).blocks_per_epoch
    read = [mixed.read(number)[1].tolist() for number in range(4 * size)]
    same = sum(a == b for a, b in zip(read[::2], read[1::2], strict=True))
    assert same < size / 4


# Records: places among those of all folders

SIZES = [11, 5, 3]


def plain_places(numbers: range, seed: int) -> list[int]:
    """The places, counted one by one: the pattern says the folder, and the folder's own order the record."""
    seeds = Mixture(WEIGHTS).seeds(seed)
    orders = [EpochOrder(size, own) for size, own in zip(SIZES, seeds, strict=True)]
    pattern, taken, places = pattern_of(WEIGHTS), [0, 0, 0], []
    for number in range(numbers.stop):
        index = pattern[number % len(pattern)]
        places.append(sum(SIZES[:index]) + orders[index].locate(taken[index])[1])
        taken[index] += 1
    return places[numbers.start :]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_records_of_three_folders_are_the_same_batches_on_any_ranks(ranks: int) -> None:
    """Over more than three epochs of each folder; micro-batches of 3 of a global batch of 24."""
    expected = plain_places(range(240), seed=4)
    for rank in range(ranks):
        order = MixedOrder(SIZES, WEIGHTS, 4)
        for step in (*range(10), 3):  # it may go back
            for first in range(step * 24 + 3 * rank, (step + 1) * 24, 3 * ranks):
                assert order.places(range(first, first + 3)).tolist() == expected[first : first + 3]
    epochs = MixedOrder(SIZES, WEIGHTS, 4).epochs(240)
    assert epochs == [240 * share / size for share, size in zip([0.7, 0.25, 0.05], SIZES, strict=True)]
    assert min(epochs) > 3


def test_a_total_is_the_plain_sum() -> None:
    values, places = np.random.default_rng(3).integers(0, 100, sum(SIZES)), plain_places(range(300), seed=7)
    order = MixedOrder(SIZES, WEIGHTS, 7)
    for numbers in (range(0), range(1), range(8, 8), range(16, 24), range(300), range(77, 291)):
        assert order.total(values, numbers) == sum(values[places[numbers.start : numbers.stop]])


def test_one_folder_has_the_order_that_it_has_alone() -> None:
    order, alone = MixedOrder([11], [Fraction(1)], 9), EpochOrder(11, 9)
    assert order.places(range(5, 60)).tolist() == alone.places(range(5, 60)).tolist()
