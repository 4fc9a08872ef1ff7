"""One rank of a run that `tests.bench.checkpoints` measures: `python checkpoint_run.py RESULT RECIPE SETTING...`.

Run as a file, so that it also measures an older version of the program, whose folder PYTHONPATH names.
"""

import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import pretrain.train as program
from pretrain.recipe import load_recipe

INTERVAL = 0.005  # seconds between two looks at the memory


def own_memory() -> int:
    """Bytes of this process that are no pages of files: RssAnon + RssShmem."""
    found = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * sum(map(int, found))


def main() -> None:
    """Train, and write what a step, the saves and the memory came to."""
    result, recipe, *settings = sys.argv[1:]
    samples: list[tuple[float, int]] = []
    steps: list[tuple[float, float]] = []

    def look() -> None:
        while True:
            samples.append((time.monotonic(), own_memory()))
            time.sleep(INTERVAL)

    update = program.update

    def timed(*arguments: Any) -> Any:
        before = time.monotonic()
        try:
            return update(*arguments)
        finally:
            steps.append((before, time.monotonic()))

    join = program.engines.init_distributed

    def on_one_thread() -> Any:
        device = join()
        torch.set_num_threads(1)  # so that one rank on two cores leaves a core to the writer
        return device

    program.update, program.engines.init_distributed = timed, on_one_thread
    threading.Thread(target=look, daemon=True).start()
    program.train(load_recipe(recipe, settings))
    ended = time.monotonic()
    pauses = list(zip([end for _, end in steps], [*[start for start, _ in steps[1:]], ended], strict=True))
    # The level between two steps differs from step to step, so each pause is compared with its own beginning.
    between = ([memory for at, memory in samples if start < at < end] for start, end in pauses)
    report = {
        "loop_seconds": ended - steps[0][0],
        "pause_seconds": sum(end - start for start, end in pauses[:-1]),
        "added_in_a_pause": max(max(each) - each[0] for each in between if each),
        "peak": max(memory for _, memory in samples),
    }
    rank = os.environ.get("RANK", "0")
    Path(f"{result}.{rank}").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
