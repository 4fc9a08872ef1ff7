"""Evaluation and generation, for `biogpt evaluate` and `biogpt generate`."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from data.common.files import UserError, read_manifest, sha256, verify_files
from data.shards.build import make_shards
from data.text.tokenizer import TOKENIZER_FILES
from pretrain.held_out import SummedLoss, held_out_loss
from pretrain.hf_folder import hf_likelihood, load_hf
from pretrain.load import best_device, load_model, load_run
from pretrain.objective import held_out_blocks, make_objective


def evaluate_folder(
    folder: Path, shards: Path | None, corpus: Path | None, split: str, step: str = ""
) -> dict[str, Any]:
    """The held-out loss of a run's checkpoint or of an HF folder, on shards or on a corpus.

    A corpus is tokenized with the model's own tokenizer. Raises UserError if the shards were made with another one.
    """
    device = best_device()
    is_run = (folder / "recipe.toml").is_file()
    opened: Any = load_run(folder, step) if is_run else load_hf(folder, device)
    tokenizer = folder / "tokenizer" if is_run else folder
    with tempfile.TemporaryDirectory() as temporary:
        if shards is None:
            assert corpus is not None
            shards = Path(temporary) / "shards"
            make_shards(corpus, tokenizer, shards, workers=1, splits=(split,))
        for name in ("vocab.json", "merges.txt"):
            if sha256(shards / "tokenizer" / name) != sha256(tokenizer / name):
                raise UserError(f"{shards}: made with another tokenizer than {folder}'s ({name} differs)")
        manifest = read_manifest(shards, "shards")
        verify_files(shards, manifest)
        if is_run:
            recipe, checkpoint, _ = opened
            objective = make_objective(recipe.with_shards(shards))
            model: SummedLoss = load_model(checkpoint, objective, device)
            held_out = objective.held_out(split)
        else:
            model = hf_likelihood(opened)
            held_out = held_out_blocks(shards, manifest, split, opened.config.max_position_embeddings)
        return held_out_loss(model, held_out, 4, device)


def generate(folder: Path, prompt: str, max_new_tokens: int, sample: bool, seed: int) -> str:
    """Continue a prompt with transformers' own generation. The result includes the prompt.

    sample: draw tokens at random, from this seed, instead of taking the likeliest. Raises UserError if the folder has
    no tokenizer or the prompt fills the model's context.
    """
    from transformers import AutoTokenizer

    device = best_device()
    model = load_hf(folder, device)
    for name in TOKENIZER_FILES[:2]:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; the folder has no tokenizer")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    encoded = tokenizer(prompt, return_tensors="pt").to(device)
    length, limit = encoded["input_ids"].shape[1], model.config.max_position_embeddings
    if length >= limit:
        raise UserError(f"the prompt has {length} tokens; the model holds {limit}")
    output = model.generate(**encoded, max_new_tokens=min(max_new_tokens, limit - length), do_sample=sample)
    return tokenizer.decode(output[0], skip_special_tokens=True)
