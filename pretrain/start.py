"""What a start of a run is made with, as `metrics.jsonl` records it and `biogpt compare` reads it."""

import hashlib
import importlib.metadata
import platform
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain import ROOT
from pretrain.record import settings_record
from pretrain.run import Run

PACKAGES = ("torch", "deepspeed", "numpy")


def computation(run: Run) -> str:
    """How the model computes a step, in words."""
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[run.recipe.train.precision]
    return run.engine.module.describe(run.device, precision, run.recipe.context_length())


def in_words(run: Run) -> str:
    """The run in a line: its size, stage, precision and ranks, and how it computes."""
    return (
        f"{run.objective.config.parameter_count():,} parameters, ZeRO {run.recipe.deepspeed.stage},"
        f" {run.recipe.train.precision}, {run.ranks} ranks; {computation(run)}"
    )


def start_record(run: Run) -> dict[str, Any]:
    """Settings, ranks, devices and versions by name; empty on other ranks than 0, which only tell their device.

    Every rank must call it.
    """
    names = [""] * run.ranks
    dist.all_gather_object(names, device_name(run.device))
    if run.rank:
        return {}
    recipe = run.recipe.model_dump(mode="json", exclude_none=True)
    return {
        **settings_record(recipe, run.objective.identity()),
        "ranks": run.ranks,
        "devices": ", ".join(f"{count} x {name}" for name, count in Counter(names).items()),
        "threads of a rank": torch.get_num_threads(),
        "computation": computation(run),
        "code of biogpt-pretrain": code_hash(),
        "version of python": platform.python_version(),
        **{f"version of {package}": importlib.metadata.version(package) for package in PACKAGES},
    }


def device_name(device: torch.device) -> str:
    """The model of a GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1] if found else platform.machine()


def code_hash() -> str:
    """The sha256 of our source files. The version alone would be the same for many commits."""
    digest = hashlib.sha256()
    for path in sorted(path for package in ("data", "model", "pretrain") for path in (ROOT / package).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
