"""Classification against transformers' classes with the same weights: logits, losses, padding on either side."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BioGptConfig, BioGptForSequenceClassification, BioGptForTokenClassification

from model.config import ClassifierConfig, Problem
from model.heads import Classifier, SequenceClassifier, TokenClassifier
from model.hf import to_hf, weights_from_hf
from tests.model.shapes import small_config

NAMES = ["O", "B-Drug", "I-Drug", "B-Gene"]


def classifier_config(problem: Problem, **changes: Any) -> ClassifierConfig:
    return ClassifierConfig(**asdict(small_config(**changes)), labels=NAMES, problem=problem)


def pair(problem: Problem) -> tuple[Any, Any]:
    """Our classifier and transformers' with its weights, all of them random."""
    torch.manual_seed(1)
    tokens = problem == "tokens"
    classifier = (TokenClassifier if tokens else SequenceClassifier)(classifier_config(problem))
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs = BioGptForTokenClassification if tokens else BioGptForSequenceClassification
    assert classifier.hf_config()["architectures"] == [theirs.__name__]
    twin = theirs(BioGptConfig(**classifier.hf_config()))
    twin.load_state_dict(to_hf(classifier.state_dict(), 101))
    return classifier.eval(), twin.eval()


def padded(side: str) -> tuple[Tensor, Tensor, Tensor]:
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
    classifier, twin = pair("tokens")
    ids, mask, positions = padded(side)
    labels = torch.randint(0, len(NAMES), ids.shape).masked_fill(mask == 0, -100)
    labels[0, 10] = -100
    loss, logits = classifier(ids, labels, mask)
    expected = twin(ids, attention_mask=mask, position_ids=positions, labels=labels)
    assert torch.allclose(logits[mask == 1], expected.logits[mask == 1], atol=1e-5, rtol=0)
    assert loss.item() / 37 == pytest.approx(expected.loss.item(), abs=1e-5)  # 20 + 13 + 5 tokens, one not counted
    assert torch.equal(classifier(ids, attention_mask_BT=mask), logits)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("problem", ["single", "multiple"])
def test_sequence_classes_and_their_loss_are_transformers_own(problem: Problem, side: str) -> None:
    classifier, twin = pair(problem)
    ids, mask, positions = padded(side)
    one, several = torch.tensor([2, 0, 3]), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 0]])
    labels, theirs, counted = (one, one, 3) if problem == "single" else (several, several.float(), 12)
    loss, logits = classifier(ids, labels, mask)
    expected = twin(ids, attention_mask=mask, position_ids=positions, labels=theirs)
    assert logits.shape == (3, 4) and torch.allclose(logits, expected.logits, atol=1e-5, rtol=0)
    assert loss.item() / counted == pytest.approx(expected.loss.item(), abs=1e-5)


@pytest.mark.parametrize("problem", ["single", "multiple"])
def test_a_text_without_labels_does_not_count(problem: Problem) -> None:
    """Batches are filled up with such rows."""
    classifier, _ = pair(problem)
    ids, _, _ = padded("right")
    labels = torch.tensor([1, 2, -100]) if problem == "single" else torch.tensor([[1, 0, 1, 0]] * 2 + [[-100] * 4])
    assert classifier(ids, labels)[0].item() == pytest.approx(classifier(ids[:2], labels[:2])[0].item(), rel=1e-6)


def test_the_answer_does_not_depend_on_padding() -> None:
    """The same texts, padded on the left, on the right, and each alone."""
    classifier, _ = pair("single")
    left, right = (
        classifier(ids, attention_mask_BT=mask) for ids, mask, _ in (padded(side) for side in ("left", "right"))
    )
    ids, mask, _ = padded("right")
    alone = torch.cat([classifier(ids[row : row + 1, : int(mask[row].sum())]) for row in range(3)])
    assert torch.allclose(left, alone, atol=1e-5, rtol=0) and torch.allclose(right, alone, atol=1e-5, rtol=0)
    assert torch.allclose(classifier(ids), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("problem", ["tokens", "single"])
def test_weights_come_back_from_transformers(problem: Problem) -> None:
    classifier, twin = pair(problem)
    other = type(classifier)(classifier.config)
    other.load_state_dict(weights_from_hf(twin.state_dict()))
    ids, _, _ = padded("right")
    assert torch.equal(other.eval()(ids), classifier(ids))
    assert sum(parameter.numel() for parameter in twin.parameters()) == classifier.config.parameter_count()


def test_fewer_positions_keep_the_head() -> None:
    classifier, _ = pair("tokens")
    ids, _, _ = padded("right")
    shorter = classifier.with_positions(20)
    assert isinstance(shorter, TokenClassifier) and shorter.config.max_position_embeddings == 20
    assert torch.equal(shorter(ids), classifier(ids))


def test_in_training_the_loss_comes_alone() -> None:
    """As the loop needs it; and layers are dropped by the draws of the step."""
    torch.manual_seed(1)
    classifier: Classifier = TokenClassifier(classifier_config("tokens", layerdrop=0.5)).train()
    ids, mask, _ = padded("right")
    losses: list[Any] = [classifier(ids, mask, step=step) for step in (0, 0, 1, 2, 3)]
    assert all(isinstance(loss, Tensor) and loss.dim() == 0 for loss in losses)
    assert losses[0].item() == losses[1].item() and len({loss.item() for loss in losses}) > 1


def test_the_head_is_drawn_as_transformers_draws_it() -> None:
    many = ClassifierConfig(
        **asdict(small_config(hidden_dropout_prob=0.4)), labels=[*map(str, range(50))], problem="tokens"
    )
    fresh = TokenClassifier(many)
    assert fresh.classifier.weight.std().item() == pytest.approx(0.02, rel=0.1) and not fresh.classifier.bias.any()
    assert fresh.dropout.p == 0.4
