"""Classification heads on the decoder, with the names, logits and losses of transformers' classes.

Padding may be on either side. Padding on the right needs no mask, because attention is causal. With an
`attention_mask`, positions count from the first token of the text, so that logits do not depend on padding.
transformers 5 does the same for padding on the right; for padding on the left it needs `position_ids` that start at the
first token. `model/hf.py` maps the weights.

Letters in tensor names: B batch, T positions, H hidden size, C classes.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ClassifierConfig
from model.decoder import Decoder
from model.hf import hf_config
from model.loss import IGNORE_INDEX


class Classifier(Decoder):
    """A decoder with a classification head in the place of the language model's."""

    hf_name: ClassVar[str]
    """Its class in transformers."""
    config: ClassifierConfig

    def logits(self, hidden_BTH: Tensor, input_ids_BT: Tensor) -> Tensor:
        """The head's outputs, in fp32."""
        raise NotImplementedError

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (a head has labels, and gives logits too)
        self,
        input_ids_BT: Tensor,
        labels: Tensor | None = None,
        attention_mask_BT: Tensor | None = None,
        *,
        step: int = 0,
        micro_step: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits in fp32, (B, T, C) or (B, C).

        With labels the summed loss in nats, a scalar in fp32; in evaluation, the loss and the logits. labels: int64
        classes, (B, T) or (B,); for several classes of a text (B, C) of 0 and 1. Labels of -100 do not count.
        """
        segments_BT = None if attention_mask_BT is None else attention_mask_BT.long()
        hidden_BTH = self.hidden(input_ids_BT, segments_BT, step=step, micro_step=micro_step)
        logits = self.logits(hidden_BTH, input_ids_BT)
        if labels is None:
            return logits
        loss = classification_loss(logits, labels, self.config.problem)
        return loss if self.training else (loss, logits)

    def hf_config(self) -> dict[str, Any]:
        """As `Architecture.hf_config`, with the names of the classes."""
        problem = {"single": "single_label_classification", "multiple": "multi_label_classification"}
        return {
            **hf_config(self.config),
            "architectures": [self.hf_name],
            "id2label": {str(index): label for index, label in enumerate(self.config.labels)},
            "label2id": {label: index for index, label in enumerate(self.config.labels)},
            "problem_type": problem.get(self.config.problem),
        }


def classification_loss(logits: Tensor, labels: Tensor, problem: str) -> Tensor:
    """The summed loss of logits (..., C): cross entropy, or binary cross entropy of each class for several classes."""
    if problem == "multiple":
        counts = labels != IGNORE_INDEX
        return F.binary_cross_entropy_with_logits(logits[counts], labels[counts].float(), reduction="sum")
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


class TokenClassifier(Classifier):
    """A class for each token: dropout and a linear layer."""

    hf_name = "BioGptForTokenClassification"

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, len(config.labels))
        _initialize(self.classifier)

    def logits(self, hidden_BTH: Tensor, input_ids_BT: Tensor) -> Tensor:
        """(B, T, C)."""
        return self.classifier(self.dropout(hidden_BTH)).float()


class SequenceClassifier(Classifier):
    """Classes of a text, read at its last token before padding."""

    hf_name = "BioGptForSequenceClassification"

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, len(config.labels), bias=False)
        _initialize(self.score)

    def logits(self, hidden_BTH: Tensor, input_ids_BT: Tensor) -> Tensor:
        """(B, C)."""
        index_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
        last_B = torch.where(input_ids_BT != self.config.pad_token_id, index_T, 0).amax(1)
        return self.score(hidden_BTH[torch.arange(len(last_B), device=last_B.device), last_B]).float()


@torch.no_grad()
def _initialize(head: nn.Linear) -> None:
    head.weight.normal_(0.0, 0.02)  # transformers' initializer_range
    if head.bias is not None:
        head.bias.zero_()
