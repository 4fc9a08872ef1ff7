"""Predict the target of each record, and its end, after the prompt: generative fine-tuning."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from data.common.files import UserError
from data.shards.records import Encoded, Keys, Record, encode_texts
from data.text.ids import EOS_ID
from model.architecture import Architecture
from model.decoder import Decoder
from model.loss import IGNORE_INDEX
from pretrain.held_out import Batch
from pretrain.hf_folder import hf_likelihood, hf_logits, load_hf
from pretrain.objectives.objective import Exported
from pretrain.objectives.records import RecordObjective


class PromptTarget(RecordObjective):
    """Records of a "prompt" and a "target". Only the tokens of the target and the `</s>` after it count in the loss.

    The model reads `</s>`, the prompt and the target. The tokenizer of an exported folder puts `</s>` before a text,
    so a prompt has the same ids at generation.
    """

    keys: ClassVar[Keys] = {"prompt": str, "target": str}

    def encode(self, records: list[Record]) -> list[Encoded]:
        """As `RecordObjective.encode`. Of a record that is too long, the beginning of the prompt is left out."""
        prompts = encode_texts(self.tokenizer, [record.fields["prompt"] for record in records])
        targets = encode_texts(self.tokenizer, [record.fields["target"] for record in records])
        length, encoded = self._recipe.context_length(), []
        for record, prompt, target in zip(records, prompts, targets, strict=True):
            room = length - 1 - len(target)  # for the prompt
            if room < 0:
                raise UserError(
                    f"{record.place}: the target has {len(target)} tokens, too many for train.context_length ="
                    f" {length}; shorten it"
                )
            kept = prompt[max(len(prompt) - room, 0) :]
            ids = np.concatenate([[EOS_ID], kept, target])
            labels = np.concatenate([np.full(len(kept), IGNORE_INDEX), target, [EOS_ID]])
            encoded.append(Encoded(ids, labels, cut=len(kept) < len(prompt)))
        return encoded

    def figures(self, loss: float) -> dict[str, float]:
        """None: the loss of a few chosen tokens says nothing about text."""
        return {}

    def kind_in_words(self) -> str:
        """As `RecordObjective.kind_in_words`."""
        return "causal language model"

    def build_model(self) -> Decoder:
        """As `Objective.build_model`. The weights are a function of the seed, until the given ones are loaded."""
        torch.manual_seed(self._recipe.train.seed)
        return Decoder(self.config)

    def outputs(self, model: Architecture, batch: Batch) -> Tensor:
        """The logits, (B, T, V)."""
        return model(batch[0])

    def load_exported(self, folder: Path, device: torch.device) -> Exported:
        """As `Objective.load_exported`."""
        model = load_hf(folder, device)
        return Exported(lambda ids, _: hf_logits(model, ids), hf_likelihood(model), model)
