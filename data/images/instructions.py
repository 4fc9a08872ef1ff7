"""Instruction records of pictures: a question or an instruction and the codes of a picture -> the answer.

A source and a target is a text, or a list of texts and reserved numbers (`data.text.reserved`). A region is a list of
four locations, the left, top, right and bottom edge of a box, as in Pix2Seq (Chen et al., 2022, arXiv:2109.10852).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.images.draw import COLOURS, QUARTERS, SHAPES, SIDE, Thing
from data.text.reserved import IMAGE_CODES, LOCATIONS, MASK

CHOICES = {"colour": tuple(COLOURS), "shape": tuple(SHAPES)}
"""The closed set of answers of each form of question."""
MASKED = 1 / 4
"""The share of the codes of a picture that infilling leaves out."""


def records_of(identifier: str, things: list[Thing], codes: Sequence[int], draws: np.random.Generator) -> list[Any]:
    """The records of one picture, one for each task. Questions and regions are about the first thing."""
    named, picture = things[0], [IMAGE_CODES[code] for code in codes]
    masked = sorted(draws.choice(len(picture), round(len(picture) * MASKED), replace=False).tolist())
    shown = [MASK if place in masked else code for place, code in enumerate(picture)]
    tasks: dict[str, tuple[list[str | int], str | list[int]]] = {
        "colour": ([f"What colour is the {named.shape}?", *picture], named.colour),
        "shape": ([f"What shape is the {named.colour} thing?", *picture], named.shape),
        "region": ([f"Which region holds the {named.name}?", *picture], to_locations(named.box)),
        "caption": (["What does the picture show?", *picture], caption(things)),
        "infilling": (["Which codes are left out of the picture?", *shown], [picture[place] for place in masked]),
    }
    return [
        {"id": f"{identifier}-{task}", "task": task, "source": source, "target": target}
        for task, (source, target) in tasks.items()
    ]


def caption(things: list[Thing]) -> str:
    """For example "a small red disc at the top left and a large blue bar at the bottom left"."""
    ordered = sorted(things, key=lambda thing: QUARTERS.index(thing.quarter))
    return " and ".join(f"a {thing.size} {thing.name} at the {thing.quarter}" for thing in ordered)


def to_locations(edges: Sequence[float]) -> list[int]:
    """The reserved numbers of edges, which lie from 0 to SIDE pixels."""
    last = len(LOCATIONS) - 1
    return [LOCATIONS[round(edge / SIDE * last)] for edge in edges]


def to_edges(numbers: Sequence[int]) -> list[float]:
    """The edges in pixels that locations stand for: exact to half a bin. Raises ValueError if one is no location."""
    return [LOCATIONS.index(number) / (len(LOCATIONS) - 1) * SIDE for number in numbers]
