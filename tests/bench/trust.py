"""Can a run be trusted? `python -m tests.bench.trust` kills runs, flips bytes, times the loop, and prints a table.

Runs on the embedded sample; about 8 minutes on two cores. `--kills N` for fewer.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from data.common.files import UserError, read_manifest
from data.shards.blocks import TokenStream, TrainingBlocks
from data.shards.indexed import write_index
from pretrain import engine as engines
from pretrain.checkpoint import list_checkpoints, verify_checkpoint
from pretrain.recipe import load_recipe
from pretrain.run import Run
from pretrain.train import train
from tests.bench.machine import machine
from tests.pretrain.runs import make_sample, metrics, settings, stage_settings

STEPS, EVERY = 120, 15
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
CURVES = ("train/loss", "validation/loss", "train/learning_rate", "train/gradient_norm")


def chosen(shards: Path, run: Path, stage: int) -> list[str]:
    """Dropout and layerdrop on, a checkpoint every few steps."""
    layout = stage_settings(shards.parent, stage)
    more = [f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "evaluate.max_blocks=4"]
    dropout = ["model.layerdrop=0.2", "model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1"]
    return settings(shards, run, *layout, *more, *dropout)


def start(arguments: list[str], module: str = "pretrain.train", kill_at: int = 0) -> subprocess.Popen[Any]:
    """A run of two ranks in a session of its own."""
    environment = os.environ | ({"STRIKE": f"save {kill_at}"} if kill_at else {})
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [*TORCHRUN, "-m", module, "tiny", *arguments]
    return subprocess.Popen(command, env=environment, start_new_session=True, **quiet)


def kill(process: subprocess.Popen[Any], whole_group: bool, rng: random.Random) -> None:
    """SIGKILL the launcher and all ranks at once, or one rank."""
    below = psutil.Process(process.pid).children(recursive=True)
    ranks = [each for each in below if "-m" in each.cmdline() and "tiny" in each.cmdline()]
    if whole_group or not ranks:
        os.killpg(process.pid, signal.SIGKILL)
        for each in below:
            each.kill()
    else:
        rng.choice(ranks).kill()
    process.wait(90)


def kills(folder: Path, shards: Path, number: int) -> tuple[int, list[str]]:
    """Kill runs at moments drawn over their whole time; how many went on to the bit-identical end."""
    rng, good, moments = random.Random(1), 0, []
    whole, seconds = {}, {}
    for stage in (1, 3):
        before = time.monotonic()
        assert start(chosen(shards, folder / f"whole-{stage}", stage)).wait() == 0
        whole[stage], seconds[stage] = folder / f"whole-{stage}", time.monotonic() - before
    for trial in range(number):
        stage, run = (1, 3)[trial % 2], folder / f"trial-{trial}"
        if trial % 4 < 2:  # half of them inside a save
            kill_at = rng.randint(1, 100)
            assert start(chosen(shards, run, stage), "tests.bench.killed", kill_at).wait(180) != 0
            moment = f"ZeRO {stage}: rank 0 before file operation {kill_at} of saving"
        else:
            whole_group, after = rng.random() < 0.5, rng.uniform(0.02, 0.98) * seconds[stage]
            process = start(chosen(shards, run, stage))
            time.sleep(after)
            kill(process, whole_group, rng)
            victim = "whole group" if whole_group else "one rank"
            moment = f"ZeRO {stage}: {victim} after {after:.1f} of {seconds[stage]:.1f} s"
        reached = (run / "latest").read_text() if (run / "latest").exists() else "no checkpoint"
        assert start(chosen(shards, run, stage)).wait(180) == 0
        same = all(metrics(run, name) == metrics(whole[stage], name) for name in CURVES)
        ends = [each / "checkpoints" / f"step-{STEPS:07d}" for each in (run, whole[stage])]
        files = [read_manifest(end, "checkpoint")["files"] for end in ends]
        same = same and files[0] == files[1]
        good += same
        moments.append(f"{moment}; {reached}; {'identical' if same else 'DIFFERENT'}")
        print(f"  {trial + 1:2d}. {moments[-1]}", flush=True)
        if trial < number - 1:
            shutil.rmtree(run)
    return good, moments


def flips(run: Path, each: int) -> tuple[int, int]:
    """Flip one bit at places drawn in every file of a checkpoint: (found, tried)."""
    rng, found, tried = random.Random(2), 0, 0
    checkpoint = list_checkpoints(run)[0]
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        for _ in range(each):
            changed = bytearray(content)
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            tried += 1
            try:
                verify_checkpoint(checkpoint)
            except UserError:
                found += 1
        path.write_bytes(content)
    return found, tried


class Overhead(NamedTuple):
    """Seconds of a step."""

    step: float
    outside: float
    """Outside the engine's forward, backward and step."""
    observers: float
    """In the observers."""


def overhead(folder: Path, shards: Path, steps: int = 50) -> Overhead:
    """What the loop and its observers add to a step: 12 layers x 768, reports every 10 steps, 3 steps traced."""
    engines.init_distributed()
    inside = [0.0]

    def timed(original: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            before = time.perf_counter()
            result = original(*arguments, **more)
            inside[0] += time.perf_counter() - before
            return result

        return call

    kind = engines.deepspeed.DeepSpeedEngine
    originals = {name: getattr(kind, name) for name in ("forward", "backward", "step")}
    for name, original in originals.items():
        setattr(kind, name, timed(original))
    shape = ["model.num_hidden_layers=12", "model.hidden_size=768", "model.num_attention_heads=12"]
    length = ["train.global_batch_tokens=4096", "train.micro_batch_size=16", "model.intermediate_size=3072"]
    rest = [f"train.steps={steps + 2}", "evaluate.max_blocks=1", "checkpoint.every_steps=1000"]
    rest += ["log.every_steps=10", "log.profile_steps=[21,23]"]
    marks: list[tuple[float, float, float]] = []
    import pretrain.train as module

    update = module.update

    def marked(run: Run, *arguments: Any) -> Any:
        marks.append((time.perf_counter(), inside[0], observing(run)))
        return update(run, *arguments)

    module.update = marked
    try:
        train(load_recipe("tiny", [*settings(shards, folder / "overhead"), *shape, *length, *rest]))
    finally:
        module.update = update
        for name, original in originals.items():
            setattr(kind, name, original)
    # Marks stand at the start of each step, so a difference holds all that observers did too; the first is warm-up.
    step, within, observers = ((last - first) / steps for first, last in zip(marks[1], marks[-1], strict=True))
    return Overhead(step, step - within, observers)


def observing(run: Run) -> float:
    """Seconds in the observers so far."""
    return run.stopwatch.seconds["observers"] + run.stopwatch.since_read("observers")


def reading(folder: Path) -> float:
    """Tokens a second of the training blocks of one rank, context 1024, from the page cache."""
    torch.set_num_threads(1)
    shard, tokens = folder / "big", 200_000_000
    shard.mkdir()
    np.random.default_rng(1).integers(4, 42_000, tokens, np.uint16).tofile(shard / "train-00000.bin")
    lengths = np.full(tokens // 250, 250)
    write_index(shard / "train-00000", np.dtype(np.uint16), lengths, lengths)
    stream = TokenStream(shard, {"files": {"train-00000.idx": {}}}, "train")
    blocks = TrainingBlocks(stream, 1024, seed=1)
    for number in range(0, blocks.blocks_per_epoch, 16):  # brings the file into the page cache
        blocks.batch(range(number, number + 16))
    before = time.perf_counter()
    for number in range(0, 48_000, 16):
        blocks.batch(range(number, number + 16))
    return 48_000 * 1024 / (time.perf_counter() - before)


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    number = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_sample(folder / "sample")
        shards = folder / "sample" / "shards"
        good, _ = kills(folder, shards, number)
        found, tried = flips(folder / "whole-1", each=50)
        added = overhead(folder, shards)
        speed = reading(folder)
    killed = "kill -9 at moments over the whole run, half inside a save; ZeRO 1 and 3, 2 ranks"
    loop = "time the loop adds to the engine's forward, backward and step, 12 layers x 768, all records on"
    rows = [
        (killed, f"{good} of {number} went on to the bit-identical end", "all"),
        ("one flipped bit in any checkpoint file", f"{found} of {tried} found before loading", "all"),
        (loop, f"{added.outside * 1e3:.1f} ms at {added.step:.2f} s a step", "under 1 % at 1 s"),
        (
            "of this, in the observers",
            f"{added.observers * 1e3:.1f} ms, {added.observers / added.step:.2%}",
            "under 1 %",
        ),
        ("block reader, one rank, from the page cache", f"{speed / 1e6:.0f} million tokens/s", "20 million"),
    ]
    print(f"\n{machine()}\n\n| what | measured | wanted |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(json.dumps({"kills": good, "flips": found, "overhead_ms": added.outside * 1e3, "tokens_per_second": speed}))


if __name__ == "__main__":
    main()
