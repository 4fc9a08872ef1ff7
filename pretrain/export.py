"""Run -> HF folder: fp32 master weights, tokenizer, model card; verified with transformers before it appears."""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.common.files import (
    MANIFEST,
    UserError,
    make_folder,
    read_json,
    read_manifest,
    sha256,
    verify_files,
    write_json,
)
from data.shards.blocks import IGNORED, TokenStream, held_out_batch
from data.shards.build import make_shards
from data.text.tokenizer import TOKENIZER_FILES, tokenizer_files
from model.attention import segment_mask, segment_positions
from model.config import DecoderConfig
from model.decoder import Decoder, documents
from model.hf import hf_config, to_hf
from pretrain.checkpoint import newest_checkpoint, read_state, read_tensors
from pretrain.evaluate import PROBE_BLOCKS, NegativeLogLikelihood, held_out_loss
from pretrain.recipe import Recipe, load_recipe
from pretrain.weights import WEIGHT_FILES

LOSS_BOUND = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""How far the export's held-out loss, in fp32, may be from the run's, in its own precision, in nats a token."""
LOGITS_BOUND = 1e-4


def load_run(run: Path) -> tuple[Recipe, Path, dict[str, Any]]:
    """Recipe, newest checkpoint (verified) and its state. UserError where the folder is no run or has none."""
    if not (run / "recipe.toml").is_file():
        raise UserError(f"{run}: not a run folder (no recipe.toml)")
    checkpoint, faults = newest_checkpoint(run)
    for fault in faults:
        print(f"biogpt: warning: {fault}; taking an older checkpoint", file=sys.stderr)
    if checkpoint is None:
        raise UserError(f"{run}: has no checkpoint yet")
    return load_recipe(str(run / "recipe.toml")), checkpoint, read_state(checkpoint)


def load_decoder(checkpoint: Path, state: dict[str, Any], device: torch.device) -> Decoder:
    """The decoder of a checkpoint, in fp32, for evaluation."""
    decoder = Decoder(DecoderConfig(**state["model"]))
    decoder.load_state_dict(read_tensors(checkpoint, "model"))
    return decoder.to(device).eval()


def best_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_split(shards: Path, split: str) -> TokenStream:
    """The tokens of one split of a shards folder, verified."""
    manifest = read_manifest(shards, "shards")
    verify_files(shards, manifest)
    stream = TokenStream(shards, manifest, split)
    if not len(stream):
        raise UserError(f"{shards}: its {split} split is empty")
    return stream


def export(run: Path, out: Path, shards: Path | None = None) -> dict[str, Any]:
    """Write the newest checkpoint of `run` as the HF folder `out`. Returns its manifest.

    shards: where the run's shards are now, if they have moved. The folder appears only after transformers has loaded
    it and found the held-out loss that the run recorded and our decoder's logits; otherwise RuntimeError.
    """
    recipe, checkpoint, state = load_run(run)
    shards = shards or Path(recipe.data.shards)
    if sha256(shards / "manifest.json") != state["data"]["shards"]:
        raise UserError(f"{shards}: not the shards that {run} was trained on; name them with --shards")
    stream = open_split(shards, "validation")
    decoder = load_decoder(checkpoint, state, best_device())

    def fill(folder: Path) -> dict[str, Any]:
        write_hf_files(folder, decoder, run / "tokenizer")
        checks = verify(folder, decoder, recipe, state, stream)
        counts = {"step": state["step"], "parameters": decoder.config.parameter_count(), **checks}
        card = model_card(run, state, counts, recipe, read_manifest(shards, "shards"), unused_ids(folder))
        (folder / "README.md").write_text(card, encoding="utf-8")
        return counts

    request = {"checkpoint": read_manifest(checkpoint, "checkpoint")["files"]["model.safetensors"]["sha256"]}
    return make_folder(out, "hf", request, fill)


def write_hf_files(folder: Path, decoder: Decoder, tokenizer: Path) -> None:
    """config.json, generation_config.json, model.safetensors and the tokenizer's files."""
    config = decoder.config
    write_json(folder / "config.json", hf_config(config))
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2})
    weights = {
        name: tensor.cpu().contiguous() for name, tensor in to_hf(decoder.state_dict(), config.vocab_size).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only
    for name in tokenizer_files(tokenizer):
        shutil.copyfile(tokenizer / name, folder / name)
    tokenizer_config = read_json(tokenizer / "tokenizer_config.json")
    write_json(
        folder / "tokenizer_config.json", tokenizer_config | {"model_max_length": config.max_position_embeddings}
    )


def load_hf(folder: Path, device: torch.device) -> Any:
    """transformers' model of an HF folder, in fp32, for evaluation."""
    from transformers import BioGptForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights
    if (folder / MANIFEST).is_file():  # a folder from elsewhere has none
        verify_files(folder, read_manifest(folder, "hf"))
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("model_type") != "biogpt":
        raise UserError(f"{folder}: its config.json is not a BioGPT's")
    if not any((folder / name).exists() for name in WEIGHT_FILES):
        raise UserError(f"{folder}: has no weights ({' or '.join(WEIGHT_FILES)})")
    return BioGptForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()  # type: ignore[arg-type]


def hf_logits(model: Any, inputs: Tensor) -> Tensor:
    """Logits of transformers' model for blocks of packed documents, which end at their boundaries where ours do."""
    if getattr(model.config, "boundaries", "none") == "none":
        return model(inputs).logits
    segments = documents(inputs)
    return model(inputs, attention_mask=segment_mask(segments), position_ids=segment_positions(segments)).logits


def hf_likelihood(model: Any) -> NegativeLogLikelihood:
    """The summed negative log-likelihood of transformers' model, in nats."""

    def nll(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = hf_logits(model, inputs)
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    return nll


@torch.no_grad()
def verify(
    folder: Path, decoder: Decoder, recipe: Recipe, state: dict[str, Any], stream: TokenStream
) -> dict[str, Any]:
    """Load the folder with transformers and compare; RuntimeError where it is not the model that was trained."""
    device = next(decoder.parameters()).device
    model = load_hf(folder, device)
    context_length = recipe.context_length()
    inputs, _ = held_out_batch(stream, context_length, range(2))
    difference = float((hf_logits(model, inputs.to(device)) - decoder(inputs.to(device))).abs().max())
    if not difference <= LOGITS_BOUND:
        raise RuntimeError(f"export: transformers' logits differ from the decoder's by {difference:.2e}")
    recorded, max_blocks = state["probe"]["loss"], PROBE_BLOCKS  # a run stopped in between has no full evaluation
    if state["held_out"].get("step") == state["step"]:
        recorded, max_blocks = state["held_out"]["loss"], recipe.evaluate.max_blocks
    batch_size = min(recipe.train.micro_batch_size, 8)
    found = held_out_loss(hf_likelihood(model), stream, context_length, batch_size, device, max_blocks)
    bound = LOSS_BOUND[state["probe"]["precision"]]
    if not abs(found["loss"] - recorded) <= bound:
        raise RuntimeError(
            f"export: transformers' held-out loss is {found['loss']:.6f}, the run recorded {recorded:.6f} at step"
            f" {state['step']}; they may differ by {bound}"
        )
    return {"recorded_loss": recorded, "held_out": found, "largest_logit_difference": difference}


def unused_ids(folder: Path) -> int:
    """How many tokens `tokenizer.json` has behind the vocabulary: those that its merges need and no text gives."""
    if not (folder / "tokenizer.json").is_file():
        return 0
    return len(read_json(folder / "tokenizer.json")["model"]["vocab"]) - len(read_json(folder / "vocab.json"))


def model_card(
    run: Path, state: dict[str, Any], counts: dict[str, Any], recipe: Recipe, shards: dict[str, Any], unused: int
) -> str:
    """README.md of the exported folder: data, recipe, losses. unused: see `unused_ids`."""
    data, held_out = shards["counts"], counts["held_out"]
    no_paths = {"data": True, "train": {"run"}, "model": {"weights"}, "deepspeed": {"config"}}
    settings = json.dumps(recipe.model_dump(exclude=no_paths), indent=2)
    origin = "trained on from given weights" if recipe.model.weights else "pretrained from scratch"
    longer = f" `len(tokenizer)` is {unused} above the model's vocabulary; those ids never come out." if unused else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
language: en
tags: [biogpt, biomedical, pretraining]
---
# {run.resolve().name}

A BioGPT-shaped causal language model of {counts["parameters"]:,} parameters, {origin} with
biogpt-pretrain on titles and abstracts in PubMed's format.

| | |
|---|---|
| training documents, tokens | {data["train"]["documents"]:,}, {data["train"]["tokens"]:,} |
| optimizer steps, tokens a step | {state["step"]:,}, {recipe.train.global_batch_tokens:,} |
| held-out loss by transformers, nats a token | {held_out["loss"]:.4f} (perplexity {held_out["perplexity"]:.2f}) |
| held-out bits per byte; tokens evaluated | {held_out["bits_per_byte"]:.4f}; {held_out["tokens"]:,} |
| the same loss as the run recorded it | {counts["recorded_loss"]:.4f} |

A text begins with `</s>`, which the tokenizer puts in front. A literal `</s>`, `<pad>` or `<unk>` inside a text was
text in training; transformers' tokenizer reads it as the special token.{longer}

```json
{settings}
```
"""


def generate(folder: Path, prompt: str, max_new_tokens: int, sample: bool, seed: int) -> str:
    """Continue a prompt with transformers' own generation. The result includes the prompt."""
    from transformers import AutoTokenizer

    device = best_device()
    model = load_hf(folder, device)
    for name in TOKENIZER_FILES[:2]:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; the folder has no tokenizer")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    encoded = tokenizer(prompt, return_tensors="pt").to(device)
    room = model.config.max_position_embeddings - encoded["input_ids"].shape[1]
    if room < 1:
        raise UserError(
            f"the prompt has {encoded['input_ids'].shape[1]} tokens; the model holds"
            f" {model.config.max_position_embeddings}"
        )
    output = model.generate(**encoded, max_new_tokens=min(max_new_tokens, room), do_sample=sample)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def evaluate_folder(folder: Path, shards: Path | None, corpus: Path | None, split: str) -> dict[str, Any]:
    """Held-out loss of a run's newest checkpoint or of an HF folder, on shards or on a corpus it tokenizes itself.

    Raises UserError where the shards were made with another tokenizer than the model's.
    """
    device = best_device()
    if (folder / "recipe.toml").is_file():
        recipe, checkpoint, state = load_run(folder)
        tokenizer, context_length = folder / "tokenizer", recipe.context_length()
        likelihood: NegativeLogLikelihood = load_decoder(checkpoint, state, device)
    else:
        model = load_hf(folder, device)
        tokenizer, context_length = folder, model.config.max_position_embeddings
        likelihood = hf_likelihood(model)
    with tempfile.TemporaryDirectory() as temporary:
        if shards is None:
            assert corpus is not None
            shards = Path(temporary) / "shards"
            make_shards(corpus, tokenizer, shards, workers=1, splits=(split,))
        for name in ("vocab.json", "merges.txt"):
            if sha256(shards / "tokenizer" / name) != sha256(tokenizer / name):
                raise UserError(f"{shards}: made with another tokenizer than {folder}'s ({name} differs)")
        return held_out_loss(likelihood, open_split(shards, split), context_length, 4, device)
