"""Decoding bound to a prefix tree: a model of transformers writes one of a set of answers, found by beam search.

Where the set is small, `pretrain.answers` scores every answer, which is exact. Beam search is for sets too large for
that. It may miss the likeliest answer, because an answer whose first tokens are unlikely leaves the beams.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


class PrefixTree(LogitsProcessor):
    """Gives minus infinity to every token with which no answer goes on."""

    def __init__(self, answers: Sequence[Sequence[int]], given: int) -> None:
        """answers: their tokens, each with the end of text as the last one; given: tokens before an answer begins."""
        self._given, self._next = given, dict[tuple[int, ...], set[int]]()
        for answer in answers:
            for length, token in enumerate(answer):
                self._next.setdefault(tuple(answer[:length]), set()).add(token)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """Scores (rows, V) of the next token after the tokens (rows, T).

        A row that holds no beginning of an answer keeps its scores: it has ended, or beam search keeps it only to fill
        its beams, with a sum below that of every answer.
        """
        bound = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(input_ids[:, self._given :].tolist()):
            following = sorted(self._next.get(tuple(tokens), ()))
            bound[row, following] = scores[row, following]
            if not following:
                bound[row] = scores[row]
        return bound


@torch.no_grad()
def search(model: Any, ids_BT: Tensor, mask_BT: Tensor, answers: Sequence[Sequence[int]], beams: int) -> list[int]:
    """The number of the answer that beam search finds for each row: of those it finds, the one with the highest sum.

    model: causal, whose rows of ids are padded on the left, or encoder-decoder. answers: as for `PrefixTree`. With as
    many beams as answers nothing leaves the beams, so that the answer found is the likeliest of all.
    """
    end, given = answers[0][-1], 1 if model.config.is_encoder_decoder else ids_BT.shape[1]
    # The sum of the tokens' log-likelihoods, not their mean. A single beam has no choice to make.
    sums = {"length_penalty": 0.0, "early_stopping": False} if beams > 1 else {}
    written = model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        logits_processor=LogitsProcessorList([PrefixTree(answers, given)]),
        max_new_tokens=max(map(len, answers)),
        num_beams=beams,
        do_sample=False,
        **sums,
        eos_token_id=end,
        pad_token_id=end,
    )
    numbers = {tuple(answer): number for number, answer in enumerate(answers)}
    return [numbers[tuple(row[: row.index(end) + 1])] for row in written[:, given:].tolist()]
