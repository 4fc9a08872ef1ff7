"""An HF folder as transformers loads it: the model, its logits and its loss."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.common.files import MANIFEST, UserError, read_json, read_manifest, verify_files
from model.attention import segment_mask, segment_positions
from model.decoder import documents
from model.loss import IGNORE_INDEX
from pretrain.held_out import SummedLoss
from pretrain.weights import WEIGHT_FILES


def load_hf(folder: Path, device: torch.device) -> Any:
    """transformers' BioGptForCausalLM of a folder, in fp32, for evaluation. Raises UserError as `check_hf` does."""
    check_hf(folder)
    return read_hf(folder, device)


def check_hf(folder: Path) -> dict[str, Any]:
    """The content of a folder's `config.json`.

    Raises UserError if the folder is damaged, is not a BioGPT's or has no weights.
    """
    if (folder / MANIFEST).is_file():  # a folder from elsewhere has none
        verify_files(folder, read_manifest(folder, "hf"))
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("model_type") != "biogpt":
        raise UserError(f"{folder}: its config.json is not a BioGPT's")
    if not any((folder / name).exists() for name in WEIGHT_FILES):
        raise UserError(f"{folder}: has no weights ({' or '.join(WEIGHT_FILES)})")
    return config


def read_hf(folder: Path, device: torch.device) -> Any:
    """As `load_hf`, for a folder that `check_hf` has checked."""
    from transformers import BioGptForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights
    return BioGptForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()  # type: ignore[arg-type]


def hf_logits(model: Any, inputs_BT: Tensor) -> Tensor:
    """Logits (B, T, V) of transformers' model for packed blocks.

    If the model was trained inside documents, transformers gets their mask and positions.
    """
    if getattr(model.config, "boundaries", "none") == "none":
        return model(inputs_BT).logits
    segments_BT = documents(inputs_BT, model.config.eos_token_id)
    mask_B1TT, positions_BT = segment_mask(segments_BT), segment_positions(segments_BT)
    return model(inputs_BT, attention_mask=mask_B1TT, position_ids=positions_BT).logits


def hf_likelihood(model: Any) -> SummedLoss:
    """A function of inputs and targets (B, T): the summed negative log-likelihood of transformers' model, in nats."""

    def negative_log_likelihood(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = hf_logits(model, inputs_BT)
        return torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )

    return negative_log_likelihood
