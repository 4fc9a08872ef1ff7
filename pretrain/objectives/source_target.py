"""Predict the target of each record, and its end, from the source: an encoder and a decoder."""

import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from data.common.files import UserError
from data.shards.records import Encoded, Record, Records, encode_texts
from data.text.ids import EOS_ID
from model.architecture import Architecture
from model.config import EncoderDecoderConfig
from model.encoder_decoder import EncoderDecoder
from pretrain.held_out import Batch
from pretrain.hf_folder import SEQUENCE_TO_SEQUENCE, hf_likelihood, hf_target_logits, load_hf
from pretrain.objectives.objective import Exported
from pretrain.objectives.records import RecordObjective


class SourceTarget(RecordObjective):
    """Records of a "source" and a "target". Only the tokens of the target and the `</s>` after it count in the loss.

    The encoder reads `</s>` and the source, as the tokenizer of an exported folder writes any text. The decoder reads
    `</s>` and the target.
    """

    keys: ClassVar[dict[str, type]] = {"source": str, "target": str}

    def encode(self, records: list[Record]) -> list[Encoded]:
        """As `RecordObjective.encode`. Of a source that is too long, the end is left out."""
        sources = self.sources(records)
        targets = encode_texts(self.tokenizer, [record.fields["target"] for record in records])
        length, encoded = self._recipe.context_length(), []
        for record, source, target in zip(records, sources, targets, strict=True):
            if len(target) >= length:
                raise UserError(
                    f"{record.place}: the target has {len(target)} tokens, too many for train.context_length ="
                    f" {length}; shorten it"
                )
            labels = np.concatenate([target, [EOS_ID]])
            encoded.append(Encoded(source[:length], labels, cut=length < len(source)))
        return encoded

    def sources(self, records: list[Record]) -> list[np.ndarray]:
        """What the encoder reads of each record, of any length."""
        ids = encode_texts(self.tokenizer, [record.fields["source"] for record in records])
        return [np.concatenate([[EOS_ID], each]) for each in ids]

    def sizes(self, records: Records) -> np.ndarray:
        """As `RecordObjective.sizes`: the tokens of the sources and of the targets."""
        return records.tokens + records.counted

    def figures(self, loss: float) -> dict[str, float]:
        """The perplexity of a target's token."""
        return {"perplexity": math.exp(min(loss, 700.0))}

    def kind_in_words(self) -> str:
        """As `RecordObjective.kind_in_words`."""
        return "sequence-to-sequence model"

    def build_model(self) -> EncoderDecoder:
        """As `Objective.build_model`. The weights are a function of the seed, until the given ones are loaded."""
        assert isinstance(self.config, EncoderDecoderConfig)
        torch.manual_seed(self._recipe.train.seed)
        return EncoderDecoder(self.config)

    def outputs(self, model: Architecture, batch: Batch) -> Tensor:
        """The logits of the targets, (B, T, V)."""
        assert isinstance(model, EncoderDecoder)
        source_ids_BS, labels_BT = batch
        return model.logits(source_ids_BS, model.shifted_right(labels_BT))

    def load_exported(self, folder: Path, device: torch.device) -> Exported:
        """As `Objective.load_exported`."""
        model = load_hf(folder, device, SEQUENCE_TO_SEQUENCE)
        return Exported(
            lambda source, labels: hf_target_logits(model, source, labels),
            hf_likelihood(model, hf_target_logits),
            model,
        )
