"""Evaluation, for `biogpt evaluate`."""

from pathlib import Path
from typing import Any

from data.common.files import UserError, read_json, read_manifest, sha256, verify_files
from pretrain.held_out import HeldOut, OtherSources, SummedLoss, held_out_loss
from pretrain.hf_folder import hf_likelihood, load_hf
from pretrain.load import best_device, load_model, load_run
from pretrain.objectives.kinds import make_objective
from pretrain.objectives.next_token import held_out_blocks


def evaluate_folder(folder: Path, shards: Path | None, split: str, step: str = "", average: int = 1) -> dict[str, Any]:
    """The held-out loss of a run's checkpoint or of an HF folder, on packed blocks of shards, as in training.

    shards: for a run, the default is its own; step, average: as for `load_run`. Raises UserError if the shards were
    made with another tokenizer.
    """
    device = best_device()
    is_run = (folder / "recipe.toml").is_file()
    if not (shards or is_run):
        raise UserError(f"{folder}: is not a run, which knows its shards; name either --shards or --corpus")
    if average > 1 and not is_run:
        raise UserError(f"{folder}: --average takes the checkpoints of a run, and this is none")
    opened: Any = load_run(folder, step, average) if is_run else load_hf(folder, device)
    tokenizer = folder / "tokenizer" if is_run else folder
    if shards is not None and (different := different_tokenizer_file(shards / "tokenizer", tokenizer)):
        raise UserError(f"{shards}: made with another tokenizer than {folder}'s ({different} differs)")
    if is_run:
        recipe, chosen, _ = opened
        if recipe.on_records() and shards:
            raise UserError(f"{folder}: was trained on records, not on text; export it and evaluate the folder")
        objective = make_objective(recipe.with_shards(shards) if shards else recipe)
        objective.verify()
        model: SummedLoss = load_model(chosen, objective, device)
        held_out: dict[str, HeldOut] = objective.held_out(split)
    else:
        assert shards is not None
        manifest = read_manifest(shards, "shards")
        verify_files(shards, manifest)
        model = hf_likelihood(opened)
        held_out = {"": held_out_blocks(shards, manifest, split, opened.config.max_position_embeddings)}
    return held_out_loss(model, held_out, 4, device)


def figures_with_sources(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`held_out_loss` of a run that learns from sources: with each target's source, and with those of others.

    Raises UserError if the run has no checkpoint, or its model has no encoder.
    """
    recipe, checkpoints, _ = load_run(run)
    if not recipe.has_encoder():
        raise UserError(f"{run}: its model has no encoder, which reads a source")
    objective, device = make_objective(recipe), best_device()
    model, own = load_model(checkpoints, objective, device), objective.held_out()
    others: dict[str, HeldOut] = {name: OtherSources(each) for name, each in own.items()}
    first, second = (held_out_loss(model, sources, 16, device) for sources in (own, others))
    return first, second


def different_tokenizer_file(one: Path, other: Path) -> str:
    """The name of the file in which two tokenizer folders differ, or "".

    A folder that transformers saved holds `tokenizer.json` alone; then its vocabulary and merges are compared. Raises
    UserError if the folders have no file in common.
    """
    if all((folder / "vocab.json").is_file() for folder in (one, other)):
        names = ("vocab.json", "merges.txt")
        return next((name for name in names if sha256(one / name) != sha256(other / name)), "")
    contents = [_vocabulary_and_merges(folder / "tokenizer.json") for folder in (one, other)]
    return "" if contents[0] == contents[1] else "tokenizer.json"


def _vocabulary_and_merges(path: Path) -> tuple[dict[str, int], list[str]]:
    model = read_json(path)["model"]  # transformers writes a merge as a list of two tokens, tokenizers as one string
    return model["vocab"], [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
