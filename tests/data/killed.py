"""Commands that are killed: at a call of one of their steps, or at a moment."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.paths import ROOT


def kill_at_call(folder: Path, step: str, call: int, code: str) -> None:
    """Run Python code in a folder; kill -9 ends it at a certain call of a step ("data.corpus.build.write_part")."""
    module, _, name = step.rpartition(".")
    script = (
        f"import importlib, os, data.corpus.build, data.shards.build; from pathlib import Path\n"
        f"module = importlib.import_module({module!r})\n"
        f"step, calls = module.{name}, []\n"
        f"def killed(*arguments):\n"
        f"    calls.append(arguments)\n"
        f"    if len(calls) == {call}: os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        f"    return step(*arguments)\n"
        f"module.{name} = killed\n{code}"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=_environment(), capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def start(folder: Path, *arguments: str) -> subprocess.Popen[Any]:
    """`biogpt ARGUMENTS` in a folder, in a process group of its own, without output."""
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.Popen(command, cwd=folder, env=_environment(), start_new_session=True, **quiet)


def kill_after(seconds: float, process: subprocess.Popen[Any]) -> None:
    """kill -9 of the whole group of a process, some seconds from now."""
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
