"""Where the curves of two runs first differ, and what the runs were made with that could explain it."""

import math
import re
from pathlib import Path

from pretrain.record import Record, markdown_table, read_records

CURVE = re.compile(r"(train|validation)/(?!tokens_per_second|mfu|rank_seconds|slowest_rank)")
"""Figures that the same run gives again to the last bit; others measure time."""


def compare(a: Path, b: Path) -> str:
    """What differs between two runs, in Markdown. Raises UserError if one of them has no record."""
    records = read_records([a, b])
    names, (first, second) = list(records), records.values()
    rows, differing = [], []
    for curve in sorted(_curves(first) & _curves(second)):
        left, right = first.curve(curve), second.curve(curve)
        shared = sorted(left.keys() & right.keys())
        step = next((step for step in shared if left[step] != right[step]), None)
        found = ["none", "", "", ""]
        if step is not None:
            differing.append(step)
            found = [f"{step:,}", repr(left[step]), repr(right[step]), f"{right[step] - left[step]:.3g}"]
        rows.append([curve, f"{len(shared):,}", *found])
    until = min(differing, default=math.inf)
    said = (
        f"The runs first differ at step {until:,}." if differing else "No curve differs at a step that both recorded."
    )
    causes = _causes(first, second, until)
    explained = (
        "What differs in how they were made (-: not set, or not recorded):"
        if causes
        else "Nothing recorded of how they were made differs."
    )
    parts = [
        said,
        markdown_table(["curve", "steps compared", "first difference", *names, "difference"], rows),
        explained,
    ]
    return "\n\n".join([*parts, markdown_table(["what", *names], causes)] if causes else parts)


def _curves(record: Record) -> set[str]:
    return {name for values in record.figures.values() for name in values if CURVE.match(name)}


def _causes(first: Record, second: Record, until: float) -> list[list[str]]:
    keys = sorted({key for record in (first, second) for start in record.starts.values() for key in start})
    rows = [[key, _history(first, key, until), _history(second, key, until)] for key in keys]
    rows.append(["resumed at step", _resumes(first, until), _resumes(second, until)])
    return [row for row in rows if row[1] != row[2]]


def _history(record: Record, key: str, until: float) -> str:
    """The values of a setting up to a step, such as "2, 4 from step 95"."""
    told, last = [], ""
    for step, start in record.starts.items():
        value = str(start.get(key, "-"))
        if step <= until and value != last:
            told.append(f"{value} from step {step:,}" if told else value)
            last = value
    return ", ".join(told)


def _resumes(record: Record, until: float) -> str:
    return ", ".join(f"{step:,}" for step in record.starts if 0 < step <= until) or "-"
