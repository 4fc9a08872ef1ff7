"""Write a run as an HF folder. The folder appears only when transformers has loaded it and agrees."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from data.common.files import UserError, make_folder, read_json, read_manifest, write_json
from data.text.ids import tokenizer_files
from model.architecture import Architecture
from pretrain.export.card import model_card
from pretrain.export.proof import prove
from pretrain.load import best_device, load_model, load_run
from pretrain.objectives.kinds import make_objective
from pretrain.record import read_record
from pretrain.report import CURVES, plot_curves


def export(run: Path, out: Path, shards: Path | None = None, step: str = "") -> dict[str, Any]:
    """Write a checkpoint of `run` as the HF folder `out`. Returns its manifest.

    shards: where the run's shards or records are now, if they have moved; step: as for `load_run`. Raises UserError if
    they are not the run's, and RuntimeError if transformers does not find the run's held-out loss and our logits.
    """
    recipe, checkpoint, state = load_run(run, step)
    recipe = recipe.with_shards(shards) if shards else recipe
    objective = make_objective(recipe)
    if objective.identity() != state["data"]:
        what = "records" if recipe.on_records() else "shards"
        places = recipe.data.records or ", ".join(map(str, recipe.shards_folders().values()))
        raise UserError(
            f"{places}: not the {what} that {run} was trained on; name the right ones with --shards, or several of them"
            " in its recipe.toml"
        )
    objective.verify()
    model = load_model(checkpoint, objective, best_device())
    if not recipe.on_records():  # fine-tuning leaves positions beyond its context as pretraining made them
        model = model.with_positions(recipe.context_length())

    def fill(folder: Path) -> dict[str, Any]:
        write_hf_files(folder, model, run / "tokenizer")
        checks = prove(folder, model, objective, recipe, state)
        counts = {"step": state["step"], "parameters": model.config.parameter_count(), **checks}
        name = run.resolve().name
        with contextlib.suppress(UserError):  # only a checkpoint is needed, not a record
            plot_curves({name: read_record(run)}, folder / CURVES)
        card = model_card(folder, name, recipe, objective, state, counts)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return counts

    request = {"checkpoint": read_manifest(checkpoint, "checkpoint")["files"]["model.safetensors"]["sha256"]}
    return make_folder(out, "hf", request, fill)


def write_hf_files(folder: Path, model: Architecture, tokenizer: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files."""
    config = model.config
    write_json(folder / "config.json", model.hf_config())
    ids = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "pad", "eos")}
    write_json(folder / "generation_config.json", ids)
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.to_hf(dict(model.state_dict())).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable for the owner only
    for name in tokenizer_files(tokenizer):
        shutil.copyfile(tokenizer / name, folder / name)
    tokenizer_config = read_json(tokenizer / "tokenizer_config.json")
    write_json(
        folder / "tokenizer_config.json", tokenizer_config | {"model_max_length": config.max_position_embeddings}
    )
