"""data/images/instructions.py: what the records of a picture say, and coordinates as bins and back."""

import numpy as np
import pytest

from data.images.draw import SIDE, Thing
from data.images.instructions import records_of, to_edges, to_locations
from data.text.reserved import IMAGE_CODES, LOCATIONS, MASK, MIDDLE, PREFIX, RESERVED_NUMBERS, SUFFIX

THINGS = [Thing("disc", "red", "bottom right", "small", 24, 16), Thing("bar", "blue", "top left", "large", 0, 0)]
CODES = [*range(100, 116)]


def test_reserved_numbers_do_not_overlap() -> None:
    numbers = [MASK, PREFIX, SUFFIX, MIDDLE, *IMAGE_CODES, *LOCATIONS]
    assert sorted(numbers) == list(range(RESERVED_NUMBERS))


def test_records_of_a_picture() -> None:
    records = {each["task"]: each for each in records_of("train-3", THINGS, CODES, np.random.default_rng(0))}
    picture = [104 + place for place in range(16)]
    assert {task: each["id"] for task, each in records.items()} == {task: f"train-3-{task}" for task in records}
    said = {task: (each["source"], each["target"]) for task, each in records.items()}
    assert said["colour"] == (["What colour is the disc?", *picture], "red")
    assert said["shape"] == (["What shape is the red thing?", *picture], "disc")
    assert said["region"] == (["Which region holds the red disc?", *picture], [284, 276, 292, 284])
    words = "a large blue bar at the top left and a small red disc at the bottom right"
    assert said["caption"] == (["What does the picture show?", *picture], words)
    (_, *shown), target = said["infilling"]
    assert [number for number in shown if number != MASK] + target != picture and shown.count(MASK) == len(target) == 4
    filled = iter(target)
    assert [next(filled) if number == MASK else number for number in shown] == picture


def test_what_is_left_out_differs_from_picture_to_picture() -> None:
    draws = np.random.default_rng(0)
    assert len({str(records_of("train-3", THINGS, CODES, draws)[-1]["source"]) for _ in range(10)}) > 5


def test_locations_round_trip() -> None:
    assert to_locations(to_edges(LOCATIONS)) == list(LOCATIONS)
    edges = np.linspace(0, SIDE, 1000)
    half = SIDE / (len(LOCATIONS) - 1) / 2
    assert np.abs(np.array(to_edges(to_locations(edges.tolist()))) - edges).max() <= half + 1e-9
    assert to_edges(to_locations([0, 7, SIDE])) == [0, 7, SIDE]
    with pytest.raises(ValueError):
        to_edges([MASK])
