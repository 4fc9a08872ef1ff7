"""Pictures drawn by ourselves: one to three coloured shapes on a noisy background. They show nothing of medicine.

A picture has four quarters, and a quarter holds at most one thing. No two things of a picture have the same shape or
the same colour, so that "the disc" and "the red thing" are clear. Which shape may stand in which colour in which
quarter depends on the split (`allowed`): the combinations of validation and test never occur in training, though every
pair of shape and colour, of shape and quarter and of colour and quarter does.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SIDE = 32
"""Pixels of a picture's side."""
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
SIZES = {"small": 8, "large": 16}
"""Pixels of a thing's side."""
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "square": lambda x, y: np.ones(np.broadcast(x, y).shape, bool),
    "disc": lambda x, y: x**2 + y**2 <= 1,
    "triangle": lambda x, y: abs(x) <= (1 + y) / 2,
    "hourglass": lambda x, y: abs(x) <= abs(y),
    "cross": lambda x, y: np.minimum(abs(x), abs(y)) <= 1 / 3,
    "frame": lambda x, y: np.maximum(abs(x), abs(y)) >= 1 / 2,
    "bar": lambda x, y: (abs(y) <= 1 / 3) & (abs(x) <= 1),
    "column": lambda x, y: (abs(x) <= 1 / 3) & (abs(y) <= 1),
}
"""Which points of the square from -1 to 1 a shape covers. y grows downwards."""
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "orange": (1.0, 0.55, 0.0),
    "yellow": (0.95, 0.95, 0.1),
    "green": (0.1, 0.75, 0.1),
    "cyan": (0.1, 0.85, 0.9),
    "blue": (0.15, 0.2, 0.95),
    "magenta": (0.9, 0.1, 0.85),
    "white": (1.0, 1.0, 1.0),
}
"""Red, green and blue from 0 to 1."""
STEP = 8
"""Things stand at multiples of so many pixels."""
BACKGROUND = 0.2  # grey
NOISE = 0.06  # standard deviation of each pixel's red, green and blue


class Thing(NamedTuple):
    """A shape in a picture."""

    shape: str
    colour: str
    quarter: str
    size: str
    left: int
    """Pixels from the picture's left edge."""
    top: int
    """Pixels from the picture's top edge."""

    @property
    def name(self) -> str:
        """For example "red disc"."""
        return f"{self.colour} {self.shape}"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom edge in pixels; right and bottom are the first ones outside."""
        return self.left, self.top, self.left + SIZES[self.size], self.top + SIZES[self.size]


def draws_of(what: Literal["scene", "noise", "mask"], split: Split, number: int, seed: int) -> np.random.Generator:
    """The random draws of a part of picture `number` of a split. No two parts share any."""
    return np.random.default_rng([seed, SPLITS.index(split), number, ("scene", "noise", "mask").index(what)])


def allowed(split: Split, shape: str, colour: str, quarter: str) -> bool:
    """Whether this combination may occur in a split. Training has half of all, validation and test a quarter each."""
    number = list(SHAPES).index(shape) + list(COLOURS).index(colour) + QUARTERS.index(quarter)
    return ("train", "train", "validation", "test")[number % 4] == split


def make_scene(split: Split, number: int, seed: int) -> list[Thing]:
    """The things of picture `number` of a split, a pure function of the arguments. Questions ask about the first one.

    The first things of 64 pictures in succession have each pair of a shape and a colour once.
    """
    draws = draws_of("scene", split, number, seed)
    pair = (list(SHAPES)[number % 8], list(COLOURS)[number // 8 % 8])
    quarters = [quarter for quarter in QUARTERS if allowed(split, *pair, quarter)]
    things = [_place(*pair, quarters[draws.integers(len(quarters))], draws)]
    free = [quarter for quarter in QUARTERS if quarter != things[0].quarter]
    for quarter in draws.permutation(free)[: draws.integers(3)].tolist():
        shapes, colours = {thing.shape for thing in things}, {thing.colour for thing in things}
        pairs = [
            (shape, colour)
            for shape in SHAPES.keys() - shapes
            for colour in COLOURS.keys() - colours
            if allowed(split, shape, colour, quarter)
        ]
        things.append(_place(*sorted(pairs)[draws.integers(len(pairs))], quarter, draws))
    return things


def _place(shape: str, colour: str, quarter: str, draws: np.random.Generator) -> Thing:
    """A thing of a random size at a random place in its quarter, in steps of `STEP` pixels."""
    size = list(SIZES)[draws.integers(len(SIZES))]
    right, down = QUARTERS.index(quarter) % 2, QUARTERS.index(quarter) // 2
    left, top = draws.integers((SIDE // 2 - SIZES[size]) // STEP + 1, size=2) * STEP
    return Thing(shape, colour, quarter, size, right * SIDE // 2 + int(left), down * SIDE // 2 + int(top))


def draw(things: list[Thing], noise: np.random.Generator) -> np.ndarray:
    """The picture of these things, (3, SIDE, SIDE) uint8: red, green and blue."""
    picture = np.full((3, SIDE, SIDE), BACKGROUND)
    for thing in things:
        left, top, right, bottom = thing.box
        points = (np.arange(right - left) + 0.5) / (right - left) * 2 - 1
        covered = SHAPES[thing.shape](points, points[:, None])
        picture[:, top:bottom, left:right][:, covered] = np.array(COLOURS[thing.colour])[:, None]
    picture += noise.normal(0, NOISE, picture.shape)
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)
