"""Predict the target of each record, and its end, from the source: an encoder and a decoder."""

import math
from typing import ClassVar

import numpy as np

from data.common.files import UserError
from data.shards.records import PIECES, Encoded, Keys, Record, Records, encode_pieces
from data.text.ids import EOS_ID
from pretrain.objectives.encoder_decoder import TrainsEncoderDecoder
from pretrain.objectives.records import RecordObjective


class SourceTarget(TrainsEncoderDecoder, RecordObjective):
    """Records of a "source" and a "target", each a text or a list of texts and reserved numbers.

    Only the tokens of the target and the `</s>` after it count in the loss. The encoder reads `</s>` and the source, as
    the tokenizer of an exported folder writes any text. The decoder reads `</s>` and the target.
    """

    keys: ClassVar[Keys] = {"source": PIECES, "target": PIECES}

    def encode(self, records: list[Record]) -> list[Encoded]:
        """As `RecordObjective.encode`. Of a source that is too long, the end is left out."""
        sources, targets = self.sources(records), encode_pieces(self.tokenizer, records, "target")
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
        return [np.concatenate([[EOS_ID], ids]) for ids in encode_pieces(self.tokenizer, records, "source")]

    def sizes(self, records: Records) -> np.ndarray:
        """As `RecordObjective.sizes`: the tokens of the sources and of the targets."""
        return records.tokens + records.counted

    def figures(self, loss: float) -> dict[str, float]:
        """The perplexity of a target's token."""
        return {"perplexity": math.exp(min(loss, 700.0))}

    def kind_in_words(self) -> str:
        """As `RecordObjective.kind_in_words`."""
        return "sequence-to-sequence model"
