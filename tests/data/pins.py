"""Pinned outputs: what a rule or filter does must not change while its version stays."""

import hashlib
import json
from typing import Any


def check_pin(
    pins: dict[tuple[str, int], str], kind: str, file: str, name: str, version: int, outputs: list[Any]
) -> None:
    """Compare the hash of a rule's or filter's outputs on fixed probes with the one pinned for (name, version)."""
    found = hashlib.sha256(json.dumps(outputs).encode()).hexdigest()[:16]
    entry = f'("{name}", {version}): "{found}"'
    assert (name, version) in pins, f"the {kind} {name}, version {version}, has no pin; add {entry} to PINS"
    assert pins[name, version] == found, (
        f"the {kind} {name} does something else than before, but still calls it version {version}. If you meant the"
        f" change, raise its version in {file} to {version + 1}, so that finished work of the old version is not taken"
        f' for new, and add ("{name}", {version + 1}): "{found}" to PINS in this test. If not, undo the change.'
    )
