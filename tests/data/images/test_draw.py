"""data/images/draw.py: the same pictures each time, things where they should be, combinations that are held out."""

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest

from data.images.draw import (
    COLOURS,
    QUARTERS,
    SHAPES,
    SIDE,
    SIZES,
    SPLITS,
    Split,
    Thing,
    allowed,
    draw,
    draws_of,
    make_scene,
)  # fmt: skip

NUMBERS = range(256)
NO_NOISE: Any = type("NoNoise", (), {"normal": lambda self, mean, deviation, shape: np.zeros(shape)})()


def test_a_picture_depends_on_seed_split_and_number_alone() -> None:
    def picture(split: Split, number: int, seed: int) -> bytes:
        return draw(make_scene(split, number, seed), draws_of("noise", split, number, seed)).tobytes()

    assert picture("train", 7, 3) == picture("train", 7, 3)
    assert len({picture("train", 7, 3), picture("train", 8, 3), picture("train", 7, 4), picture("test", 7, 3)}) == 4


@pytest.mark.parametrize("split", SPLITS)
def test_each_pair_of_a_shape_and_a_colour_is_asked_for_equally_often(split: Split) -> None:
    asked = Counter((things[0].shape, things[0].colour) for things in (make_scene(split, n, 0) for n in NUMBERS))
    assert asked == dict.fromkeys(product(SHAPES, COLOURS), len(NUMBERS) // 64)


def test_combinations_of_the_splits_are_disjoint_and_their_pairs_are_not() -> None:
    found = {split: set[tuple[str, str, str]]() for split in SPLITS}
    for split, number in product(SPLITS, NUMBERS):
        found[split] |= {(each.shape, each.colour, each.quarter) for each in make_scene(split, number, 0)}
    assert not found["train"] & found["validation"] and not (found["train"] | found["validation"]) & found["test"]
    for left_out in range(3):  # each pair is seen in training
        pairs = {combination[:left_out] + combination[left_out + 1 :] for combination in found["train"]}
        assert len(pairs) == (64 if left_out == 2 else 32)
    each = [sum(allowed(split, *it) for it in product(SHAPES, COLOURS, QUARTERS)) for split in SPLITS]
    assert each == [128, 64, 64]


def test_things_stand_apart_inside_the_picture_and_have_names_of_their_own() -> None:
    counts = Counter[int]()
    for number in NUMBERS:
        things = make_scene("train", number, 1)
        counts[len(things)] += 1
        for one, kind in product(things, ("shape", "colour", "quarter")):
            assert [getattr(one, kind) for one in things].count(getattr(one, kind)) == 1
            left, top, right, bottom = one.box
            assert 0 <= left < right <= SIDE and 0 <= top < bottom <= SIDE and right - left == SIZES[one.size]
            assert (
                one.quarter == f"{'top' if bottom <= SIDE / 2 else 'bottom'} {'left' if right <= SIDE / 2 else 'right'}"
            )
    assert set(counts) == {1, 2, 3} and min(counts.values()) > len(NUMBERS) / 5


def test_a_shape_is_drawn_in_its_colour_inside_its_box() -> None:
    for shape in SHAPES:
        picture = draw([Thing(shape, "red", "top left", "large", 0, 0)], NO_NOISE)
        red = (picture == np.array([230, 26, 26])[:, None, None]).all(0)
        assert not red[16:].any() and not red[:, 16:].any()
        assert 16 * 16 * 0.3 < red.sum() <= 16 * 16
        assert red.any(0)[:16].mean() > 0.3 and (picture[:, ~red] == 51).all()
    pictures = {draw([Thing(s, "red", "top left", size, 0, 0)], NO_NOISE).tobytes() for s in SHAPES for size in SIZES}
    assert len(pictures) == len(SHAPES) * len(SIZES)
