"""What would a user get from `transformers.Trainer` with DeepSpeed? `python -m tests.bench.peers` runs both.

Both train the same model from the same first weights on the same blocks, with the same optimizer and DeepSpeed
configuration, fp32, on gloo (`tests/bench/trainer_run.py`). Both are killed, resumed and damaged in the same way, and
take turns where they are timed. Prints a table. About 20 minutes on two free cores; `--only speed` measures
one part.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from data.common.files import read_manifest, write_manifest
from tests.bench.machine import machine
from tests.bench.needs import need_extra
from tests.bench.trust import TORCHRUN
from tests.paths import ROOT
from tests.pretrain.runs import make_sample, metrics, settings, stage_settings

STEPS, EVERY, VOCABULARY = 20, 5, 42_384
FAULT = re.compile(r"^(?:\[rank\d+\]: )?(biogpt: error: .*|[\w.]*(?:Error|Exception)(?:: \S.*)?)$", re.MULTILINE)
DROPOUT = ["model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1"]
KILLED_STEPS = (3, 8, 18)
ROUNDS = 3
Row = tuple[str, list[str]]
"""What was done, and what came of it with each peer."""


class Done(NamedTuple):
    """A run that has ended."""

    fault: str
    """Its first line that names an error, or "" if it ended well."""
    printed: str
    peak: float
    """Peak memory in GB of its largest process, libraries included."""


@dataclass(frozen=True)
class Peer:
    """A program that trains, its sample, and where its runs are."""

    module: str
    folder: Path
    shards: Path
    payload: tuple[str, ...]
    """Patterns of the large files of a checkpoint."""

    def settings(self, name: str, stage: int, *more: str) -> list[str]:
        """A run of a few steps."""
        chosen = stage_settings(self.folder, stage)
        steps = [f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "evaluate.max_blocks=4"]
        alike = "optimizer.decay_biases_and_norms=false"  # as Trainer
        return settings(self.shards, self.folder / name, *chosen, *steps, alike, *more)

    def train(self, chosen: list[str], ranks: int = 2, **environment: str) -> Done:
        """Train or resume a run. Raises RuntimeError if it takes a quarter of an hour."""
        torchrun = [*TORCHRUN[:-1], f"--nproc-per-node={ranks}"]
        command = ["timeout", "--kill-after=10", "900", *torchrun, "-m", self.module, "tiny", *chosen]
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            printed = output.read()
        if process.returncode in (124, 137):  # of `timeout`: the machine was too busy, or the run hangs
            raise RuntimeError(f"{' '.join(command)}: took 900 s\n{printed}")
        found = FAULT.search(printed)
        fault = found[1] if found else f"exit code {process.returncode}"
        return Done(fault if process.returncode else "", printed, usage.ru_maxrss * 1024 / 1e9)

    def newest(self, name: str) -> Path:
        """The newest checkpoint of a run."""
        found = [path.parent for path in (self.folder / name).rglob("model.safetensors")]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]))

    def difference(self, name: str, whole: str) -> float:
        """The largest difference of the losses of two runs; infinity if steps are missing or a loss is no number."""
        losses, expected = (metrics(self.folder / each, "train/loss") for each in (name, whole))
        if losses.keys() != expected.keys():
            return float("inf")
        worst = torch.tensor([abs(losses[step] - expected[step]) for step in expected]).max().item()
        return worst if worst == worst else float("inf")

    def same(self, name: str, whole: str) -> bool:
        """Whether two runs have the same losses and last weights, to the last bit."""
        ends = [(self.newest(each) / "model.safetensors").read_bytes() for each in (name, whole)]
        return self.difference(name, whole) == 0 and ends[0] == ends[1]


def killed(peer: Peer) -> tuple[str, str]:
    """kill -9 at six file operations of the second save, and at three steps, with dropout: what resumes."""
    log = peer.folder / "operations"
    done = peer.train(peer.settings("whole", 1, *DROPOUT), STRIKE_LOG=str(log))
    assert not done.fault, done.printed
    begun = [int(line) for line in log.read_text().split()]
    first, last = begun[1] + 1, begun[2]
    saves = [f"save {first + round(part * (last - first) / 5)}" for part in range(6)]
    results = {strike: resumed(peer, strike) for strike in [*saves, *(f"step {step}" for step in KILLED_STEPS)]}

    def summary(strikes: list[str]) -> str:
        found = [results[strike] for strike in strikes]
        good = sum(not fault for fault in found)
        faults = "; ".join(sorted({fault for fault in found if fault}))
        return f"{good} of {len(found)} bit-identical" + (f"; else: {faults}" if faults else "")

    return summary(saves), summary([strike for strike in results if strike not in saves])


def resumed(peer: Peer, strike: str) -> str:
    """Kill a run, run the same command again, and compare with the run that was never killed. "" means identical."""
    name = f"killed {strike}".replace(" ", "-")
    chosen = peer.settings(name, 1, *DROPOUT)
    assert peer.train(chosen, STRIKE=strike).fault, strike
    fault = peer.train(chosen).fault
    if not fault and not peer.same(name, "whole"):
        fault = f"losses differ by {peer.difference(name, 'whole'):.1e}"
    print(f"  {peer.module}, {strike}: {fault or 'identical'}", flush=True)
    return short(fault)


def short(fault: str) -> str:
    """The beginning of an error, without paths."""
    return re.sub(r"/\S*/", "", fault)[:110].replace("|", " ").replace("\n", " ")


def layouts(peer: Peer) -> list[tuple[str, str]]:
    """A run killed at step 13, resumed in another layout: (what, how far its losses are from the uninterrupted)."""
    assert not peer.train(peer.settings("plain", 1)).fault
    assert peer.train(peer.settings("stopped", 1), STRIKE="step 13").fault
    rows = []
    for stage, ranks in ((1, 1), (2, 2), (3, 2)):
        name = f"layout-{stage}-{ranks}"
        shutil.copytree(peer.folder / "stopped", peer.folder / name)
        fault = peer.train(peer.settings(name, stage), ranks).fault
        outcome = f"fails: {short(fault)}" if fault else f"losses within {peer.difference(name, 'plain'):.0e}"
        rows.append((f"ZeRO 1 x 2 ranks, resumed at ZeRO {stage} x {ranks}", outcome))
        print(f"  {peer.module}, {rows[-1]}", flush=True)
    return rows


def flips(peer: Peer) -> str:
    """A byte flipped in the middle of each large file of the newest checkpoint, then the same command again."""
    outcomes = []
    for number, path in enumerate(each for pattern in peer.payload for each in peer.newest("stopped").glob(pattern)):
        name = f"flipped-{number}"
        shutil.copytree(peer.folder / "stopped", peer.folder / name)
        flipped = peer.folder / name / path.relative_to(peer.folder / "stopped")
        content = bytearray(flipped.read_bytes())
        content[len(content) // 2] ^= 0x40
        flipped.write_bytes(content)
        done = peer.train(peer.settings(name, 1))
        said = "named" if path.name in done.printed else "not named"
        ended = "refused" if done.fault else f"trained on, losses differ by {peer.difference(name, 'plain'):.0e}"
        outcomes.append(f"`{path.name}`: {said}, {ended}")
        print(f"  {peer.module}, {outcomes[-1]}", flush=True)
    return "; ".join(outcomes)


def poisoned(peer: Peer, stage: int) -> str:
    """The loss of one backward pass is NaN."""
    name = f"nan-{stage}"
    return left_behind(peer, name, peer.train(peer.settings(name, stage), STRIKE="nan 15"))


def diverging(peer: Peer, rate: str) -> str:
    """A learning rate that no run survives."""
    name = f"rate-{rate}"
    return left_behind(peer, name, peer.train(peer.settings(name, 1, f"optimizer.learning_rate={rate}")))


def left_behind(peer: Peer, name: str, done: Done) -> str:
    """How a run ended, and what its newest checkpoint holds."""
    losses = metrics(peer.folder / name, "train/loss")
    said = "a warning, " if "skipped, a gradient" in done.printed else ""
    ended = f"refused: {short(done.fault)}" if done.fault else "exit code 0"
    outcome = f"{said}{ended}; last loss recorded {losses[max(losses)]:.3g}; newest checkpoint {saved(peer, name)}"
    print(f"  {peer.module}, {name}: {outcome}", flush=True)
    return outcome


def saved(peer: Peer, name: str) -> str:
    """The newest checkpoint of a run, and whether its weights are finite."""
    if not any((peer.folder / name).rglob("model.safetensors")):
        return "none"
    newest = peer.newest(name)
    finite = all(bool(torch.isfinite(each).all()) for each in load_file(newest / "model.safetensors").values())
    return f"{newest.name}: weights {'finite' if finite else 'NaN'}"


def speed(peers: list[Peer]) -> list[Row]:
    """The rows of a race, with ratios."""
    measured = race(peers, ROUNDS)
    return [(what, [f"{one:,.3g}: {one / other:.2f}x", f"{other:,.3g}"]) for what, (one, other) in measured]


def race(peers: list[Peer], rounds: int) -> list[tuple[str, list[float]]]:
    """Speed, memory and checkpoints at 27M parameters; the peers take turns, and the best of each counts."""
    shape = [
        "model.num_hidden_layers=6", "model.hidden_size=384", "model.num_attention_heads=6",
        "model.intermediate_size=1536", "model.max_position_embeddings=128", "train.global_batch_tokens=2048",
        "train.micro_batch_size=8", "train.steps=6", "checkpoint.every_steps=3", "checkpoint.background=false",
        "checkpoint.keep_last=1", "checkpoint.keep_best=false", "evaluate.max_blocks=1",
    ]  # fmt: skip
    found: list[dict[str, list[float]]] = [{"speed": [], "peak": [], "seconds": []} for _ in peers]
    sizes = [0.0] * len(peers)
    for turn in range(rounds):
        for index, peer in enumerate(peers):
            name = f"race-{turn}"
            done = peer.train(peer.settings(name, 1, f"data.shards={wide(peer)}", *shape))
            assert not done.fault, done.printed
            found[index]["speed"].append(max(metrics(peer.folder / name, "train/tokens_per_second").values()))
            found[index]["seconds"].append(min(metrics(peer.folder / name, "checkpoint/seconds").values()))
            found[index]["peak"].append(done.peak)
            files = [path for path in peer.newest(name).rglob("*") if path.is_file()]
            sizes[index] = sum(path.stat().st_size for path in files) / 1e9
            shutil.rmtree(peer.folder / name)
            print(
                f"  {peer.module}, {turn + 1}: { ({key: each[-1] for key, each in found[index].items()}) }", flush=True
            )
    return [
        ("tokens/s of the fastest step", [max(each["speed"]) for each in found]),
        ("peak memory of a rank, libraries included, GB", [min(each["peak"]) for each in found]),
        ("one blocking checkpoint, s", [min(each["seconds"]) for each in found]),
        ("size of a checkpoint, GB", sizes),
    ]


def wide(peer: Peer) -> Path:
    """The shards of the sample, said to have BioGPT's number of tokens, so that the head has its usual weight."""
    folder = peer.folder / "wide"
    if not folder.exists():
        shutil.copytree(peer.shards, folder)
        manifest = read_manifest(folder, "shards")
        write_manifest(folder, "shards", manifest["request"], manifest["counts"] | {"vocabulary": VOCABULARY})
    return folder


def kills(peers: list[Peer]) -> list[Row]:
    """The rows of kill -9 and a resume by the same command."""
    found = [killed(peer) for peer in peers]
    return [
        ("kill -9 at 6 file operations of a save, dropout 0.1", [inside for inside, _ in found]),
        (f"kill -9 before steps {', '.join(map(str, KILLED_STEPS))}, dropout 0.1", [outside for _, outside in found]),
    ]


def resumes(peers: list[Peer]) -> list[Row]:
    """The rows of a resume in another layout, and from a damaged checkpoint."""
    changed = [layouts(peer) for peer in peers]
    rows = [(each[0][0], [outcome for _, outcome in each]) for each in zip(*changed, strict=True)]
    return [*rows, ("one byte flipped in a file of the newest checkpoint", [flips(peer) for peer in peers])]


def numbers(peers: list[Peer]) -> list[Row]:
    """The rows of numbers that are not finite."""
    return [
        *((f"one loss is NaN, ZeRO {stage}", [poisoned(peer, stage) for peer in peers]) for stage in (1, 0)),
        *((f"learning rate {rate}", [diverging(peer, rate) for peer in peers]) for rate in ("1e6", "1e30")),
    ]


PARTS = {"kills": kills, "resumes": resumes, "numbers": numbers, "speed": speed}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(PARTS), help="one part; all without this option")
    only = parser.parse_args().only
    need_extra("bench", "accelerate")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_sample(folder / "sample")
        shards = folder / "sample" / "shards"
        peers = [
            Peer("tests.bench.killed", folder / "ours", shards, ("*.safetensors",)),
            Peer("tests.bench.trainer_run", folder / "trainer", shards, ("*.safetensors", "global_step*/*.pt")),
        ]
        for peer in peers:
            peer.folder.mkdir()
        for part in [only] if only else PARTS:
            rows += PARTS[part](peers)
    print(f"\n{machine()}\n\n| what | ours | Trainer |\n|---|---|---|")
    for what, cells in rows:
        print(f"| {what} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
