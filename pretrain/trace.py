"""The observer that writes a profiler's trace of the steps named by `log.profile_steps`."""

import gzip
import tempfile
from pathlib import Path
from typing import Any

from torch.profiler import profile

from data.common.disk import disk_full, disk_full_named
from data.common.errors import DiskFull
from data.common.files import whole_file
from pretrain.metrics import Reporter
from pretrain.run import Observer, Run


class Tracer(Observer):
    """Traces rank 0 from the beginning of the first step to the end of the last one, and writes the trace then.

    A run that ends or is resumed between the two traces the steps that it takes.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._profile: profile | None = None
        self._first = 0

    def begin(self, run: Run) -> None:
        """Start if the next step is to be traced."""
        first, last = run.recipe.log.profile_steps or (0, 0)
        if run.rank == 0 and first <= run.step + 1 <= last and not self._profile and not run.ending:
            self._profile, self._first = profile(), run.step + 1
            self._profile.start()

    def after_step(self, run: Run, report: dict[str, Any]) -> None:
        """Write the trace if this was its last step; start if the next step is its first."""
        _, last = run.recipe.log.profile_steps or (0, 0)
        if self._profile and (run.ending or run.step == last):
            run.stamp(f"the trace after step {run.step}", long=True)
            self._profile.stop()
            finished, self._profile = self._profile, None
            path = run.folder / "traces" / f"steps-{self._first}-{run.step}.json.gz"
            try:
                write_trace(finished, path)
                self._reporter.say(run, f"trace {path}")
            except DiskFull as error:
                self._reporter.say(run, f"warning: no trace: {error}")
        self.begin(run)

    def close(self) -> None:
        """Stop a trace that an error has cut short."""
        if self._profile:
            self._profile.stop()


def write_trace(finished: profile, path: Path) -> None:
    """Write a trace as Chrome and Perfetto open it. Raises DiskFull."""
    with disk_full_named(path.parent, str(path), "make room"):
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as stream, tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            plain = Path(folder) / "trace.json"
            finished.export_chrome_trace(str(plain))
            if not plain.is_file():  # the profiler raises nothing
                raise disk_full(path.parent, str(path), "make room")
            stream.write(gzip.compress(plain.read_bytes()))
