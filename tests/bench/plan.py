"""Is `biogpt plan` right? `python -m tests.bench.plan --only memory|time` measures runs and prints tables.

Memory: runs of 101M parameters (12 layers x 768, vocabulary 20,000, bf16, two micro-batches of 8 x 128 tokens) at ZeRO
1, 2 and 3, with recomputation none and full, of 1 and 2 ranks; the peak of each phase above what the process had before
the model, of the rank with most. About 20 minutes on two idle cores; other programs make it slower, but do not change
it. The plan's constant for CPUs, `PROCESS`, was fitted to the runs of `--only fit`: 36M parameters, 8 layers x 512,
recomputation selective, 1 rank.

Time: the speed of one setting, over 20 steps, predicts that of others. Runs take turns. It needs idle cores.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from data.common.files import MANIFEST, json_bytes, read_json, seal
from pretrain.plan import Memory, measured_speed, memory
from pretrain.recipe import load_recipe
from tests.bench.machine import cores, machine
from tests.paths import ROOT
from tests.pretrain.runs import make_sample

VOCABULARY = 20_000
LARGE = [
    "model.hidden_size=768", "model.num_hidden_layers=12", "model.num_attention_heads=12",
    "model.intermediate_size=3072",
]  # fmt: skip
SMALL = [
    "model.hidden_size=512", "model.num_hidden_layers=8", "model.num_attention_heads=8",
    "model.intermediate_size=2048", "model.gradient_checkpointing=selective",
]  # fmt: skip
COMMON = [
    "model.max_position_embeddings=128", "train.precision=bf16", "evaluate.every_steps=1000", "evaluate.max_blocks=8",
    "checkpoint.keep_last=1", "log.every_steps=1",
]  # fmt: skip
PHASES = ("build", "step", "save", "load")
Peaks = dict[str, float]


def make_shards(folder: Path) -> Path:
    """Shards of the sample that claim a vocabulary as large as a real one; most of its rows occur in no text."""
    make_sample(folder / "sample")
    shards = folder / "sample" / "shards"
    manifest = read_json(shards / MANIFEST)
    manifest["counts"]["vocabulary"] = VOCABULARY
    (shards / MANIFEST).write_bytes(json_bytes(seal(manifest)))
    return shards


def train(folder: Path, name: str, ranks: int, settings: list[str]) -> list[Peaks]:
    """Train a run, or resume it; the peaks of each of its ranks."""
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // ranks)), "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun, "-m", "tests.bench.plan_run", str(folder / name), "tiny", *settings]
    with (folder / f"{name}.log").open("a") as log:
        subprocess.run(command, env=os.environ | threads, check=True, stdout=log, stderr=log)
    return [json.loads((folder / f"{name}.{rank}").read_text()) for rank in range(ranks)]


def peaks_of(folder: Path, shards: Path, ranks: int, settings: list[str]) -> tuple[Peaks, Memory]:
    """Phase -> the measured peak in bytes, of a new run and then of the same run resumed; and the planned memory."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    batch = ["train.micro_batch_size=8", f"train.global_batch_tokens={2048 * ranks}", "checkpoint.every_steps=2"]
    chosen = [*COMMON, *batch, *settings, f"data.shards={shards}", f"train.run={run}"]
    fresh = train(folder, "fresh", ranks, [*chosen, "train.steps=4"])
    resumed = train(folder, "resumed", ranks, [*chosen, "train.steps=5"])
    peaks = {phase: max(each[phase] for each in fresh) for phase in PHASES[:3]}
    peaks["load"] = max(each["build"] for each in resumed)
    return peaks, memory(load_recipe("tiny", chosen), VOCABULARY, ranks, cpu=True)


def cell(planned: float, measured: float) -> str:
    """Planned against measured, and how far the plan is off."""
    return f"{planned / 1e9:.2f} against {measured / 1e9:.2f} GB, {planned / measured - 1:+.1%}"


def memory_rows(folder: Path, shards: Path, shape: list[str], fit: bool) -> Iterator[list[str]]:
    """The table's rows: each phase of each setting."""
    for ranks in (1,) if fit else (1, 2):
        for stage in (1, 2, 3):
            for recomputation in ("selective",) if fit else ("none", "full"):
                chosen = [*shape, f"deepspeed.stage={stage}", f"model.gradient_checkpointing={recomputation}"]
                peaks, plan = peaks_of(folder, shards, ranks, chosen)
                planned = {"build": plan.build, "step": plan.step, "save": plan.step + plan.copies, "load": plan.step}
                cells = [cell(planned[phase], peaks[phase]) for phase in PHASES]
                yield [f"ZeRO {stage}, {recomputation}, {ranks} ranks", *cells]


def time_rows(folder: Path, shards: Path, rounds: int, steps: int) -> Iterator[list[str]]:
    """The speed of each setting, and what the plan says of it from the first one."""
    ways = {
        "micro-batch 8, none, 1 rank": (1, ["train.micro_batch_size=8"]),
        "micro-batch 4": (1, ["train.micro_batch_size=4"]),
        "micro-batch 16": (1, ["train.micro_batch_size=16"]),
        "recomputation full": (1, ["train.micro_batch_size=8", "model.gradient_checkpointing=full"]),
        "2 ranks": (2, ["train.micro_batch_size=8"]),
    }
    fixed = [*COMMON, *LARGE, "train.global_batch_tokens=4096", "checkpoint.every_steps=1000", f"data.shards={shards}"]
    calibrated = None
    found: dict[str, list[float]] = {name: [] for name in ways}
    planned: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (ranks, settings) in ways.items():
            run = folder / "run"
            shutil.rmtree(run, ignore_errors=True)
            chosen = [*fixed, *settings, f"train.steps={steps}", f"train.run={run}"]
            train(folder, "timed", ranks, chosen)
            speed, recipe = measured_speed(run), load_recipe("tiny", chosen)
            found[name].append(speed.tokens_per_second(recipe, VOCABULARY, ranks))
            if name == next(iter(ways)) or calibrated is None:
                calibrated = speed
            planned[name].append(calibrated.tokens_per_second(recipe, VOCABULARY, 1))  # ranks share the same cores
            print(f"  {name}: {found[name][-1]:.0f} tokens/s, planned {planned[name][-1]:.0f}", flush=True)
    for name in ways:
        measured, plan = statistics.median(found[name]), statistics.median(planned[name])
        yield [name, f"{plan:.0f}", f"{measured:.0f}", f"{measured / plan - 1:+.1%}"]  # of the time: its inverse


def print_table(header: list[str], rows: Iterator[list[str]]) -> None:
    """Print a table row by row, as they are measured."""
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("memory", "fit", "time"))
    parser.add_argument("--rounds", type=int, default=2, help="of the time")
    parser.add_argument("--steps", type=int, default=20, help="of a timed run")
    chosen = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = make_shards(folder)
        if chosen.only != "time":
            fit = chosen.only == "fit"
            rows = memory_rows(folder, shards, SMALL if fit else LARGE, fit)
            print_table([f"{36 if fit else 101}M parameters: planned against measured", *PHASES], rows)
        if chosen.only in (None, "time"):
            header = ["time", "planned tokens/s", "measured tokens/s", "planned time against measured"]
            print_table(header, time_rows(folder, shards, chosen.rounds, chosen.steps))


if __name__ == "__main__":
    main()
