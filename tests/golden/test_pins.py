"""What must never change unnoticed. A difference here is a change of results: see `make.py`."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden import observe
from tests.golden.make import PINS
from tests.ranks import Ranks
from tests.shared import needs_shared

Pins = dict[str, Any]


@pytest.fixture(scope="module")
def pins() -> Pins:
    return json.loads(PINS.read_text())


def test_shards_of_the_sample(pins: Pins, sample_folder: Path) -> None:
    assert observe.shards(sample_folder) == pins["shards"]


def test_block_order(pins: Pins, sample_folder: Path) -> None:
    assert observe.block_order(sample_folder) == pins["block_order"]


def test_losses_at_every_stage_and_a_checkpoint_s_names(
    pins: Pins, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    found = observe.losses(sample_folder, tmp_path, two_ranks)
    assert found.keys() == pins["losses"].keys()
    for stage, losses in found.items():
        assert losses == pytest.approx(pins["losses"][stage], abs=1e-5), stage
    checkpoint, pinned = observe.checkpoint(tmp_path / "stage-1"), pins["checkpoint"]
    for key, names in pinned.pop("state").items():  # more may be recorded, nothing less
        found = checkpoint["state"][key]
        assert found == names or set(found) > set(names), key
    del checkpoint["state"]
    assert checkpoint == pinned


@needs_shared
def test_funnel_of_the_real_files(pins: Pins, tmp_path: Path) -> None:
    for profile, counts in observe.real_funnel(tmp_path).items():
        assert (
            pins["real_funnel"][profile].items() <= counts.items()
        )  # a rule or filter that came since may add a count
