"""Shards -> blocks of `context_length` tokens, in an order that is a pure function of (seed, step).

The documents of a split are one stream of tokens. Epoch e cuts it at an offset of its own and shuffles the blocks, so
that no window comes back in every epoch (fairseq cuts once, `sample_break_mode none`). As in fairseq the input of a
position is the true token before it (`</s>` before the first), every position is a target, and attention crosses
documents. The global batch of a step is the same list of blocks for any number of ranks and any micro-batch size.
Blocks of several folders of shards are mixed in a fixed pattern; each folder has epochs of its own.
"""

from abc import ABC, abstractmethod
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.common.files import UserError
from data.common.hashing import mix64
from data.shards.indexed import IndexedTokens
from data.shards.mixture import Mixture
from data.shards.order import EpochOrder, epoch_salt
from data.text.ids import EOS_ID, PAD_ID


class TokenStream:
    """All tokens of one split, one shard after the other, as memory maps."""

    def __init__(self, shards: Path, manifest: dict[str, Any], split: str) -> None:
        self.folder = shards
        names = sorted(name for name in manifest["files"] if name.startswith(f"{split}-") and name.endswith(".idx"))
        self._shards = [IndexedTokens(shards / name.removesuffix(".idx")) for name in names]
        self._starts = np.cumsum([0] + [len(shard.tokens) for shard in self._shards])
        self.text_bytes = sum(int(shard.text_bytes.sum()) for shard in self._shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64, cut at the stream's end; the token before the first is `</s>`."""
        parts = [np.full(1 if start < 0 else 0, EOS_ID)]
        start = max(start, 0)
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < min(stop, len(self)):
            first, last = int(self._starts[index]), int(self._starts[index + 1])
            parts.append(self._shards[index].tokens[start - first : min(stop, last) - first])
            start, index = last, index + 1
        return np.concatenate(parts).astype(np.int64)


class Blocks(ABC):
    """An endless sequence of training blocks, numbered from 0."""

    @abstractmethod
    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a block, (context_length,) int64 each."""

    def batch(self, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of blocks, (len(numbers), context_length) int64 each."""
        pairs = [self.read(number) for number in numbers]
        inputs, targets = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*pairs, strict=True))
        return inputs, targets


class TrainingBlocks(Blocks):
    """The blocks of one folder of shards, epoch after epoch."""

    def __init__(self, stream: TokenStream, context_length: int, seed: int) -> None:
        self._stream, self._context_length, self._seed = stream, context_length, seed
        self.blocks_per_epoch = (len(stream) - context_length + 1) // context_length
        if self.blocks_per_epoch < 1:
            raise UserError(
                f"{stream.folder}: the training split has {len(stream)} tokens, too few for blocks of {context_length}"
                " tokens; lower train.context_length or bring more text"
            )
        self._order = EpochOrder(self.blocks_per_epoch, seed)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Blocks.read`."""
        epoch, index = self._order.locate(number)
        draw = mix64(np.array([epoch]), salt=epoch_salt(self._seed, epoch, 1))[0]
        start = int(draw % np.uint64(self._context_length)) + index * self._context_length
        tokens = self._stream.read(start - 1, start + self._context_length)
        return tokens[:-1], tokens[1:]


class MixedBlocks(Blocks):
    """The blocks of a run: block number i belongs to step i // (blocks of a global batch)."""

    def __init__(self, streams: list[TokenStream], weights: list[Fraction], context_length: int, seed: int) -> None:
        """weights: the shares of the streams, which sum to 1. The first stream alone gives the blocks of its folder."""
        self._mixture = Mixture(weights)
        seeds = self._mixture.seeds(seed)
        self._folders = [
            TrainingBlocks(stream, context_length, own) for stream, own in zip(streams, seeds, strict=True)
        ]

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Blocks.read`."""
        index, own = self._mixture.locate(number)
        return self._folders[index].read(own)

    def epochs(self, blocks: int) -> list[float]:
        """How often the first so many blocks have gone through each folder."""
        return self._mixture.epochs(blocks, [folder.blocks_per_epoch for folder in self._folders])


def held_out_batch(
    stream: TokenStream, context_length: int, numbers: range, batch_size: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of blocks of a stream in its own order, (batch_size, context_length) int64 each.

    The rows after the last of `numbers`, and the positions after the stream's end, are padding: their input is `<pad>`,
    their target `ignore_index`.
    """
    inputs = np.full((batch_size, context_length), PAD_ID, np.int64)
    targets = np.full((batch_size, context_length), ignore_index, np.int64)
    for row, number in enumerate(numbers):
        start = number * context_length
        if start < len(stream):
            tokens = stream.read(start - 1, start + context_length)
            inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def unigram_entropy(stream: TokenStream) -> float:
    """Entropy in nats of the stream's own token frequencies: the loss of the best model that ignores the context.

    0.0 for an empty stream.
    """
    counts = np.bincount(stream.read(0, len(stream)))
    shares = counts[counts > 0] / len(stream)
    return float(-(shares * np.log(shares)).sum())
