"""An HF folder as transformers loads it: the model, its logits and its loss."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from data.common.files import MANIFEST, UserError, read_json, read_manifest, verify_files
from model.attention import segment_mask, segment_positions
from model.decoder import documents
from model.encoder_decoder import is_real
from model.loss import IGNORE_INDEX
from pretrain.held_out import SummedLoss
from pretrain.weights import WEIGHT_FILES

CAUSAL = "BioGptForCausalLM"
SEQUENCE_TO_SEQUENCE = "BlenderbotForConditionalGeneration"
WITH_BERT = "EncoderDecoderModel"
"""transformers' classes of our decoder, of our encoder and decoder, and of BERT's encoder and our decoder."""
KINDS = {SEQUENCE_TO_SEQUENCE: "blenderbot", WITH_BERT: "encoder-decoder"}
"""transformers' class -> its `model_type`, if that is not "biogpt"."""


def load_hf(folder: Path, device: torch.device, name: str = CAUSAL) -> Any:
    """transformers' model of a folder, of the class `name`, in fp32, for evaluation.

    Raises UserError as `check_hf` does.
    """
    check_hf(folder, KINDS.get(name, "biogpt"))
    return read_hf(folder, device, name)


def check_hf(folder: Path, *kinds: str) -> dict[str, Any]:
    """The content of a folder's `config.json`.

    Raises UserError if the folder is damaged, its model is not of one of these kinds or it has no weights.
    """
    _verify(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("model_type") not in kinds:
        named = {"biogpt": "BioGPT", "blenderbot": "Blenderbot", "encoder-decoder": "EncoderDecoderModel"}
        raise UserError(f"{folder}: its config.json is not a {' or '.join(named[kind] for kind in kinds)}'s")
    if not any((folder / name).exists() for name in WEIGHT_FILES):
        raise UserError(f"{folder}: has no weights ({' or '.join(WEIGHT_FILES)})")
    return config


def read_hf(folder: Path, device: torch.device, name: str = CAUSAL) -> Any:
    """As `load_hf`, for a folder that `check_hf` has checked."""
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).to(device).eval()


def load_causal_lm(folder: Path, device: torch.device) -> Any:
    """Any causal language model of transformers, from a local folder, in fp32, for evaluation.

    Code that comes with the model is not run. Raises UserError if the folder is damaged, is not a causal language
    model's or lacks weights.
    """
    model = load_language_model(folder, device)
    if model.config.is_encoder_decoder:
        raise UserError(f"{folder}: is an encoder and a decoder, not a causal language model")
    return model


def load_language_model(folder: Path, device: torch.device) -> Any:
    """As `load_causal_lm`, or an encoder-decoder if the folder holds one."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    _silence_transformers()
    _verify(folder)
    config, what = read_json(folder / "config.json"), "causal language model"
    kind: Any = AutoModelForCausalLM
    if isinstance(config, dict) and config.get("is_encoder_decoder"):
        kind, what = AutoModelForSeq2SeqLM, "encoder-decoder"
    try:
        model, report = kind.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: transformers loads no {what} from it ({_one_line(error)})") from None
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"{folder}: lacks weights of a {what} ({missing}); is it one for another task?")
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, fast if it can be. Raises UserError if there is none."""
    from transformers import AutoTokenizer

    _silence_transformers()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder}: AutoTokenizer finds no tokenizer.json or vocab.json that it can read ({_one_line(error)})"
        ) from None
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / name).is_file() for name in names):  # some kinds are then made without a vocabulary
        raise UserError(f"{folder}: has no tokenizer; expected {' or '.join(sorted(names))}")
    return tokenizer


def _verify(folder: Path) -> None:
    if (folder / MANIFEST).is_file():  # a folder from elsewhere has none
        verify_files(folder, read_manifest(folder, "hf"))


def _silence_transformers() -> None:
    """No progress of loading weights, and no reports: what matters of them is raised."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def hf_logits(model: Any, inputs_BT: Tensor) -> Tensor:
    """Logits (B, T, V) of transformers' model for packed blocks.

    If the model was trained inside documents, transformers gets their mask and positions.
    """
    if getattr(model.config, "boundaries", "none") == "none":
        return model(inputs_BT).logits
    segments_BT = documents(inputs_BT, model.config.eos_token_id)
    mask_B1TT, positions_BT = segment_mask(segments_BT), segment_positions(segments_BT)
    return model(inputs_BT, attention_mask=mask_B1TT, position_ids=positions_BT).logits


def hf_target_logits(model: Any, source_ids_BS: Tensor, labels_BT: Tensor) -> Tensor:
    """Logits (B, T, V) of transformers' encoder-decoder for these labels, which it shifts itself."""
    of_source = model.config.encoder if model.config.model_type == KINDS[WITH_BERT] else model.config
    real_BS = is_real(source_ids_BS, of_source.pad_token_id)
    with warnings.catch_warnings():  # EncoderDecoderModel warns of how its loss was computed before version 4.12
        warnings.simplefilter("ignore", FutureWarning)
        return model(source_ids_BS, attention_mask=real_BS.long(), labels=labels_BT).logits


def hf_likelihood(
    model: Any, logits: Callable[[Any, Tensor, Tensor], Tensor] = lambda model, inputs, _: hf_logits(model, inputs)
) -> SummedLoss:
    """A function of inputs and targets (B, T): the summed negative log-likelihood of transformers' model, in nats."""

    def negative_log_likelihood(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = logits(model, inputs_BT, targets_BT)
        return torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )

    return negative_log_likelihood
