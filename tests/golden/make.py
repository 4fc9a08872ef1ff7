"""Write the golden files anew: `python -m tests.golden.make pins` or `... folders`.

Only in a commit of its own, which shows the difference, says why, and raises the version of what changed. Old folders
are kept for ever: `folders` refuses to replace them, a new format gets an archive of its own beside.
"""

import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from data.archive.sample import write_sample
from data.corpus.build import make_corpus
from data.shards.build import make_shards
from data.text.tokenizer import train_tokenizer
from pretrain.export.folder import export
from tests.golden import observe
from tests.pretrain.runs import make_sample, metrics, run_case, settings
from tests.ranks import Ranks

PINS = observe.HERE / "pins.json"
FOLDERS = observe.HERE / "folders-1.tar.xz"
OLD_STEPS = 4


def old_run_settings(shards: Path, run: Path) -> list[str]:
    """The run among the old folders: one rank, ZeRO 1, a checkpoint every two steps."""
    small = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=32"]
    every = ["checkpoint.every_steps=2", "evaluate.max_blocks=4", "deepspeed.stage=1", "model.layerdrop=0.2"]
    return settings(shards, run, *small, *every, f"train.steps={OLD_STEPS}", "train.micro_batch_size=8")


def make_pins(folder: Path) -> None:
    """Write `pins.json`."""
    two_ranks = Ranks(2)
    make_sample(folder)
    pins = {
        "shards": observe.shards(folder),
        "block_order": observe.block_order(folder),
        "losses": observe.losses(folder, folder, two_ranks),
        "checkpoint": observe.checkpoint(folder / "stage-1"),
        "real_funnel": observe.real_funnel(folder),
    }
    two_ranks.close()
    PINS.write_text(json.dumps(pins, indent=1) + "\n")


def make_folders(folder: Path) -> None:
    """Write `folders-1.tar.xz`: corpus, tokenizer, shards, a run with two checkpoints, its export."""
    if FOLDERS.exists():
        raise SystemExit(f"{FOLDERS}: exists; old folders are kept for ever")
    write_sample(folder / "raw", citations=60)
    make_corpus([folder / "raw"], folder / "corpus", 0.1, 0.1, workers=1)
    train_tokenizer(folder / "corpus", folder / "tokenizer", merges=100, min_count=1, workers=1)
    make_shards(folder / "corpus", folder / "tokenizer", folder / "shards", workers=1)
    one_rank = Ranks(1)
    one_rank.run(run_case, old_run_settings(folder / "shards", folder / "run"))
    one_rank.close()
    export(folder / "run", folder / "hf")
    losses = {name: metrics(folder / "run", name) for name in ("train/loss", "validation/loss")}
    (folder / "losses.json").write_text(json.dumps(losses, indent=1))
    shutil.rmtree(folder / "run" / "tensorboard")
    for name in ("corpus.parts",):
        assert (folder / name).is_dir()
    with tarfile.open(FOLDERS, "w:xz") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)


if __name__ == "__main__":
    place = Path(tempfile.gettempdir()) / "golden"  # a recipe records its paths
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    {"pins": make_pins, "folders": make_folders}[sys.argv[1]](place)
    shutil.rmtree(place)
