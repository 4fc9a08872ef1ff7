"""The profiler's trace of some steps of a run."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

from data.common.errors import DiskFull, UserError
from pretrain.recipe import load_recipe
from pretrain.trace import write_trace
from tests.data.common.small_disk import room, small_disk
from tests.pretrain.runs import run_case, settings
from tests.ranks import Ranks


def spans(path: Path) -> Counter[str]:
    """Name -> how often the trace has it, of the parts of a step."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    return Counter({name: names[name] for name in ("data", "forward", "backward", "optimizer")})


def test_a_trace_shows_the_parts_of_its_steps_and_a_resumed_run_traces_the_steps_that_it_takes(
    one_rank: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """4 micro-batches a step. The run stops inside the traced steps, is resumed inside them, and after them."""
    run = tmp_path / "run"
    given = settings(sample_folder / "shards", run, "log.profile_steps=[2,5]", "evaluate.max_blocks=2")
    written = []
    for steps in (3, 7, 8):
        one_rank.run(run_case, [*given, f"train.steps={steps}"])
        written.append({path.name: path.read_bytes() for path in (run / "traces").iterdir()})
    assert set(written[0]) == {"steps-2-3.json.gz"}
    assert set(written[1]) == {"steps-2-3.json.gz", "steps-4-5.json.gz"}
    assert written[2] == written[1]
    for name in written[1]:
        assert spans(run / "traces" / name) == {"data": 8, "forward": 8, "backward": 8, "optimizer": 2}


def profiled() -> profile:
    """A trace of some 1 MB."""
    with profile() as finished:
        for _ in range(500):
            torch.zeros(1).add_(1)
    return finished


def test_a_full_disk_leaves_no_part_of_a_trace(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        path = disk / "traces" / "steps-1-1.json.gz"
        for pages in (0, 8, 20):
            with room(disk, pages), pytest.raises(DiskFull, match="make room"):
                write_trace(profiled(), path)
            assert not list(disk.rglob("*.gz")) and not list(disk.rglob(".*"))
        write_trace(profiled(), path)
        assert json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        assert list((disk / "traces").iterdir()) == [path]


def test_the_first_step_of_a_trace_is_not_after_its_last() -> None:
    with pytest.raises(UserError, match=r"log.profile_steps = \[3, 2\]: the first step is after the last"):
        load_recipe("tiny", ["log.profile_steps=[3,2]"])
