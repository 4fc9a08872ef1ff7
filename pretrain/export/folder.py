"""Write a run as an HF folder. The folder appears only when transformers has loaded it and agrees."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from data.common.files import UserError, make_folder, read_json, read_manifest, write_json
from data.text.ids import tokenizer_files
from model.architecture import Architecture
from pretrain import training_data
from pretrain.checkpoint import step_of
from pretrain.export.card import model_card
from pretrain.export.proof import prove
from pretrain.given import encoder_files
from pretrain.load import best_device, load_model, load_run
from pretrain.objectives.kinds import make_objective
from pretrain.record import read_record
from pretrain.report import CURVES, plot_curves

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FILE_BYTES = 5_000_000_000
"""Weights that take more than this are written as several files, with an index of them."""


def export(
    run: Path,
    out: Path,
    shards: Path | None = None,
    step: str = "",
    average: int = 1,
    dtype: str = "fp32",
    license: str = "unknown",
) -> dict[str, Any]:
    """Write a checkpoint of `run`, or the mean of several, as the HF folder `out`. Returns its manifest.

    shards: where the run's shards or records are now, if they have moved; step, average: as for `load_run`; dtype: a
    name in DTYPES, in which the weights are written; license: what the card says of the weights' licence. Raises
    UserError if the shards are not the run's, and RuntimeError if transformers does not find the held-out loss and our
    model's logits.
    """
    recipe, checkpoints, state = load_run(run, step, average)
    recipe = recipe.with_shards(shards) if shards else recipe
    objective = make_objective(recipe)
    if objective.identity() != state["data"]:
        places = ", ".join(map(str, recipe.data_folders().values()))
        raise UserError(
            f"{places}: not the {recipe.data_key()} that {run} was trained on; name the right ones with --shards, or"
            " several of them in its recipe.toml"
        )
    objective.verify()
    model = load_model(checkpoints, objective, best_device())
    model = model.with_positions(recipe.trained_positions())

    def fill(folder: Path) -> dict[str, Any]:
        write_hf_files(folder, model, run / "tokenizer", DTYPES[dtype], objective.encoder)
        recorded = state if len(checkpoints) == 1 else None
        checks = prove(folder, model, objective, recipe, recorded, DTYPES[dtype])
        averaged = {"averaged_steps": list(map(step_of, checkpoints))} if len(checkpoints) > 1 else {}
        counts = {"step": state["step"], **averaged, "parameters": model.config.parameter_count(), **checks}
        with contextlib.suppress(UserError):  # only a checkpoint is needed, not a record
            plot_curves({"this model": read_record(run)}, folder / CURVES)
        stages = training_data.read_stages(run) or [training_data.stage(objective)]  # earlier runs record none
        write_json(folder / training_data.FILE, stages)
        card = model_card(folder, recipe, stages, state, counts, license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return counts

    hashes = [read_manifest(each, "checkpoint")["files"]["model.safetensors"]["sha256"] for each in checkpoints]
    # Options of later versions are recorded where they are not the default, so that earlier exports stay valid.
    chosen, default = {"dtype": dtype, "license": license}, {"dtype": "fp32", "license": "unknown"}
    request = {"checkpoint": hashes[0] if len(hashes) == 1 else hashes}
    request |= {key: value for key, value in chosen.items() if value != default[key]}
    return make_folder(out, "hf", request, fill)


def write_hf_files(
    folder: Path,
    model: Architecture,
    tokenizer: Path,
    dtype: torch.dtype = torch.float32,
    encoder: Path | None = None,
) -> None:
    """Write config.json, generation_config.json, the weights in this dtype and the tokenizer's files.

    encoder: folder of an encoder, whose configuration and tokenizer go into the folder `encoder`.
    """
    config = model.config
    hf_config = model.hf_config()
    write_json(folder / "config.json", hf_config | {"dtype": str(dtype).removeprefix("torch.")})
    ids = {key: value for key, value in hf_config.items() if key.endswith("_token_id")}
    write_json(folder / "generation_config.json", ids)
    # A copy, because the file may hold no part of a larger tensor, such as the embedding without its padding.
    weights = {name: tensor.to("cpu", dtype, copy=True) for name, tensor in model.hf_weights().items()}
    save_torch_state_dict(weights, folder, max_shard_size=FILE_BYTES)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes it readable for the owner only
    for name in tokenizer_files(tokenizer):
        shutil.copyfile(tokenizer / name, folder / name)
    if encoder:
        (folder / "encoder").mkdir()
        for name in encoder_files(encoder):
            shutil.copyfile(encoder / name, folder / "encoder" / name)
    tokenizer_config = read_json(tokenizer / "tokenizer_config.json")
    # transformers 4 would also give the model token_type_ids, which BioGPT does not take.
    added = {"model_max_length": config.max_position_embeddings, "model_input_names": ["input_ids", "attention_mask"]}
    write_json(folder / "tokenizer_config.json", tokenizer_config | added)
