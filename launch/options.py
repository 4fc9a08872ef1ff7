"""Options that several commands share."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from data.common.files import UserError

Processes = Annotated[int, typer.Option("--workers", min=1, help="Number of local worker processes.")]
Address = Annotated[
    str, typer.Option("--cluster", metavar="ADDRESS", help='Run on the Ray cluster at this address, or "auto".')
]
Element = Annotated[
    str, typer.Option("--part", metavar="K/N", help="Do only the share of element K of a job array of N.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write. It appears only when it is complete.")]


def workers_of(processes: int, cluster: str, part: str = "") -> Any:
    """Where the tasks of a data command run. Raises UserError if the options contradict each other."""
    from data.common.workers import Cluster, JobArray

    if (processes > 1) + bool(cluster) + bool(part) > 1:
        raise UserError("choose one of --workers, --cluster and --part")
    if not part:
        return Cluster(cluster) if cluster else processes
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--part {part}: expected K/N with K from 1 to N, as in 2/16")
    return JobArray(int(found[1]), int(found[2]))
