"""pretrain/prefix_tree.py: beam search bound to answers against the exhaustive argmax, for both kinds of models."""

from typing import Any

import pytest
import torch
from transformers import BioGptConfig, BioGptForCausalLM, BlenderbotConfig, BlenderbotForConditionalGeneration

from pretrain.prefix_tree import PrefixTree, search

VOCABULARY, END = 24, 2
SHAPE: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": END}


def answers() -> list[list[int]]:
    """30 answers of one to four tokens and an end. Many share a beginning, and some are the beginning of others."""
    draws = torch.Generator().manual_seed(3)
    several = {tuple(torch.randint(4, 9, (1 + number % 4,), generator=draws).tolist()) for number in range(60)}
    return [[*answer, END] for answer in sorted(several)[:30]]


def make_model(kind: str) -> Any:
    """A tiny model whose random weights are large enough that answers differ by nats."""
    torch.manual_seed(1)
    if kind == "causal":
        config = BioGptConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32, **SHAPE,
        )  # fmt: skip
        model = BioGptForCausalLM(config)
    else:
        config = BlenderbotConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, decoder_start_token_id=END,
            forced_eos_token_id=None, encoder_no_repeat_ngram_size=0, **SHAPE,
        )  # fmt: skip
        model = BlenderbotForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data *= 6
    return model.eval()


SOURCES = torch.tensor([[4 + (7 * row + place) % 17 for place in range(5)] for row in range(20)])


@torch.no_grad()
def exhaustive(model: Any) -> torch.Tensor:
    """The summed log-likelihood of each answer after each source, (20, 30)."""
    scores = []
    for answer in answers():
        inputs = torch.tensor(answer[:-1]).expand(len(SOURCES), -1)
        if model.config.is_encoder_decoder:
            start = torch.full((len(SOURCES), 1), END)
            logits = model(input_ids=SOURCES, decoder_input_ids=torch.cat([start, inputs], 1)).logits
        else:
            logits = model(torch.cat([SOURCES, inputs], 1)).logits[:, SOURCES.shape[1] - 1 :]
        scores.append(logits.log_softmax(-1)[:, range(len(answer)), answer].sum(1))
    return torch.stack(scores, 1)


@pytest.mark.parametrize("kind", ["causal", "encoder_decoder"])
def test_beam_search_finds_the_likeliest_answer(kind: str) -> None:
    model, mask = make_model(kind), torch.ones_like(SOURCES)
    scores = exhaustive(model)
    best = scores.argmax(1).tolist()
    assert len(set(best)) > 2
    found = {beams: search(model, SOURCES, mask, answers(), beams) for beams in (1, 3, len(answers()))}
    assert found[len(answers())] == best
    misses = {beams: sum(a != b for a, b in zip(numbers, best, strict=True)) for beams, numbers in found.items()}
    print(f"{kind}: of {len(best)} answers, so many are missed with so many beams: {misses}")
    assert misses[1] > 0  # otherwise this test would not see beams that are too few
    assert misses[3] < misses[1]


def test_padding_on_the_left_changes_nothing() -> None:
    model = make_model("causal")
    padded = torch.cat([torch.ones(20, 3, dtype=torch.int64), SOURCES], 1)
    mask = (torch.arange(8) >= 3).long().expand(20, 8)
    assert search(model, padded, mask, answers(), 30) == exhaustive(model).argmax(1).tolist()


def test_only_tokens_of_answers_keep_their_scores() -> None:
    tree = PrefixTree([[5, 6, END], [5, END], [7, END]], given=2)
    scores = torch.arange(30.0).view(3, 10)
    first = tree(torch.tensor([[9, 9], [9, 9], [5, 6]]), scores)
    assert first.isfinite().nonzero().tolist() == [[row, token] for row in range(3) for token in (5, 7)]
    later = tree(torch.tensor([[9, 9, 5], [9, 9, 7], [9, 9, 5]]), scores)
    assert later.isfinite().nonzero().tolist() == [[0, END], [0, 6], [1, END], [2, END], [2, 6]]
    assert later[0, 6] == 6 and later[2, 2] == 22
