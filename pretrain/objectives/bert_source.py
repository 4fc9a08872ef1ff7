"""Predict the target of each record from the source, which an encoder like BERT's reads by its own tokenizer."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data.common.files import UserError, sha256
from data.shards.records import PIECES, Keys, Record
from model.architecture import Architecture
from model.bert_generation import BertEncoderDecoder
from model.config import EncoderDecoderConfig
from model.loss import IGNORE_INDEX
from pretrain.encoder_folder import encode_sources, load_encoder, tokenizer_files, with_encoder
from pretrain.held_out import Batch
from pretrain.hf_folder import WITH_BERT, hf_likelihood, hf_target_logits, load_hf
from pretrain.objectives.objective import Exported
from pretrain.objectives.source_target import SourceTarget
from pretrain.recipe import Recipe


class BertSource(SourceTarget):
    """As `SourceTarget`, with the encoder, and the source's tokenizer, of the folder `model.encoder`.

    The encoder reads the source without special tokens.
    """

    keys: ClassVar[Keys] = {"source": str, "target": PIECES}

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        given, own = Path(recipe.model.encoder or ""), Path(recipe.train.run) / "encoder"
        self.encoder = self._encoder = own if own.is_dir() and not given.is_dir() else given
        assert isinstance(self.config, EncoderDecoderConfig)
        self._shape = self.config = with_encoder(self.config, self._encoder)
        self.pad_id, limit = self._shape.source_pad_token_id, self._shape.encoder["max_position_embeddings"]
        if recipe.context_length() > limit:
            raise UserError(
                f"train.context_length = {recipe.context_length()}: longer than the max_position_embeddings {limit} of"
                f" model.encoder = {self.encoder}; choose at most that"
            )

    def sources(self, records: list[Record]) -> list[np.ndarray]:
        """As `SourceTarget.sources`. Raises UserError if a source has no token."""
        texts = [record.fields["source"] for record in records]
        found = encode_sources(self._encoder, texts, self._shape.encoder["vocab_size"])
        for record, ids in zip(records, found, strict=True):
            if not len(ids):
                raise UserError(f"{record.place}: the source has no token by the tokenizer of {self._encoder}")
        return found

    def identity(self) -> dict[str, Any]:
        """As `Objective.identity`, with the tokenizer of the source."""
        of_source = {name: sha256(self._encoder / name) for name in tokenizer_files(self._encoder)}
        return super().identity() | {"source_tokenizer": of_source}

    def build_model(self) -> BertEncoderDecoder:
        """As `Objective.build_model`."""
        torch.manual_seed(self._recipe.train.seed)
        return BertEncoderDecoder(self._shape)

    def outputs(self, model: Architecture, batch: Batch) -> Tensor:
        """As `SourceTarget.outputs`, where a target counts."""
        return _where_counted(super().outputs(model, batch), batch[1])

    def load_exported(self, folder: Path, device: torch.device) -> Exported:
        """As `Objective.load_exported`."""
        model = load_hf(folder, device, WITH_BERT)
        return Exported(
            lambda source, labels: _where_counted(hf_target_logits(model, source, labels), labels),
            hf_likelihood(model, hf_target_logits),
            model,
        )

    def load_encoder(self, model: Architecture) -> None:
        """As `Objective.load_encoder`."""
        assert isinstance(model, BertEncoderDecoder)
        load_encoder(model.encoder, self._encoder)


def _where_counted(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Logits with 0 where no target counts: what the decoder reads there transformers masks, and nobody reads."""
    return logits_BTV.masked_fill((labels_BT == IGNORE_INDEX)[:, :, None], 0.0)
