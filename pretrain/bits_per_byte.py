"""Bits per byte of causal language models on corpora, for `biogpt evaluate --corpus`.

Every model reads the same texts with its own tokenizer, one document at a time. A document is the sequence

    begin, its tokens, end

begin, end: what the tokenizer itself puts before and after a text; where that is nothing, the tokenizer's BOS (or else
its EOS) and its EOS. Every token but the begin is predicted once, so a document of n tokens has n + 1 predictions. What
cannot be predicted, because a tokenizer has no such token, costs as much as a guess among the whole vocabulary. Special
tokens that a text spells out ("</s>") stay text. A document that is longer than the model's context is read in windows
of that length, which advance by half of it: each token is scored in the first window that holds it.

Bits per byte are all bits of the predictions, and 8 for every byte of a lost character, over the bytes of the texts in
UTF-8. A character is lost if the unknown token stands for it or, white space aside, no token does.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from torch import Tensor

from data.common.files import UserError, read_manifest, verify_files
from data.common.parquet import row_groups, split_files
from data.common.workers import progress
from model.loss import IGNORE_INDEX
from pretrain.hf_folder import load_causal_lm, load_tokenizer
from pretrain.load import best_device, load_decoder, load_run

DOCUMENTS_AT_ONCE = 256  # are sorted by length, so that a batch needs little padding
TOKENS_AT_ONCE = 8192  # in a batch
LOGITS_AT_ONCE = 1 << 27  # 0.5 GB in fp32
ALL = "all"
"""The name of all sources together, where there are several."""


@dataclass(frozen=True)
class CausalModel:
    """A causal language model and its tokenizer, ready to score texts."""

    name: str
    logits: Callable[[Tensor, Tensor], Tensor]
    """Token ids and their mask (B, T), 0 where a row is padded on the right -> logits (B, T, V)."""
    tokenizer: Any
    vocabulary: int
    context_length: int
    begin: list[int]
    end: list[int]
    device: torch.device


class Window(NamedTuple):
    """A piece of a sequence that fits the model's context."""

    inputs: list[int]
    targets: list[int]
    """The token after each input, or -100 where it is not scored in this window."""


@dataclass
class Score:
    """What a model gave some documents."""

    documents: int = 0
    tokens: int = 0
    """Predictions: the tokens of the documents and their ends."""
    nats: float = 0.0
    """Of all predictions."""
    text_bytes: int = 0
    unknown_characters: int = 0
    unknown_bytes: int = 0

    def add(self, other: "Score") -> None:
        """Add the documents of another score."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits of the predictions and of the lost bytes, for each byte of the texts."""
        return (self.nats / math.log(2) + 8 * self.unknown_bytes) / self.text_bytes


def evaluate_corpora(
    folders: list[Path], corpora: list[Path], split: str, step: str = "", average: int = 1
) -> dict[str, dict[str, Score]]:
    """The scores of runs and HF folders on a split of corpora: model -> source -> score.

    step, average: the checkpoint of a run, as for `load_run`. Sources are the files that the documents come from, by
    `source_name`; where there are several, ALL comes last. Raises UserError if a corpus is damaged or its split is
    empty, or if a folder is no causal language model with a tokenizer, before a text is scored.
    """
    files = {corpus: corpus_files(corpus, split) for corpus in corpora}
    for folder in folders[1:]:  # a mistake is found now, and not when the models before it are done
        open_model(folder, step, average)
    scores = {}
    for folder in folders:
        model, sources, documents = open_model(folder, step, average), defaultdict(Score), corpus_documents(files)
        total = sum(pq.read_metadata(file).num_rows for each in files.values() for file in each)
        with progress(f"evaluate: {folder}", total) as advance:
            while some := list(islice(documents, DOCUMENTS_AT_ONCE)):
                for (source, _), score in zip(some, score_texts(model, [text for _, text in some]), strict=True):
                    sources[source].add(score)
                    advance()
        scores[str(folder)] = with_all(sources)
    return scores


def with_all(sources: dict[str, Score]) -> dict[str, Score]:
    """The scores in the order of their sources and, if there are several, their sum."""
    ordered = {name: sources[name] for name in sorted(sources)}
    if len(ordered) > 1:
        together = Score()
        for score in ordered.values():
            together.add(score)
        ordered[ALL] = together
    return ordered


def corpus_files(corpus: Path, split: str) -> list[Path]:
    """The verified Parquet files of a split. Raises UserError if one is damaged or the split is empty."""
    manifest = read_manifest(corpus, "corpus")
    files = split_files(corpus, manifest, split)
    if not files:
        raise UserError(f"{corpus}: the {split} split is empty; choose another --split")
    verify_files(corpus, {"files": {file.name: manifest["files"][file.name] for file in files}})
    return files


def corpus_documents(files: dict[Path, list[Path]]) -> Iterator[tuple[str, str]]:
    """The source and the text of every document. files: corpus -> its Parquet files."""
    for corpus, paths in files.items():
        for path in paths:
            for rows in row_groups(path, ["source_file", "text"]):
                for source, text in zip(*(rows[name].to_pylist() for name in ("source_file", "text")), strict=True):
                    yield source_name(source) if len(files) == 1 else f"{corpus}: {source_name(source)}", text


def source_name(file: str) -> str:
    """The name of a source. Files whose names differ in their numbers only, as NLM's do, are one source."""
    return re.sub(r"\d+", "*", file)


def open_model(folder: Path, step: str = "", average: int = 1) -> CausalModel:
    """A run or an HF folder as a language model. Raises UserError if it is not one, or has no tokenizer."""
    device = best_device()
    if (folder / "recipe.toml").is_file():
        return open_run(folder, step, average, device)
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder, device)
    config = model.config.get_text_config()

    def logits(inputs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return model(input_ids=inputs_BT, attention_mask=mask_BT, use_cache=False).logits

    opened = CausalModel(
        str(folder),
        logits,
        tokenizer,
        config.vocab_size,
        context_length(config, tokenizer),
        *ends_of_text(tokenizer),
        device,
    )
    check_causal(opened)
    return opened


def open_run(run: Path, step: str, average: int, device: torch.device) -> CausalModel:
    """The checkpoint of a run; its data are not needed. Raises UserError if its model has other weights too."""
    recipe, checkpoints, _ = load_run(run, step, average)
    decoder = load_decoder(run, recipe, checkpoints)
    decoder.to(device).eval()
    tokenizer = load_tokenizer(run / "tokenizer")

    def logits(inputs_BT: Tensor, _: Tensor) -> Tensor:  # its attention is causal, so padding needs no mask
        return decoder(inputs_BT)

    ends = ends_of_text(tokenizer)
    return CausalModel(str(run), logits, tokenizer, decoder.config.vocab_size, recipe.context_length(), *ends, device)


def context_length(config: Any, tokenizer: Any) -> int:
    """How many tokens a model of transformers reads at once: the least of what its config and its tokenizer name.

    Models without learned or rotary positions name none, and then there may be no limit. The tokenizer of RoBERTa's
    kind names two less than the config, which counts rows of its embedding that no token uses.
    """
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return min(*(length for length in named if length), tokenizer.model_max_length, 1 << 30)


def ends_of_text(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that begin and that end a text: see the top of this file. Either may be empty."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    places = range(len(whole) - len(plain) + 1)
    first = next(place for place in places if whole[place : place + len(plain)] == plain)
    begin, end = whole[:first], whole[first + len(plain) :]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    known_eos = [] if eos is None else [eos]
    return begin or ([bos] if bos is not None else known_eos), end or known_eos


@torch.no_grad()
def check_causal(model: CausalModel) -> None:
    """Raises UserError if an earlier prediction changes with a later token, as it does in encoders such as BERT."""
    inputs_BT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], device=model.device)
    first, second = model.logits(inputs_BT, torch.ones_like(inputs_BT))[:, :3].float().log_softmax(-1)
    if not torch.allclose(first, second, rtol=0, atol=1e-4):
        raise UserError(f"{model.name}: its predictions depend on later tokens, so it is not a causal language model")


def score_texts(model: CausalModel, texts: list[str]) -> list[Score]:
    """The score of each text."""
    tokenized = tokenize(model.tokenizer, texts, model.name)
    windows = [document_windows(model.begin, ids, model.end, model.context_length) for ids, _ in tokenized]
    nats = iter(window_losses(model, [window for each in windows for window in each]))
    scores = []
    for text, (ids, lost), of_text in zip(texts, tokenized, windows, strict=True):
        tokens = len(ids) + max(len(model.end), 1)
        unscored = tokens - sum(target != IGNORE_INDEX for window in of_text for target in window.targets)
        total = sum(next(nats) for _ in of_text) + unscored * math.log(model.vocabulary)
        scores.append(Score(1, tokens, total, len(text.encode()), len(lost), len(lost.encode())))
    return scores


def tokenize(tokenizer: Any, texts: list[str], name: str) -> list[tuple[list[int], str]]:
    """The token ids of each text, without begin and end, and the characters that are lost.

    name: of the model. Raises UserError if the tokenizer does not tell which characters it loses: one in Python that
    puts the unknown token in their place, and not only its id.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        unknown, columns = tokenizer.unk_token_id, (encoded["input_ids"], encoded["offset_mapping"])
        return [
            (ids, lost_characters(text, ids, offsets, unknown))
            for text, ids, offsets in zip(texts, *columns, strict=True)
        ]
    tokenized = []
    for text in texts:
        pieces = tokenizer.tokenize(text, split_special_tokens=True)
        ids = tokenizer.convert_tokens_to_ids(pieces)
        unknown = [piece for piece, index in zip(pieces, ids, strict=True) if index == tokenizer.unk_token_id]
        if tokenizer.unk_token in unknown:
            raise UserError(
                f"{name}: its tokenizer does not tell which characters become {tokenizer.unk_token}; one with a"
                " tokenizer.json does"
            )
        lost = "".join(tokenizer.convert_tokens_to_string([piece]).strip() for piece in unknown)
        tokenized.append((ids, lost))
    return tokenized


def lost_characters(text: str, ids: list[int], offsets: list[tuple[int, int]], unknown: int | None) -> str:
    """The characters that the unknown token stands for or, white space aside, no token. offsets: of each token."""
    nothing, known, lost = range(3)
    fate = bytearray(len(text))
    for kind in (known, lost):
        for index, (start, stop) in zip(ids, offsets, strict=True):
            if (index == unknown) == (kind == lost):
                fate[start:stop] = bytes([kind]) * (stop - start)
    return "".join(
        character
        for character, kind in zip(text, fate, strict=True)
        if kind == lost or (kind == nothing and not character.isspace())
    )


def document_windows(begin: list[int], ids: list[int], end: list[int], length: int) -> list[Window]:
    """The windows of a document, of `length` inputs at most. Each advances by half of `length`.

    A token is scored in the first window that has it as a target, so it sees at least half a window before it, or all
    that there is.
    """
    sequence = [*begin, *ids, *end]
    inputs, targets = sequence[:-1], sequence[1:]
    scored = max(len(begin) - 1, 0)  # where the next target to score stands
    stride, windows = max(length // 2, 1), []
    for start in range(0, max(len(inputs) - length + stride, 1), stride):
        stop = min(start + length, len(inputs))
        windows.append(Window(inputs[start:stop], [IGNORE_INDEX] * (scored - start) + targets[scored:stop]))
        scored = stop
    return [window for window in windows if window.inputs]


@torch.no_grad()
def window_losses(model: CausalModel, windows: list[Window]) -> list[float]:
    """The summed negative log-likelihood of each window's scored targets, in nats.

    Windows of about the same length share a batch. Raises UserError if a token is outside the model's vocabulary.
    """
    largest = max((token for window in windows for token in (*window.inputs, *window.targets)), default=0)
    if largest >= model.vocabulary:
        raise UserError(
            f"{model.name}: its tokenizer gives the token {largest}, but the model has {model.vocabulary}; the"
            " tokenizer belongs to another model"
        )
    losses = [0.0] * len(windows)
    order = sorted(range(len(windows)), key=lambda index: len(windows[index].inputs), reverse=True)
    while order:
        length = len(windows[order[0]].inputs)
        size = max(min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // model.vocabulary) // length, 1)
        batch, order = order[:size], order[size:]
        inputs_BT = torch.zeros(len(batch), length, dtype=torch.int64)
        mask_BT, targets_BT = torch.zeros_like(inputs_BT), torch.full_like(inputs_BT, IGNORE_INDEX)
        for row, index in enumerate(batch):
            inputs, targets = (torch.tensor(each) for each in windows[index])
            inputs_BT[row, : len(inputs)], mask_BT[row, : len(inputs)] = inputs, 1
            targets_BT[row, : len(targets)] = targets
        logits_BTV = model.logits(inputs_BT.to(model.device), mask_BT.to(model.device))
        nats = torch.nn.functional.cross_entropy(
            logits_BTV.float().flatten(0, 1),
            targets_BT.flatten().to(model.device),
            ignore_index=IGNORE_INDEX,
            reduction="none",
        )
        for index, loss in zip(batch, nats.view(inputs_BT.shape).double().sum(1).tolist(), strict=True):
            losses[index] = loss
    return losses
