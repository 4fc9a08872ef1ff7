"""What checkpoints cost: `python -m tests.bench.checkpoints` prints a table. About 12 minutes on two idle cores.

Runs of 99M parameters (14 layers x 768) on the embedded sample, micro-batch 1 x 128, fp32, ZeRO 1. `--against FOLDER`
also measures an older version of the program, which lies there.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.machine import machine
from tests.paths import ROOT
from tests.pretrain.runs import make_sample, metrics

PARAMETERS = 99.4e6
STEPS, EVERY = 40, 10
SAVES = STEPS // EVERY - 1  # without the last, which a run that saves nothing has too
SHAPE = [
    "model.hidden_size=768", "model.num_hidden_layers=14", "model.num_attention_heads=12",
    "model.intermediate_size=3072", "model.max_position_embeddings=128", "train.micro_batch_size=1",
    "deepspeed.stage=1", f"evaluate.every_steps={EVERY}", "evaluate.max_blocks=8", "checkpoint.keep_last=1",
]  # fmt: skip
Report = dict[str, float]


def train(program: Path, folder: Path, name: str, ranks: int, *settings: str) -> list[Report]:
    """A run by the program in a folder; what each of its ranks reports."""
    chosen = [*SHAPE, f"train.global_batch_tokens={128 * ranks}", f"data.shards={folder / 'sample' / 'shards'}"]
    environment = os.environ | {"PYTHONPATH": str(program), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc-per-node={ranks}"]
    script = ROOT / "tests" / "bench" / "checkpoint_run.py"
    command = [*torchrun, str(script), str(folder / name), "tiny", *chosen, f"train.run={folder / 'runs' / name}"]
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run([*command, *settings], env=environment, check=True, stdout=log, stderr=log)
    return [json.loads((folder / f"{name}.{rank}").read_text()) for rank in range(ranks)]


def costs(folder: Path, ranks: int, rounds: int, against: Path | None) -> dict[str, Any]:
    """Way of saving -> what the saves before the last added to the loop and to its pauses, and all its reports."""
    ways: dict[str, tuple[Path, list[str]]] = {
        "background": (ROOT, ["checkpoint.background=true"]),
        "blocking": (ROOT, ["checkpoint.background=false"]),
    }
    if against:
        ways["before"] = (against, [])
    found: dict[str, Any] = {way: {"loop_seconds": [], "pause_seconds": [], "reports": []} for way in ways}
    for _ in range(rounds):
        for way, (program, settings) in ways.items():
            took: list[Report] = []
            for every in (EVERY, 1000):
                name = f"{way}-{every}-{ranks}"
                shutil.rmtree(folder / "runs" / name, ignore_errors=True)
                more = [f"train.steps={STEPS}", f"checkpoint.every_steps={every}", *settings]
                reports = train(program, folder, name, ranks, *more)
                took.append(reports[0])
                if every == EVERY:
                    found[way]["reports"] += reports
            for name in ("loop_seconds", "pause_seconds"):
                found[way][name].append(took[0][name] - took[1][name])
            print(f"  {ranks} ranks, {way}: {took[0]} with saves, {took[1]} without", flush=True)
    return found


def rows_of(folder: Path, ranks: int, found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The rows of one number of ranks."""
    rows = []
    for name, what in (("loop_seconds", "time of the loop"), ("pause_seconds", "time between two steps alone")):
        seconds = {way: statistics.median(each[name]) for way, each in found.items()}
        base = seconds.get("before")
        for way, took in seconds.items():
            part = f" ({took / base:.0%} of before)" if base and way != "before" else ""
            wanted = "20 % of before" if way == "background" and ranks == 1 else ""
            rows.append((f"{ranks} ranks, {way}: what {SAVES} saves add, {what}", f"{took:.1f} s{part}", wanted))
    written = metrics(folder / "runs" / f"background-{EVERY}-{ranks}", "checkpoint/seconds")
    first = [took for step, took in written.items() if step < STEPS]
    rows.append((f"{ranks} ranks, background: until `latest` moves", f"{statistics.median(first):.1f} s", ""))
    for way, each in found.items():
        unit = 12 * PARAMETERS / ranks if way == "background" else 4 * PARAMETERS
        most = max(report["added_in_a_pause"] for report in each["reports"])
        what = "the rank's share" if way == "background" else "the fp32 weights"
        wanted = {"background": "1.1x", "blocking": "0.5x"}.get(way, "")
        said = f"{most / 1e9:.2f} GB: {most / unit:.2f}x {what}"
        rows.append((f"{ranks} ranks, {way}: memory that a save adds", said, wanted))
    return rows


def resume(folder: Path, ranks: int, found: dict[str, Any]) -> tuple[str, str, str]:
    """The row of a resume's peak over that of a fresh start."""
    fresh = max(report["peak"] for report in found["blocking"]["reports"])
    more = [f"train.steps={STEPS + 5}", "checkpoint.every_steps=1000"]
    again = train(ROOT, folder, f"background-{EVERY}-{ranks}", ranks, *more)
    over = max(report["peak"] for report in again) - fresh
    said = f"{over / 1e9:+.2f} GB: {over / 4 / PARAMETERS:.2f}x the fp32 weights"
    return f"{ranks} ranks: peak of a resumed run over that of a fresh one", said, "0.5x"


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--against", type=Path, help="the folder of an older version")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "runs").mkdir()
        make_sample(folder / "sample")
        for ranks in chosen.ranks:
            found = costs(folder, ranks, chosen.rounds, chosen.against)
            rows += [*rows_of(folder, ranks, found), resume(folder, ranks, found)]
    print(f"\n{machine()}\n\n| what | measured | at most |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
