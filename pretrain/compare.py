"""Where the curves of two runs first differ, and what the runs were made with that could explain it."""

import math
import re
from pathlib import Path

from pretrain.record import Record, markdown_table, read_records

CURVE = re.compile(r"train/(?!tokens|mfu|rank_seconds|slowest_rank)|(validation|gradient_norm|weight_norm)/")
"""Figures that the same run gives again to the last bit; others measure time and memory, or count."""
NO_CAUSE = re.compile(
    r"(log|checkpoint)\.|train\.(stop_after_minutes|hang_minutes)$|evaluate\.every_steps$|data\.allow_other$"
)
"""Settings that change no figure of a step."""


def compare(a: Path, b: Path) -> str:
    """What differs between two runs, in Markdown. Raises UserError if one of them has no record."""
    records = read_records([a, b])
    names, (first, second) = list(records), records.values()
    rows, differing = [], []
    for curve in sorted(_curves(first) & _curves(second)):
        left, right = first.curve(curve), second.curve(curve)
        shared = sorted(_reported(first, curve) & _reported(second, curve))
        step = next((step for step in shared if left.get(step) != right.get(step)), None)
        found = ["none", "", "", ""]
        if step is not None:
            differing.append(step)
            values = [repr(values[step]) if step in values else "not finite" for values in (left, right)]
            both = step in left and step in right
            found = [f"{step:,}", *values, f"{right[step] - left[step]:.3g}" if both else "-"]
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


def _reported(record: Record, curve: str) -> set[int]:
    """The steps at which a run reported figures of this section. A value that is not finite is not recorded."""
    section = curve.split("/")[0] + "/"
    return {step for step, values in record.figures.items() if any(name.startswith(section) for name in values)}


def _causes(first: Record, second: Record, until: float) -> list[list[str]]:
    keys = sorted({key for record in (first, second) for start in record.starts.values() for key in start})
    keys = [key for key in keys if not NO_CAUSE.match(key)]
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
