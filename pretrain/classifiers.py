"""How classifiers answer the items of a benchmark: BioGptForTokenClassification and BioGptForSequenceClassification.

Texts are read one at a time, so that nothing is padded.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from data.common.errors import UserError
from data.text.spans import find_spans, tags_of
from pretrain.answers import Answer
from pretrain.bits_per_byte import ends_of_text
from pretrain.hf_folder import load_hf, load_tokenizer
from pretrain.load import best_device
from pretrain.tasks.task import ChoiceTask, SpanTask, Task

TOKENS, TEXTS = "BioGptForTokenClassification", "BioGptForSequenceClassification"


@torch.no_grad()
def find_entities(folder: Path, task: SpanTask, advance: Callable[[], None]) -> list[Answer]:
    """The spans that a token classifier finds. A text that is longer than the context is read in pieces of its length.

    Raises UserError if the classes of the model are not tags of this task's labels.
    """
    model, tokenizer, begin = _open(folder, TOKENS, task, tags_of(task.labels))
    answers, room = [], model.config.max_position_embeddings - len(begin)
    for item in task.items:
        encoded = tokenizer(
            item.text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ids, offsets, spans = encoded["input_ids"], encoded["offset_mapping"], []
        for start in range(0, len(ids), room):  # as in fine-tuning, where each piece is an example
            inputs_1T = torch.tensor([[*begin, *ids[start : start + room]]], device=model.device)
            classes = model(inputs_1T).logits[0, len(begin) :].argmax(-1).tolist()
            tags = [model.config.id2label[number] for number in classes]
            spans += [tuple(span) for span in find_spans(tags, offsets[start : start + room])]
        answers.append(Answer(tuple(spans)))
        advance()
    return answers


@torch.no_grad()
def find_labels(folder: Path, task: ChoiceTask, advance: Callable[[], None]) -> list[Answer]:
    """The labels that a text classifier gives: the likeliest where an item has one, else all likelier than not.

    A text that is longer than the context loses its end. Raises UserError if the classes are not this task's labels.
    """
    model, tokenizer, begin = _open(folder, TEXTS, task, task.labels)
    several = any(len(choice) > 1 for choice in task.choices())
    answers, room = [], model.config.max_position_embeddings - len(begin)
    for item in task.items:
        ids = tokenizer(item.text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        (logits_C,) = model(torch.tensor([[*begin, *ids[:room]]], device=model.device)).logits
        chosen = (logits_C > 0).nonzero().flatten() if several else logits_C.argmax(keepdim=True)
        labels = tuple(model.config.id2label[number] for number in chosen.tolist())
        scores = {model.config.id2label[number]: logit for number, logit in enumerate(logits_C.tolist())}
        answers.append(Answer(labels, scores, "logit"))
        advance()
    return answers


def _open(folder: Path, name: str, task: Task, classes: Sequence[str]) -> tuple[Any, Any, list[int]]:
    """The model, its tokenizer and what begins a text."""
    tokenizer, model = load_tokenizer(folder), load_hf(folder, best_device(), name)
    if unknown := set(model.config.id2label.values()) - set(classes):
        raise UserError(f"{folder}: has the class {min(unknown)!r}, but {task.name} knows {', '.join(classes)}")
    return model, tokenizer, ends_of_text(tokenizer)[0]
