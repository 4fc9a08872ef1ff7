"""Classification heads on the decoder, with the names and logits of transformers' classes.

Padding may be on either side. The `attention_mask` marks the text, and positions count from its first token, so that
logits do not depend on padding. transformers 5 does the same for padding on the right; for padding on the left it needs
`position_ids` that start at the first token. `model/hf.py` maps the weights.

Letters in tensor names: B batch, T positions, H hidden size, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import DecoderConfig
from model.decoder import Decoder
from model.loss import IGNORE_INDEX


class _Classifier(Decoder):
    def hidden_of_text(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None) -> Tensor:
        """Hidden states of padded texts, (B, T, H)."""
        return self.hidden(input_ids_BT, None if attention_mask_BT is None else attention_mask_BT.long())


class TokenClassifier(_Classifier):
    """A class for each token: dropout and a linear layer (transformers.BioGptForTokenClassification)."""

    def __init__(self, config: DecoderConfig, num_labels: int, classifier_dropout: float | None = None) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if classifier_dropout is None else classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        _initialize(self.classifier)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (a head takes labels, and gives logits too)
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None, labels_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, C). With labels (B, T), also their mean cross entropy over text; -100 does not count."""
        logits_BTC = self.classifier(self.dropout(self.hidden_of_text(input_ids_BT, attention_mask_BT)))
        if labels_BT is None:
            return logits_BTC, None
        if attention_mask_BT is not None:
            labels_BT = labels_BT.masked_fill(attention_mask_BT == 0, IGNORE_INDEX)
        return logits_BTC, F.cross_entropy(logits_BTC.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE_INDEX)


class SequenceClassifier(_Classifier):
    """Classes of a text, read at its last token before padding (transformers.BioGptForSequenceClassification)."""

    def __init__(self, config: DecoderConfig, num_labels: int) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, num_labels, bias=False)
        _initialize(self.score)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (a head takes labels, and gives logits too)
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, C). With labels, also their mean loss.

        labels: (B,) integers if each text has one class (cross entropy), (B, C) floats if it may have several (binary
        cross entropy), (B,) floats if C is 1 (mean squared error).
        """
        hidden_BTH = self.hidden_of_text(input_ids_BT, attention_mask_BT)
        index_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
        last_B = torch.where(input_ids_BT != self.config.pad_token_id, index_T, 0).amax(1)
        logits_BC = self.score(hidden_BTH[torch.arange(len(last_B), device=last_B.device), last_B])
        if labels is None:
            return logits_BC, None
        if logits_BC.shape[1] == 1:
            return logits_BC, F.mse_loss(logits_BC.flatten(), labels.flatten())
        if labels.is_floating_point():
            return logits_BC, F.binary_cross_entropy_with_logits(logits_BC, labels)
        return logits_BC, F.cross_entropy(logits_BC, labels)


@torch.no_grad()
def _initialize(head: nn.Linear) -> None:
    head.weight.normal_(0.0, 0.02)  # transformers' initializer_range
    if head.bias is not None:
        head.bias.zero_()
