"""One rank of a run that `tests.bench.plan` measures: `python -m tests.bench.plan_run RESULT RECIPE SETTING...`."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretrain.train as program
from pretrain.objectives.next_token import NextToken
from pretrain.recipe import load_recipe
from pretrain.saver import Saver
from tests.bench.checkpoint_run import INTERVAL, own_memory


class Phases:
    """The peak memory of this process in each phase of a run, above what it had before the model."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.current: set[str] = set()
        self.before = 0

    def look(self) -> None:
        """Record the memory for the phases that last at the moment."""
        now = own_memory()
        for phase in {"save"} if "save" in self.current else set(self.current):  # a step beside a save is part of it
            self.peaks[phase] = max(self.peaks.get(phase, 0), now)

    def watch(self) -> None:
        """Look for ever."""
        while True:
            self.look()
            time.sleep(INTERVAL)

    def during(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a phase."""

        def call(*arguments: Any, **more: Any) -> Any:
            self.current.add(phase)
            self.look()
            try:
                return function(*arguments, **more)
            finally:
                self.look()
                self.current.discard(phase)

        return call


def main() -> None:
    """Train, and write the peak of each phase in bytes."""
    result, recipe, *settings = sys.argv[1:]
    phases = Phases()
    build_model, save, report = NextToken.build_model, Saver._save, Saver._report

    def marked(objective: NextToken) -> Any:
        phases.before = own_memory()
        return build_model(objective)

    def begun(saver: Saver, *arguments: Any, **more: Any) -> Any:
        phases.current.add("save")
        return save(saver, *arguments, **more)

    def ended(saver: Saver, *arguments: Any, **more: Any) -> Any:
        phases.look()
        phases.current.discard("save")
        return report(saver, *arguments, **more)

    NextToken.build_model, Saver._save, Saver._report = marked, begun, ended  # type: ignore[method-assign]
    program.build, program.update = phases.during("build", program.build), phases.during("step", program.update)
    threading.Thread(target=phases.watch, daemon=True).start()
    program.train(load_recipe(recipe, settings))
    peaks = {phase: peak - phases.before for phase, peak in phases.peaks.items()}
    Path(f"{result}.{os.environ.get('RANK', '0')}").write_text(json.dumps(peaks))


if __name__ == "__main__":
    main()
