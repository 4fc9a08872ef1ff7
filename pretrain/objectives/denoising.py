"""Write packed blocks again whose words are masked in spans: pretraining of an encoder and a decoder, as BART's."""

import numpy as np

from data.shards.noise import infill
from data.text.ids import EOS_ID
from data.text.reserved import MASK
from pretrain.objectives.encoder_decoder import TrainsEncoderDecoder
from pretrain.objectives.noised_blocks import NoisedBlocks


class Denoising(TrainsEncoderDecoder, NoisedBlocks):
    """The encoder reads a block in which spans are masks, the decoder predicts every token of the block.

    The source is `</s>` and the block, the labels are the block and `</s>`, as for a record of `SourceTarget`. So the
    last token of a block gives way to `</s>`, which it mostly is not: a block cuts its last document.
    """

    reserved = MASK + 1

    def settings(self) -> dict[str, float]:
        """As `NoisedBlocks.settings`."""
        objective = self._recipe.objective
        return {"mask_share": objective.mask_share, "span_length": objective.span_length}

    def noised(
        self, inputs: np.ndarray, targets: np.ndarray, draws: np.random.RandomState, held_out: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `NoisedBlocks.noised`: the ids of the source and the labels."""
        text, objective = targets[:-1], self._recipe.objective
        mask_id = self._reserved_ids[MASK]
        source = infill(text, self._word_ends, mask_id, objective.mask_share, objective.span_length, draws)
        return np.concatenate([[EOS_ID], source]), np.concatenate([text, [EOS_ID]])

    def describe(self) -> tuple[str, dict[str, str]]:
        """As `Objective.describe`."""
        _, figures = super().describe()
        objective = self._recipe.objective
        masked = f"{objective.mask_share:.0%}, in spans of {objective.span_length:g} words on average"
        return "sequence-to-sequence model", {**figures, "words masked in the source, a span as `<reserved_0>`": masked}
