"""The folder of a run: what belongs in it, and how it is recognised, so that no other folder is written into."""

from pathlib import Path
from typing import Any

from data.common.files import MANIFEST, UserError, read_json, whole_file, write_json
from data.text.ids import tokenizer_files
from pretrain.given import encoder_files
from pretrain.recipe import load_recipe

VERSION = 1
NAMES = {
    MANIFEST,
    "recipe.toml",
    "metrics.jsonl",
    "tensorboard",
    "traces",
    "checkpoints",
    "latest",
    "tokenizer",
    "encoder",
    "training-data.json",
    "stop",
}
"""Everything that a run writes into its folder."""


def check_run_folder(folder: Path) -> None:
    """Raise UserError unless the folder is absent, empty or a run.

    A run is known by its manifest. Runs of earlier versions that ended before their first checkpoint have none; they
    are accepted if they have a recipe and nothing that a run does not write.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"train.run = {str(folder)!r}: is not a folder; choose another name")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if not names or _is_run(folder, names):
        return
    raise UserError(
        f"train.run = {str(folder)!r}: exists and is not a run (it holds {', '.join(sorted(names)[:3])}); choose"
        " another folder"
    )


def _is_run(folder: Path, names: set[str]) -> bool:
    try:
        if MANIFEST not in names:
            load_recipe(str(folder / "recipe.toml"))
            return names <= NAMES
        manifest = read_json(folder / MANIFEST)
    except UserError:
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == "run"


def begin_run_folder(folder: Path, record: dict[str, Any], tokenizer: Path, encoder: Path | None = None) -> None:
    """Make the folder of a new run, its manifest first, and copy the tokenizer's files into it.

    record: further entries of the manifest; encoder: folder of an encoder, whose `encoder_files` are copied too. Files
    that exist already are not written again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).is_file():
        write_run_manifest(folder, record)
    _copy(tokenizer, tokenizer_files(tokenizer), folder / "tokenizer")
    if encoder:
        _copy(encoder, encoder_files(encoder), folder / "encoder")


def _copy(given: Path, names: list[str], own: Path) -> None:
    own.mkdir(exist_ok=True)
    for name in names:
        source, target = given / name, own / name
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            with whole_file(target) as stream:  # without its mode: the shards may be read-only
                stream.write(source.read_bytes())


def write_run_manifest(folder: Path, record: dict[str, Any]) -> None:
    """Write the manifest of a run: what its newest checkpoint records."""
    write_json(folder / MANIFEST, {"kind": "run", "version": VERSION, **record})
