"""What is pinned: each function observes one result of the program as JSON. `make.py` writes them to `pins.json`.

Whole numbers, names and hashes are compared exactly, floats to 1e-5: processors and versions of torch differ in the
last bits. Bit-equality between two commits on one machine is what `compare.py` shows.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from data.common.files import read_manifest, sha256
from data.corpus.build import make_corpus
from data.corpus.selection import funnel
from data.corpus.settings import load_corpus_settings
from data.shards.blocks import TokenStream, TrainingBlocks
from pretrain.checkpoint import newest_checkpoint, read_state
from tests.pretrain.runs import metrics, run_case, settings, stage_settings
from tests.ranks import Ranks
from tests.shared import NLM

HERE = Path(__file__).parent
STEPS = 6
ORDERS = ((1, 0), (1, 40), (7, 12))  # (seed, step)
BLOCKS = 16  # of a step


def shards(folder: Path) -> dict[str, Any]:
    """The sample's shards: counts, the sha256 of every file that no library's version shapes, the first ids."""
    manifest = read_manifest(folder / "shards", "shards")
    stream = TokenStream(folder / "shards", manifest, "train")
    suffixes = (".bin", ".idx", ".npy", "vocab.json", "merges.txt")
    names = [name for name in sorted(manifest["files"]) if name.endswith(suffixes)]
    return {
        "counts": manifest["counts"],
        "sha256": {name: manifest["files"][name]["sha256"] for name in names},
        "first_ids": stream.read(0, 100).tolist(),
    }


def block_order(folder: Path) -> dict[str, Any]:
    """For each (seed, step): the second id of each block of the global batch, and a hash of all its ids."""
    manifest = read_manifest(folder / "shards", "shards")
    stream, orders = TokenStream(folder / "shards", manifest, "train"), {}
    for seed, step in ORDERS:
        blocks = TrainingBlocks(stream, 64, seed)
        inputs, targets = blocks.batch(range(step * BLOCKS, (step + 1) * BLOCKS))
        ids = np.stack([inputs.numpy(), targets.numpy()]).astype("<i8")
        orders[f"seed {seed}, step {step}"] = {
            "ids": inputs[:, 1].tolist(),
            "sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        }
    return orders


def losses(folder: Path, runs: Path, two_ranks: Ranks) -> dict[str, list[float]]:
    """Losses of each step and held-out losses of a tiny run at each ZeRO stage: two ranks, layerdrop and dropout."""
    found = {}
    for stage in range(4):
        run = runs / f"stage-{stage}"
        chosen = stage_settings(runs, stage)
        more = ["model.layerdrop=0.3", "model.hidden_dropout_prob=0.1", f"train.steps={STEPS}", "evaluate.max_blocks=4"]
        two_ranks.run(run_case, settings(folder / "shards", run, *chosen, *more))
        found[f"ZeRO {stage}"] = [*metrics(run, "train/loss").values(), *metrics(run, "validation/loss").values()]
    return found


def checkpoint(run: Path) -> dict[str, Any]:
    """Names, types and shapes of a checkpoint's tensors as the files' headers say, and the keys of its records."""
    folder, _ = newest_checkpoint(run)
    assert folder is not None
    state = read_state(folder)
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "tensors": {path.name: header(path) for path in sorted(folder.glob("*.safetensors"))},
        "state": {key: sorted(value) if isinstance(value, dict) else "a value" for key, value in state.items()},
        "manifest": sorted(json.loads((folder / "manifest.json").read_text())),
    }


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: name -> type and shape."""
    with path.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        content = json.loads(stream.read(size))
    return {
        name: [entry["dtype"], *entry["shape"]] for name, entry in sorted(content.items()) if name != "__metadata__"
    }


def real_funnel(folder: Path) -> dict[str, dict[str, int]]:
    """What becomes of the records of all real XML files, by profile."""
    files, found = sorted([*NLM.glob("*.xml.gz"), *NLM.glob("updates/*.xml*")]), {}
    for profile in ("clean", "biogpt"):
        chosen = load_corpus_settings(None, [f"corpus.profile={profile}"])
        counts = make_corpus(files, folder / profile, 0.05, 0.05, 2, chosen)["counts"]
        found[profile] = dict(funnel(counts))
    return found


def describe(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file below a folder."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
