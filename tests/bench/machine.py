"""What the figures were measured on, and how much memory a process took."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from tests.paths import ROOT

PEAK = (
    "import pathlib, re; print(re.search(r'VmHWM:\\s*(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])"  # KiB
)


def machine() -> str:
    """Processor, cores, memory, GPU, Python and torch, in a line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{processor()}, {cores()} cores, {memory:.0f} GiB{gpu}; {versions}"


def processor() -> str:
    """The processor's name, as the kernel gives it."""
    return cpuinfo("model name") or platform.machine()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def cpuinfo(key: str) -> str:
    """The first value of a key of /proc/cpuinfo; "" where there is none."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def peak(code: str, *arguments: str) -> float:
    """Peak memory in bytes of a Python process of its own that runs the code."""
    command = [sys.executable, "-c", f"{code}\n{PEAK}", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024
