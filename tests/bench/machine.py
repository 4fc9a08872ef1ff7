"""What the figures were measured on."""

import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """Processor or GPU, cores, memory, Python and torch, in a line."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = names[0].split(":")[1].strip() if names else platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    cores = len(os.sched_getaffinity(0))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{processor}, {cores} cores, {memory:.0f} GiB{gpu}; {versions}"
