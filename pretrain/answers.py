"""How models answer the items of a benchmark: a language model chooses among texts or writes one."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data.common.errors import UserError
from model.loss import IGNORE_INDEX
from pretrain.bits_per_byte import TOKENS_AT_ONCE, context_length, ends_of_text
from pretrain.hf_folder import load_causal_lm, load_tokenizer
from pretrain.load import best_device
from pretrain.tasks.figures import Answers
from pretrain.tasks.task import ChoiceTask, WritingTask

Scoring = Literal["sum", "mean"]
"""A text's score is the sum or the mean of the log-likelihoods of its tokens."""
ITEMS_AT_ONCE = 512  # their texts are sorted by length, so that a batch needs little padding
PROMPTS_AT_ONCE = 16
NEW_TOKENS = 256  # the longest answer in BC5CDR's training split has 254 of BioGPT's tokens


@dataclass(frozen=True)
class Answer:
    """What a model says about an item."""

    answers: Answers
    scores: dict[str, float] = field(default_factory=dict)
    """The score of each text or label among which the model chose."""
    scoring: str = ""
    """How they were scored: "sum" or "mean" in nats, or "logit" for a classifier."""
    text: str = ""
    """What a language model wrote."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model of transformers, of any kind, and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    context_length: int
    begin: list[int]
    """The tokens that begin a text."""


def open_language_model(folder: Path) -> LanguageModel:
    """Raises UserError if the folder is not that of a causal language model with its tokenizer."""
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder, best_device())
    length = context_length(model.config.get_text_config(), tokenizer)
    return LanguageModel(str(folder), model, tokenizer, length, ends_of_text(tokenizer)[0])


def choose(model: LanguageModel, task: ChoiceTask, scoring: Scoring, advance: Callable[[], None]) -> list[Answer]:
    """For each item the choice with the highest score; of equal ones the first.

    advance: called for each text that is scored.
    """
    choices = task.choices()
    targets, answers = [task.target(choice) for choice in choices], []
    for start in range(0, len(task.items), ITEMS_AT_ONCE):
        prompts = [item.prompt for item in task.items[start : start + ITEMS_AT_ONCE]]
        for scores in target_scores(model, prompts, targets, scoring, advance):
            best = max(range(len(scores)), key=scores.__getitem__)
            answers.append(Answer(choices[best], dict(zip(targets, scores, strict=True)), scoring))
    return answers


def target_scores(
    model: LanguageModel,
    prompts: Sequence[str],
    targets: Sequence[str],
    scoring: Scoring,
    advance: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """The score in nats of each target after each prompt.

    Every token of every target is scored, so that a target may be the beginning of another. A prompt that does not fit
    the context with the longest target loses its beginning. Raises UserError if the context does not hold a target.
    """
    pairs = encode_pairs(model.tokenizer, [(prompt, target) for prompt in prompts for target in targets])
    sequences = []
    for start in range(0, len(pairs), len(targets)):
        of_prompt = pairs[start : start + len(targets)]
        new_tokens = max(len(target) for _, target in of_prompt)  # every target follows the same tokens
        sequences += [(shortened(prompt, new_tokens, model), target) for prompt, target in of_prompt]
    scores = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda index: sum(map(len, sequences[index])), reverse=True)
    while order:
        longest = sum(map(len, sequences[order[0]]))
        size = max(TOKENS_AT_ONCE // longest, 1)
        batch, order = order[:size], order[size:]
        for index, summed in zip(batch, _log_likelihoods(model, [sequences[index] for index in batch]), strict=True):
            scores[index] = summed if scoring == "sum" else summed / len(sequences[index][1])
            advance()
    return [scores[start : start + len(targets)] for start in range(0, len(scores), len(targets))]


@torch.no_grad()
def _log_likelihoods(model: LanguageModel, sequences: list[tuple[list[int], list[int]]]) -> list[float]:
    """The summed log-likelihood of the target in each pair of a prompt's and its target's tokens.

    Rows are padded on the right, where causal attention does not see it. Letters: B rows, T tokens, K the last of them,
    for which alone logits are computed.
    """
    length = max(len(prompt) + len(target) for prompt, target in sequences) - 1
    inputs_BT = torch.zeros(len(sequences), length, dtype=torch.int64)
    mask_BT, targets_BT = torch.zeros_like(inputs_BT), torch.full_like(inputs_BT, IGNORE_INDEX)
    for row, (prompt, target) in enumerate(sequences):
        ids = torch.tensor([*prompt, *target])
        inputs_BT[row, : len(ids) - 1], mask_BT[row, : len(ids) - 1] = ids[:-1], 1
        targets_BT[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    kept = length - min(len(prompt) - 1 for prompt, _ in sequences)
    logits_BKV = last_logits(model.model, inputs_BT, mask_BT, kept)
    nats_BK = torch.nn.functional.cross_entropy(
        logits_BKV.float().transpose(1, 2),
        targets_BT[:, -kept:].to(logits_BKV.device),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return (-nats_BK.double().sum(1)).tolist()


def last_logits(model: Any, inputs_BT: Tensor, mask_BT: Tensor, kept: int) -> Tensor:
    """Logits (B, K, V) of the last K = `kept` positions."""
    arguments = {"input_ids": inputs_BT, "attention_mask": mask_BT}
    arguments = {name: tensor.to(model.device) for name, tensor in arguments.items()}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**arguments, use_cache=False, logits_to_keep=kept).logits
    return model(**arguments, use_cache=False).logits[:, -kept:]


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """The tokens of each prompt, and those of its target, which stands after a space.

    The target's tokens are those that follow when both are tokenized together. If that changes the prompt's, as Moses
    does with a full stop before a small letter, the target is tokenized alone.
    """
    before, together = (
        tokenizer(texts)["input_ids"] for texts in ([p for p, _ in pairs], [f"{p} {t}" for p, t in pairs])
    )
    return [
        (
            prompt,
            both[len(prompt) :]
            if both[: len(prompt)] == prompt
            else tokenizer(f" {target}", add_special_tokens=False)["input_ids"],
        )
        for prompt, both, (_, target) in zip(before, together, pairs, strict=True)
    ]


def shortened(prompt: list[int], new_tokens: int, model: LanguageModel) -> list[int]:
    """A prompt that leaves the context room for new tokens, the last of which the model does not read.

    What begins a text is kept, and the beginning of the rest is left out. Raises UserError if no room is left.
    """
    room = model.context_length + 1 - new_tokens
    if room < 1:
        raise UserError(f"{model.name}: an answer has {new_tokens} tokens; the model holds {model.context_length}")
    if len(prompt) <= room:
        return prompt
    begin = model.begin if prompt[: len(model.begin)] == model.begin and len(model.begin) < room else []
    return [*begin, *prompt[len(prompt) - room + len(begin) :]]


@torch.no_grad()
def write(model: LanguageModel, task: WritingTask, advance: Callable[[], None]) -> list[Answer]:
    """What a language model writes after each prompt, taking the likeliest token each time.

    A prompt that leaves too little room for an answer loses its beginning. advance: called for each item.
    """
    new_tokens = min(NEW_TOKENS, model.context_length * 3 // 8)  # BioGPT, too, gives a prompt 640 of 1,024 positions
    tokenizer, answers = model.tokenizer, []
    encoded = tokenizer([item.prompt for item in task.items])["input_ids"]
    prompts = [shortened(ids, new_tokens, model) for ids in encoded]
    padding = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        some = prompts[start : start + PROMPTS_AT_ONCE]
        length = max(map(len, some))
        ids_BT = torch.full((len(some), length), padding)
        mask_BT = torch.zeros_like(ids_BT)
        for row, ids in enumerate(some):  # on the left, so that new tokens follow the last one of every prompt
            ids_BT[row, length - len(ids) :], mask_BT[row, length - len(ids) :] = torch.tensor(ids), 1
        written_BT = model.model.generate(
            input_ids=ids_BT.to(model.model.device),
            attention_mask=mask_BT.to(model.model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=padding,
        )[:, length:]
        for text in tokenizer.batch_decode(written_BT, skip_special_tokens=True):
            answers.append(Answer(task.parse(text.strip()), text=text.strip()))
            advance()
    return answers
