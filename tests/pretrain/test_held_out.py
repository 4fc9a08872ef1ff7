"""The held-out loss against a plain count over the stream."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from data.common.files import read_manifest
from data.shards.blocks import TokenStream
from model.decoder import Decoder
from pretrain.held_out import held_out_loss, to_device
from pretrain.objectives.next_token import HeldOutBlocks
from pretrain.recipe import load_recipe
from tests.pretrain.runs import settings
from tests.ranks import Ranks


def evaluate_case(shards: Path, max_blocks: int) -> tuple[dict[str, float], float, int]:
    """The result, and the same loss counted plainly: token by token over the stream, one block at a time."""
    manifest = read_manifest(shards, "shards")
    stream = TokenStream(shards, manifest, "validation")
    recipe = load_recipe("tiny", settings(shards, shards))
    torch.manual_seed(3)
    decoder = Decoder(recipe.decoder_config(manifest["counts"]["vocabulary"])).eval()
    result = held_out_loss(decoder, {"": HeldOutBlocks(stream, 64)}, 5, torch.device("cpu"), max_blocks)

    tokens = stream.read(0, len(stream)).tolist()[: max_blocks * 64 or None]
    total = 0.0
    for start in range(0, len(tokens), 64):
        block = tokens[start : start + 64]
        before = [tokens[start - 1] if start else 2, *block[:-1]]
        log_probabilities = decoder(torch.tensor([before])).log_softmax(-1)[0]
        total -= sum(log_probabilities[position, token].item() for position, token in enumerate(block))
    return result, total / len(tokens), len(tokens)


@pytest.mark.parametrize("max_blocks", [0, 7])
def test_held_out_loss_on_one_and_two_ranks(
    max_blocks: int, one_rank: Ranks, two_ranks: Ranks, sample_folder: Path
) -> None:
    for ranks in (one_rank, two_ranks):
        for result, expected, tokens in ranks.run(evaluate_case, sample_folder / "shards", max_blocks):
            assert result["tokens"] == tokens
            assert result["loss"] == pytest.approx(expected, rel=1e-6)
            assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_bits_per_byte_count_the_text_of_the_split(one_rank: Ranks, sample_folder: Path) -> None:
    """All bits of the split over all UTF-8 bytes of its texts, read from the corpus itself."""
    import pyarrow.parquet as pq

    texts = pq.read_table(sample_folder / "corpus" / "validation-00000.parquet")["text"].to_pylist()
    result, loss, tokens = one_rank.run(evaluate_case, sample_folder / "shards", 0)[0]
    bits = loss * tokens / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / sum(len(text.encode()) for text in texts), rel=1e-6)


def test_a_copy_to_a_gpu_is_pinned_and_queued_and_one_to_a_cpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU: what is asked of torch is recorded."""
    batch = (torch.zeros(2), torch.ones(3))
    kept = to_device(batch, torch.device("cpu"))
    assert all(one is other for one, other in zip(kept, batch, strict=True))
    pinned: dict[int, torch.Tensor] = {}
    copied: list[Any] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned[id(tensor)] = tensor.clone()
        return pinned[id(tensor)]

    def to(tensor: torch.Tensor, device: torch.device, **how: Any) -> torch.Tensor:
        copied.append((tensor, device, how))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    gpu = torch.device("cuda", 0)
    to_device(batch, gpu)
    assert [id(tensor) for tensor, *_ in copied] == [id(pinned[id(tensor)]) for tensor in batch]
    assert all((device, how) == (gpu, {"non_blocking": True}) for _, device, how in copied)
