"""data/shards/blocks.py against a simple reader of the token files."""

import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.common.files import UserError
from data.shards.blocks import TokenStream, TrainingBlocks, held_out_batch, unigram_entropy
from data.shards.indexed import write_index
from model.loss import IGNORE_INDEX

EOS = 2


def write_shards(folder: Path, shards: list[list[list[int]]], split: str = "train") -> dict[str, Any]:
    """Shards with these documents, by hand; returns a manifest that lists them."""
    for number, documents in enumerate(shards):
        prefix = folder / f"{split}-{number:05d}"
        tokens = np.array([token for document in documents for token in document], np.uint16)
        prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
        lengths = np.array([len(document) for document in documents], np.int64)
        write_index(prefix, tokens.dtype, lengths, 3 * lengths)
    return {"files": {path.name: {} for path in folder.iterdir()}}


def random_shards(seed: int, sizes: list[int]) -> list[list[list[int]]]:
    """Shards of this number of documents, each of 1 to 30 tokens and its `</s>`."""
    rng = random.Random(seed)
    return [[[*(rng.randint(3, 60_000) for _ in range(rng.randint(1, 30))), EOS] for _ in range(size)]
            for size in sizes]  # fmt: skip


def plain_tokens(folder: Path, split: str = "train") -> list[int]:
    """All tokens of a split, read from the .bin files without our reader."""
    raw = b"".join(path.read_bytes() for path in sorted(folder.glob(f"{split}-*.bin")))
    return [raw[place] + 256 * raw[place + 1] for place in range(0, len(raw), 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    write_shards(folder, random_shards(1, [40, 7, 1, 30]))
    return folder


@pytest.fixture(scope="module")
def stream(folder: Path) -> TokenStream:
    return TokenStream(folder, {"files": {path.name: {} for path in folder.iterdir()}}, "train")


# The stream


def test_any_stretch_equals_the_files(folder: Path, stream: TokenStream) -> None:
    """Within a shard, across one and several borders, at both ends; the token before the first is `</s>`."""
    tokens = plain_tokens(folder)
    assert len(stream) == len(tokens) and stream.text_bytes == 3 * len(tokens)
    rng = random.Random(2)
    stretches = [(-1, 5), (-1, len(tokens) + 9), (0, len(tokens)), (len(tokens) - 1, len(tokens) + 3), (5, 5), (-1, 0)]
    stretches += [(start, start + rng.randint(0, 400)) for start in (rng.randrange(len(tokens)) for _ in range(300))]
    for start, stop in stretches:
        expected = [EOS] * (start < 0) + tokens[max(start, 0) : stop]
        read = stream.read(start, stop)
        assert read.dtype == np.int64 and read.tolist() == expected


def test_other_splits_and_empty_shards_are_passed_over(tmp_path: Path) -> None:
    write_shards(tmp_path, [[[9, EOS]]], "validation")
    manifest = write_shards(tmp_path, [[], [[5, EOS]], [], [[6, 7, EOS]], []])
    train = TokenStream(tmp_path, manifest, "train")
    assert train.read(-1, 99).tolist() == [EOS, 5, EOS, 6, 7, EOS] and train.read(2, 4).tolist() == [6, 7]
    assert TokenStream(tmp_path, manifest, "validation").read(0, 99).tolist() == [9, EOS]
    empty = TokenStream(tmp_path, manifest, "test")
    assert len(empty) == 0 and empty.read(0, 5).tolist() == [] and unigram_entropy(empty) == 0.0


# Training


@pytest.mark.parametrize("context_length", [1, 7, 64])
def test_an_epoch_covers_its_blocks_once(context_length: int, folder: Path, stream: TokenStream) -> None:
    """Targets are stretches of the files that meet end to end; inputs are the true tokens before them."""
    tokens = [EOS, *plain_tokens(folder)]  # the token before place p of the files stands at p here
    blocks = TrainingBlocks(stream, context_length, seed=3)
    size = blocks.blocks_per_epoch
    windows = {
        tuple(tokens[start : start + context_length + 1]): start for start in range(len(tokens) - context_length)
    }
    for epoch in range(4):
        starts = []
        for number in range(epoch * size, (epoch + 1) * size):
            inputs, targets = blocks.read(number)
            assert inputs.shape == targets.shape == (context_length,)
            assert inputs[1:].tolist() == targets[:-1].tolist()
            window = (*inputs.tolist(), int(targets[-1]))
            assert window in windows
            starts.append(windows[window])
        if context_length > 1:  # a window of two tokens may stand in several places
            first = min(starts)
            assert first < context_length
            assert sorted(starts) == list(range(first, first + size * context_length, context_length))
            assert starts != sorted(starts)
            assert len(tokens) - 1 - (first + size * context_length) < 2 * context_length  # little is left over


def test_epochs_differ_in_offset_and_order(folder: Path, stream: TokenStream) -> None:
    """No window comes back in every epoch: 20 epochs cut at many offsets and shuffle each in a way of its own."""
    tokens = [EOS, *plain_tokens(folder)]
    places = {tuple(tokens[start : start + 33]): start for start in range(len(tokens) - 32)}
    blocks = TrainingBlocks(stream, 32, seed=5)
    size = blocks.blocks_per_epoch
    orders, offsets = set(), set()
    for epoch in range(20):
        read = [blocks.read(epoch * size + index) for index in range(size)]
        starts = [places[(*inputs.tolist(), int(targets[-1]))] for inputs, targets in read]
        offsets.add(min(starts))
        orders.add(tuple(np.argsort(starts).tolist()))
    assert len(offsets) > 10 and len(orders) == 20


def test_a_block_is_a_function_of_seed_and_number(stream: TokenStream) -> None:
    """Whatever was read before; and another seed gives another order."""
    forward, backward = TrainingBlocks(stream, 16, seed=9), TrainingBlocks(stream, 16, seed=9)
    numbers = range(3 * forward.blocks_per_epoch)
    read = {number: forward.read(number)[1].tolist() for number in numbers}
    assert all(backward.read(number)[1].tolist() == read[number] for number in reversed(numbers))
    other = TrainingBlocks(stream, 16, seed=10)
    assert sum(other.read(number)[1].tolist() == read[number] for number in numbers) < len(numbers) / 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(ranks: int, stream: TokenStream) -> None:
    """Each rank reads its share of 12 blocks with a reader of its own, in micro-batches of any size."""
    expected = [TrainingBlocks(stream, 16, seed=4).read(number) for number in range(24, 36)]
    share = 12 // ranks
    inputs, targets = [], []
    for rank in range(ranks):
        blocks = TrainingBlocks(stream, 16, seed=4)
        first = 24 + rank * share
        for micro in range(share):
            batch = blocks.batch(range(first + micro, first + micro + 1))
            assert batch[0].shape == (1, 16) and batch[0].dtype == torch.int64
            inputs.append(batch[0])
            targets.append(batch[1])
    assert torch.cat(inputs).tolist() == [block.tolist() for block, _ in expected]
    assert torch.cat(targets).tolist() == [block.tolist() for _, block in expected]
    whole = TrainingBlocks(stream, 16, seed=4).batch(range(24, 36))
    assert torch.equal(whole[0], torch.cat(inputs)) and torch.equal(whole[1], torch.cat(targets))


@pytest.mark.parametrize("length", [1, 5, 9, 18])
def test_too_few_tokens_are_refused(length: int, tmp_path: Path) -> None:
    """A block of 10 at any offset of 0 to 9 needs 19 tokens."""
    manifest = write_shards(tmp_path, [[[7] * (length - 1) + [EOS]]])
    with pytest.raises(UserError, match=f"has {length} tokens, too few for blocks of 10") as caught:
        TrainingBlocks(TokenStream(tmp_path, manifest, "train"), 10, seed=1)
    assert "\n" not in str(caught.value)


def test_just_enough_tokens_make_one_block(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path, [[[*range(10, 28), EOS]]])
    blocks = TrainingBlocks(TokenStream(tmp_path, manifest, "train"), 10, seed=1)
    assert blocks.blocks_per_epoch == 1
    assert all(blocks.read(epoch)[1].shape == (10,) for epoch in range(40))


# Held-out data


@pytest.mark.parametrize(("context_length", "rows"), [(7, 3), (64, 2), (5_000, 2)])
def test_held_out_blocks_cover_every_token_once(
    context_length: int, rows: int, folder: Path, stream: TokenStream
) -> None:
    """In the files' order; what is beyond the end is padding that no loss counts."""
    tokens = plain_tokens(folder)
    seen, before = [], []
    number = 0
    while number * context_length < len(tokens) + context_length:
        inputs, targets = held_out_batch(stream, context_length, range(number, number + rows - 1), rows, IGNORE_INDEX)
        assert inputs.shape == targets.shape == (rows, context_length)
        counted = targets != IGNORE_INDEX
        assert not counted[-1].any()  # rows after the blocks asked for are padding
        assert (inputs[~counted] == 1).all()
        seen += targets[counted].tolist()
        before += inputs[counted].tolist()
        number += rows - 1
    assert seen == tokens
    assert before == [EOS, *tokens[:-1]]


def test_unigram_entropy_equals_a_plain_count(folder: Path, tmp_path: Path, stream: TokenStream) -> None:
    counts = Counter(plain_tokens(folder))
    total = counts.total()
    expected = -sum(count / total * math.log(count / total) for count in counts.values())
    assert unigram_entropy(stream) == pytest.approx(expected, rel=1e-12)
    manifest = write_shards(tmp_path, [[[7, 8, 9, EOS]]])
    assert unigram_entropy(TokenStream(tmp_path, manifest, "train")) == pytest.approx(math.log(4))


MEASURE = """
import sys
from pathlib import Path
from data.shards.blocks import TokenStream, TrainingBlocks

def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

before = anonymous_bytes()
stream = TokenStream(Path(sys.argv[1]), {"files": {"train-00000.idx": {}}}, "train")
blocks = TrainingBlocks(stream, 1024, seed=1)
for number in range(64):
    blocks.read(number)
print(blocks.blocks_per_epoch, anonymous_bytes() - before)
"""


def test_memory_grows_by_8_bytes_a_block_with_the_corpus(tmp_path: Path) -> None:
    """Anonymous memory of a reader of 0.5 and of 2 billion tokens (a sparse file): the slope between them."""
    measured = []
    for documents in (2_000_000, 8_000_000):
        folder = tmp_path / str(documents)
        folder.mkdir()
        lengths = np.full(documents, 250, np.int32)
        write_index(folder / "train-00000", np.dtype(np.uint16), lengths, lengths)
        with (folder / "train-00000.bin").open("wb") as stream:
            stream.truncate(2 * 250 * documents)
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True
        )
        measured.append([int(figure) for figure in result.stdout.split()])
    (blocks, memory), (more_blocks, more_memory) = measured
    slope = (more_memory - memory) / (more_blocks - blocks)
    print(f"{slope:.2f} bytes a block")
    assert more_blocks > 1_900_000 and slope < 10  # a second array would make it 16; an allocator has its moods
