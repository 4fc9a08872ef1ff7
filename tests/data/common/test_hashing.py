"""data/common/hashing.py against the published splitmix64."""

import numpy as np
import pytest

from data.common.hashing import mix64


@pytest.mark.parametrize(
    ("salt", "expected"), [(0, 0xE220A8397B1DCDAF), (1, 0x6E789E6AA1B965F4), (2, 0x06C45D188009454F)]
)
def test_equals_the_reference_implementation(salt: int, expected: int) -> None:
    """The first outputs of Vigna's splitmix64.c from seed 0; the salt counts them."""
    assert int(mix64(np.array([0]), salt)[0]) == expected


def test_spreads_neighbouring_numbers_evenly() -> None:
    """PMIDs are consecutive; each tenth of the range gets its share, and none of them twice."""
    hashed = mix64(np.arange(100_000), salt=5)
    shares = np.histogram(hashed / 2.0**64, bins=10, range=(0, 1))[0] / 100_000
    assert abs(shares - 0.1).max() < 0.005
    assert len(np.unique(hashed)) == 100_000
