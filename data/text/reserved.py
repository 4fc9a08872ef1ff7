"""What the reserved numbers of a tokenizer stand for: `biogpt tokenizer --reserve N` appends the numbers 0 to N - 1."""

MASK = 0
"""Text or image codes that are left out."""
PREFIX, SUFFIX, MIDDLE = 1, 2, 3
"""The parts of a text in fill in the middle."""
IMAGE_CODES = range(4, 260)
"""The codes of pictures."""
LOCATIONS = range(260, 293)
"""The bins of coordinates, from one edge of a picture to the other."""
RESERVED_NUMBERS = LOCATIONS.stop
"""How many numbers a tokenizer reserves so that it has all of these."""
