"""Held-out loss, perplexity and bits per byte."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.blocks import IGNORED, TokenStream, held_out_batch

NegativeLogLikelihood = Callable[[Tensor, Tensor], Tensor]
"""(inputs (B, T), targets (B, T)) -> summed negative log-likelihood in nats."""


@torch.no_grad()
def held_out_loss(
    model: NegativeLogLikelihood,
    stream: TokenStream,
    context_length: int,
    batch_size: int,
    device: torch.device,
    max_blocks: int = 0,
) -> dict[str, Any]:
    """Loss in nats a token over a stream cut into blocks, with its perplexity and bits per byte of text.

    All ranks take part with equal numbers of batches, as ZeRO-3 needs. max_blocks: the first so many; 0: all.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    blocks = math.ceil(len(stream) / context_length)
    blocks = min(blocks, max_blocks) if max_blocks else blocks
    totals = torch.zeros(2, dtype=torch.float64)
    for start in range(0, blocks, batch_size * ranks):
        first = start + rank * batch_size
        inputs, targets = held_out_batch(stream, context_length, range(first, first + batch_size))
        targets[max(blocks - first, 0) :] = IGNORED
        totals[0] += model(inputs.to(device), targets.to(device)).double().cpu()
        totals[1] += (targets != IGNORED).sum()
    if ranks > 1:
        totals = totals.to(device)
        dist.all_reduce(totals)
    loss, tokens = float(totals[0] / totals[1]), int(totals[1])
    bits_per_token, tokens_per_byte = loss / math.log(2), len(stream) / max(stream.text_bytes, 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits_per_token * tokens_per_byte,
        "tokens": tokens,
    }
