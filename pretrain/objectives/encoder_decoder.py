"""What the objectives share that train an encoder and a decoder: the model, its logits and its export."""

from pathlib import Path

import torch
from torch import Tensor

from model.architecture import Architecture
from model.config import EncoderDecoderConfig
from model.encoder_decoder import EncoderDecoder
from pretrain.held_out import Batch
from pretrain.hf_folder import SEQUENCE_TO_SEQUENCE, hf_likelihood, hf_target_logits, load_hf
from pretrain.objectives.objective import Exported, Objective
from pretrain.recipe import Recipe


class TrainsEncoderDecoder(Objective):
    """Its batches are ids of sources (B, S) and labels (B, T), as `EncoderDecoder` takes them."""

    _recipe: Recipe

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
