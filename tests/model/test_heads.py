"""Classification against transformers' classes with the same weights: logits, losses, padding on either side."""

from typing import Any

import pytest
import torch
from transformers import BioGptConfig, BioGptForSequenceClassification, BioGptForTokenClassification

from model.heads import SequenceClassifier, TokenClassifier
from model.hf import hf_config, to_hf, weights_from_hf
from tests.model.shapes import small_config

LABELS = 4


def pair(ours: Any, theirs: Any, labels: int = LABELS) -> tuple[Any, Any]:
    """Our classifier and transformers' with its weights, all of them random."""
    torch.manual_seed(1)
    classifier = ours(small_config(), labels)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    settings: dict[str, Any] = hf_config(classifier.config) | {"num_labels": labels}
    twin = theirs(BioGptConfig(**settings))
    twin.load_state_dict(to_hf(classifier.state_dict(), 101))
    return classifier.eval(), twin.eval()


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three texts of 20, 13 and 5 tokens: ids, attention mask, positions that count from the first token."""
    torch.manual_seed(2)
    ids, mask = torch.ones(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate((20, 13, 5)):
        where = slice(0, length) if side == "right" else slice(20 - length, 20)
        ids[row, where] = torch.randint(4, 101, (length,))
        mask[row, where] = 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_token_classes_and_their_loss_are_transformers_own(side: str) -> None:
    classifier, twin = pair(TokenClassifier, BioGptForTokenClassification)
    ids, mask, positions = padded(side)
    labels = torch.randint(0, LABELS, ids.shape)
    labels[0, 10] = -100
    logits, loss = classifier(ids, mask, labels)
    expected = twin(ids, attention_mask=mask, position_ids=positions, labels=labels)
    assert torch.allclose(logits[mask == 1], expected.logits[mask == 1], atol=1e-5, rtol=0)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    assert classifier(ids, mask)[1] is None


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["one class", "several", "number"])
def test_sequence_classes_and_their_loss_are_transformers_own(kind: str, side: str) -> None:
    count = 1 if kind == "number" else LABELS
    classifier, twin = pair(SequenceClassifier, BioGptForSequenceClassification, count)
    ids, mask, positions = padded(side)
    labels = {
        "one class": torch.tensor([2, 0, 3]),
        "several": torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 0]]),
        "number": torch.tensor([0.3, -2.0, 1.5]),
    }[kind]
    logits, loss = classifier(ids, mask, labels)
    expected = twin(ids, attention_mask=mask, position_ids=positions, labels=labels)
    assert logits.shape == (3, count) and torch.allclose(logits, expected.logits, atol=1e-5, rtol=0)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)


def test_the_answer_does_not_depend_on_padding() -> None:
    """The same texts, padded on the left, on the right, and each alone."""
    classifier, _ = pair(SequenceClassifier, BioGptForSequenceClassification)
    left, right = (classifier(*padded(side)[:2])[0] for side in ("left", "right"))
    ids, mask, _ = padded("right")
    alone = torch.cat([classifier(ids[row : row + 1, : int(mask[row].sum())])[0] for row in range(3)])
    assert torch.allclose(left, alone, atol=1e-5, rtol=0) and torch.allclose(right, alone, atol=1e-5, rtol=0)
    without_mask, _ = classifier(ids)  # on the right none is needed: attention is causal
    assert torch.allclose(without_mask, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(TokenClassifier, BioGptForTokenClassification), (SequenceClassifier, BioGptForSequenceClassification)],
)
def test_weights_come_back_from_transformers(ours: Any, theirs: Any) -> None:
    classifier, twin = pair(ours, theirs)
    other = ours(small_config(), LABELS)
    other.load_state_dict(weights_from_hf(twin.state_dict()))
    ids, mask, _ = padded("right")
    assert torch.equal(other.eval()(ids, mask)[0], classifier(ids, mask)[0])


def test_a_pretrained_decoder_gets_a_new_head() -> None:
    """The head's weights are all that a language model lacks, drawn as transformers draws them."""
    classifier, _ = pair(TokenClassifier, BioGptForTokenClassification)
    backbone = {name: tensor for name, tensor in classifier.state_dict().items() if "classifier" not in name}
    fresh = TokenClassifier(small_config(hidden_dropout_prob=0.4), 50, classifier_dropout=0.2)
    missing, unexpected = fresh.load_state_dict(backbone, strict=False)
    assert missing == ["classifier.weight", "classifier.bias"] and not unexpected
    assert fresh.classifier.weight.std().item() == pytest.approx(0.02, rel=0.1) and not fresh.classifier.bias.any()
    assert fresh.dropout.p == 0.2 and TokenClassifier(small_config(hidden_dropout_prob=0.4), 2).dropout.p == 0.4
