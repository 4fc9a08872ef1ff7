"""How models answer the items of a benchmark: a language model chooses among texts or writes one.

A causal model continues the prompt. An encoder-decoder reads the prompt as its source, and its answer is the target and
an end, as it learned them.
"""

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
from pretrain.hf_folder import load_language_model, load_tokenizer
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
    """A language model of transformers, causal of any kind or an encoder-decoder, and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    context_length: int
    begin: list[int]
    """The tokens that begin a text."""

    @property
    def has_encoder(self) -> bool:
        """Whether it is an encoder-decoder."""
        return self.model.config.is_encoder_decoder


def open_language_model(folder: Path) -> LanguageModel:
    """Raises UserError if the folder is not that of a language model with its tokenizer."""
    tokenizer, model = load_tokenizer(folder), load_language_model(folder, best_device())
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
    the context with the longest target loses its beginning, and a source its end, as in training. Raises UserError if
    the context does not hold a target.
    """
    pairs = [(prompt, target) for prompt in prompts for target in targets]
    encoded = _encode_sources(model, pairs) if model.has_encoder else _encode_prompts(model, pairs, len(targets))
    scores = log_likelihoods(model, encoded, advance)
    if scoring == "mean":
        scores = [score / len(target) for score, (_, target) in zip(scores, encoded, strict=True)]
    return [scores[start : start + len(targets)] for start in range(0, len(scores), len(targets))]


def log_likelihoods(
    model: LanguageModel, pairs: Sequence[tuple[list[int], list[int]]], advance: Callable[[], None] = lambda: None
) -> list[float]:
    """The summed log-likelihood in nats of the target in each pair of a prompt's, or a source's, and a target's tokens.

    Each pair fits the context.
    """
    scores = [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: sum(map(len, pairs[index])), reverse=True)
    of_batch = _of_encoder_decoder if model.has_encoder else _of_causal_model
    while order:
        size = max(TOKENS_AT_ONCE // sum(map(len, pairs[order[0]])), 1)
        batch, order = order[:size], order[size:]
        for index, score in zip(batch, of_batch(model, [pairs[index] for index in batch]), strict=True):
            scores[index] = score
            advance()
    return scores


@torch.no_grad()
def _of_causal_model(model: LanguageModel, sequences: list[tuple[list[int], list[int]]]) -> list[float]:
    """The log-likelihoods of one batch.

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
    return _summed(last_logits(model.model, inputs_BT, mask_BT, kept), targets_BT[:, -kept:])


@torch.no_grad()
def _of_encoder_decoder(model: LanguageModel, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """The log-likelihoods of one batch. Letters: B rows, S tokens of the source, T of the target."""
    sources_BS = torch.zeros(len(pairs), max(len(source) for source, _ in pairs), dtype=torch.int64)
    inputs_BT = torch.zeros(len(pairs), max(len(target) for _, target in pairs), dtype=torch.int64)
    mask_BS, targets_BT = torch.zeros_like(sources_BS), torch.full_like(inputs_BT, IGNORE_INDEX)
    for row, (source, target) in enumerate(pairs):
        sources_BS[row, : len(source)], mask_BS[row, : len(source)] = torch.tensor(source), 1
        inputs_BT[row, : len(target)] = torch.tensor([model.model.config.decoder_start_token_id, *target[:-1]])
        targets_BT[row, : len(target)] = torch.tensor(target)
    arguments = {"input_ids": sources_BS, "attention_mask": mask_BS, "decoder_input_ids": inputs_BT}
    arguments = {name: tensor.to(model.model.device) for name, tensor in arguments.items()}
    return _summed(model.model(**arguments, use_cache=False).logits, targets_BT)


def _summed(logits_BTV: Tensor, targets_BT: Tensor) -> list[float]:
    """The summed log-likelihood of the targets of each row that count."""
    nats_BT = torch.nn.functional.cross_entropy(
        logits_BTV.float().transpose(1, 2),
        targets_BT.to(logits_BTV.device),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return (-nats_BT.double().sum(1)).tolist()


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


def _encode_prompts(
    model: LanguageModel, pairs: Sequence[tuple[str, str]], targets: int
) -> list[tuple[list[int], list[int]]]:
    """As `encode_pairs`, with prompts that leave room for any target. Each prompt stands in `targets` pairs."""
    encoded, shorter = encode_pairs(model.tokenizer, pairs), []
    for start in range(0, len(encoded), targets):
        of_prompt = encoded[start : start + targets]
        new_tokens = max(len(target) for _, target in of_prompt)  # every target follows the same tokens
        shorter += [(shortened(prompt, new_tokens, model), target) for prompt, target in of_prompt]
    return shorter


def _encode_sources(model: LanguageModel, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """The tokens of each prompt, without what the context does not hold of its end, and of its target and its end."""
    sources = model.tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    targets = model.tokenizer([target for _, target in pairs], add_special_tokens=False)["input_ids"]
    if (longest := max(map(len, targets)) + 1) > model.context_length:
        raise UserError(f"{model.name}: an answer has {longest} tokens; the model holds {model.context_length}")
    end = model.tokenizer.eos_token_id
    return [(source[: model.context_length], [*target, end]) for source, target in zip(sources, targets, strict=True)]


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
