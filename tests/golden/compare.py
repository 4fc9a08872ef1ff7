"""Do two commits give the same bits? `python -m tests.golden.compare OLD [NEW]` on one machine; NEW: the working tree.

Both are driven by their own front door alone, on the embedded sample: corpus, tokenizer, shards, and runs of two ranks
at ZeRO 0 to 3 with dropout and layerdrop. Every file of the data folders, every loss and every file of the last
checkpoint is compared. Some 3 minutes. Exit code 1 where something differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.golden.observe import describe
from tests.shared import ROOT

SHAPE = [
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.intermediate_size=64",
    "model.max_position_embeddings=64", "model.layerdrop=0.3", "model.hidden_dropout_prob=0.1",
    "model.attention_probs_dropout_prob=0.1", "train.global_batch_tokens=1024", "train.micro_batch_size=4",
    "train.steps=8", "schedule.warmup_steps=5", "checkpoint.every_steps=4", "evaluate.max_blocks=4",
    "log.every_steps=1",
]  # fmt: skip
RUNS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 3)]


@contextmanager
def tree(commit: str) -> Iterator[Path]:
    """The files of a commit in a folder of their own; of "" the working tree."""
    if not commit:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", place, commit], cwd=ROOT, check=True)
        try:
            yield place
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", place], cwd=ROOT, check=True)


def results(source: Path, folder: Path) -> dict[str, str]:
    """Name -> what is compared, of everything that the program in `source` makes."""

    def biogpt(*arguments: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(source), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "launch.cli", *arguments]
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)

    biogpt("sample", "--out", "raw")
    biogpt("corpus", "raw", "--out", "corpus", "--validation-fraction", "0.05", "--test-fraction", "0.05")
    biogpt("tokenizer", "corpus", "--out", "tokenizer", "--merges", "300")
    biogpt("shards", "corpus", "--tokenizer", "tokenizer", "--out", "shards")
    found = {f"{name}/{file}": digest for name in ("corpus", "tokenizer", "shards")
             for file, digest in describe(folder / name).items() if file != "manifest.json"}  # fmt: skip
    for precision, stage in RUNS:
        run = f"{precision}-{stage}"
        more = [f"train.run={run}", f"train.precision={precision}", f"deepspeed.stage={stage}"]
        biogpt("train", "tiny", *SHAPE, *more, "--ranks", "2")
        for line in map(json.loads, (folder / run / "metrics.jsonl").read_text().splitlines()):
            values = {name: value for name, value in line.items() if "loss" in name or "norm" in name or "rate" in name}
            found |= {f"{run}: {name} at step {line['step']}": repr(value) for name, value in values.items()}
        last = folder / run / "checkpoints" / "step-0000008"
        found |= {f"{run}/{path.name}": describe(last)[path.name] for path in last.glob("*.safetensors")}
    return found


def main() -> None:
    """Print what differs, and how much was compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", nargs="?", default="", help="another; default: the working tree")
    given, found = parser.parse_args(), []
    for commit in (given.old, given.new):
        with tree(commit) as source, tempfile.TemporaryDirectory() as folder:
            found.append(results(source, Path(folder)))
    differing = [name for name in found[0] | found[1] if found[0].get(name) != found[1].get(name)]
    for name in differing:
        print(f"{name}: {found[0].get(name, 'absent')} -> {found[1].get(name, 'absent')}")
    print(f"{given.old} and {given.new or 'the working tree'}: {len(found[0])} results, {len(differing)} differ")
    raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
