"""How well generated text repeats the words of the right one, and what to compare it with: the lead sentence."""

import re
from collections.abc import Sequence

from data.shards.corpus_records import LABEL

KINDS = ("rouge1", "rouge2", "rougeL")
SENTENCE_END = re.compile(r"(?<!\b[A-Z])[.!?](?=\s+[\"'“(\[]?[A-Z0-9])")


def rouge_scores(references: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of at least one pair of texts: the mean of their F1, in percent, by `KINDS`.

    By Google's rouge-score (Lin 2004), with Porter's stemmer, as papers on summaries report it. Words are runs of the
    letters a to z and of digits; it ignores all other characters, so "β-blocker" is the word "blocker".
    """
    from rouge_score.rouge_scorer import RougeScorer  # of the extra bench

    scorer = RougeScorer(KINDS, use_stemmer=True)
    scores = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
    return {kind: 100 * sum(score[kind].fmeasure for score in scores) / len(scores) for kind in KINDS}


def lead_sentence(abstract: str) -> str:
    """The first sentence of an abstract, without the label of its section: a baseline for the title.

    A sentence ends at ".", "!" or "?" before a space and a capital or a digit. The period after a single capital ends
    none, as in "S. Aureus".
    """
    label = LABEL.match(abstract)
    text = abstract[label.end() :].strip() if label else abstract
    end = SENTENCE_END.search(text)
    return text[: end.end()] if end else text
