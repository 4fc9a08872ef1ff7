"""Attention with torch's fused kernels: causal, over whole blocks or inside the documents packed into them, or masked.

The kernel is chosen by this table:

| device | boundaries | attention dropout | kernel |
|---|---|---|---|
| any | none | 0 | SDPA with `is_causal`: the fused kernel that torch prefers (cuDNN, flash, efficient; CPU: flash) |
| GPU | none | > 0 | the same, without cuDNN where it would round the dropout (see `kernels`) |
| GPU, half precision, head size a multiple of 8 | document | any | flash over sequences of variable length |
| any other | a source's padding | any | SDPA with a mask of the keys |
| any other | document | any | SDPA with an exact boolean mask |
| CPU | any | > 0 | our own, which recomputes probabilities in the backward pass; CPUs have no fused kernel for it |

Letters in tensor names: B batch, T positions of queries, K of keys, N heads, D head size, S sequences.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from model.config import DecoderConfig

HALF = (torch.bfloat16, torch.float16)
flash_attention = torch.ops.aten._flash_attention_forward


class Segments(NamedTuple):
    """What attention sees, as a mask or as offsets. At least one of the two tensors is None."""

    mask_B1TK: Tensor | None
    """True if the query (row) sees the key (column). (B, 1, 1, K) holds for every query."""
    offsets_S: Tensor | None
    """int32: where each sequence begins in the B x T tokens, flattened, and B x T at the end."""


EVERYTHING = Segments(None, None)
"""Causal attention over whole blocks."""


def both_ways(real_BK: Tensor) -> Segments:
    """Every query sees all real keys, before and after it. At least one key of each row must be real."""
    return Segments(real_BK[:, None, None, :], None)


def takes_offsets(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether the kernel for sequences of variable length can be used."""
    return device.type == "cuda" and dtype in HALF and head_size % 8 == 0


def kernels(dropout: float) -> list[SDPBackend]:
    """The kernels that torch may choose from.

    Some of cuDNN's round the dropout to a multiple of 1/16, and torch 2.11 may choose them all the same (pytorch pull
    request 174245).
    """
    exact = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return exact if 16 * dropout % 1 else [SDPBackend.CUDNN_ATTENTION, *exact]


def segment_positions(segments_BT: Tensor) -> Tensor:
    """Position of each token in its segment, (B, T). A segment is a run of equal numbers."""
    index_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    return index_T - torch.where(begins(segments_BT), index_T, 0).cummax(1).values


def begins(segments_BT: Tensor) -> Tensor:
    """True for the first token of each segment, (B, T)."""
    first_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    first_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return first_BT


def segment_mask(segments_BT: Tensor) -> Tensor:
    """(B, 1, T, T): True if the key is in the query's segment and not after the query."""
    return (segments_BT[:, None, :, None] == segments_BT[:, None, None, :]).tril()


def segment_offsets(segments_BT: Tensor) -> Tensor:
    """(S + 1,) int32: where each segment begins in the B x T tokens, flattened, and B x T."""
    return F.pad(begins(segments_BT).flatten().nonzero().flatten(), (0, 1), value=segments_BT.numel()).int()


def kernel_name(config: DecoderConfig, device: torch.device, dtype: torch.dtype, length: int) -> str:
    """The kernel of a training step with blocks of `length` tokens, with a reason where a faster one exists.

    torch itself is asked which one it chooses.
    """
    dropout, heads = config.attention_probs_dropout_prob, config.num_attention_heads
    head_size = config.hidden_size // heads
    masked = config.boundaries == "document"
    if masked and takes_offsets(device, dtype, head_size):
        return "flash over variable lengths"
    sample = torch.empty(1, heads, length, head_size, device=device, dtype=dtype, requires_grad=True)
    mask = torch.ones(1, 1, length, length, device=device, dtype=torch.bool) if masked else None
    with sdpa_kernel(kernels(dropout)):
        chosen = torch._fused_sdp_choice(  # pyright: ignore[reportPrivateImportUsage]
            sample, sample, sample, mask, dropout, not masked
        )
    name, reasons = SDPBackend(chosen).name.lower().removesuffix("_attention"), []
    if unfused(device, dropout):
        name, reasons = "recomputed", ["a CPU has no fused kernel with dropout"]
    elif device.type == "cuda" and SDPBackend.CUDNN_ATTENTION not in kernels(dropout):
        reasons = [f"cuDNN would round dropout {dropout}"]
    if masked and device.type == "cuda":
        reasons.append("variable lengths need bf16 or fp16, and heads of a multiple of 8")
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{name}{', document mask' * masked}{why}"


def unfused(device: torch.device, dropout: float) -> bool:
    """Whether torch's own kernel would keep the attention probabilities for the backward pass."""
    return device.type == "cpu" and dropout > 0


def attend(query_BTND: Tensor, key_BTND: Tensor, value_BTND: Tensor, segments: Segments, dropout: float) -> Tensor:
    """Attention to what `segments` says, (B, T, N, D). Keys and values are (B, K, N, D)."""
    if segments.offsets_S is not None:
        arguments = (query_BTND, key_BTND, value_BTND, segments.offsets_S, dropout)
        return _attend_offsets(*arguments)  # pyright: ignore[reportCallIssue]
    query_BNTD, key_BNTD, value_BNTD = (tensor.transpose(1, 2) for tensor in (query_BTND, key_BTND, value_BTND))
    mask_B1TK = segments.mask_B1TK
    if unfused(query_BTND.device, dropout):
        keep_BNTK = keep_mask((*query_BNTD.shape[:3], key_BNTD.shape[2]), dropout)
        arguments = (query_BNTD, key_BNTD, value_BNTD, mask_B1TK, keep_BNTK, dropout)
        out_BNTD = checkpoint(_attend_unfused, *arguments, use_reentrant=False, preserve_rng_state=False)
        return out_BNTD.transpose(1, 2)  # type: ignore[union-attr]
    with sdpa_kernel(kernels(dropout)):
        out_BNTD = F.scaled_dot_product_attention(
            query_BNTD, key_BNTD, value_BNTD, attn_mask=mask_B1TK, dropout_p=dropout, is_causal=mask_B1TK is None
        )
    return out_BNTD.transpose(1, 2)


def keep_mask(shape: tuple[int, ...], dropout: float) -> Tensor:
    """True with probability 1 - dropout, to within 2^-16.

    One 64-bit draw is split into four elements: bernoulli_ takes twice as long.
    """
    draws = torch.empty(-(-math.prod(shape) // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return (draws[: math.prod(shape)] >= round(dropout * 2**16) - 2**15).view(shape)


def _attend_unfused(
    query_BNTD: Tensor,
    key_BNTD: Tensor,
    value_BNTD: Tensor,
    mask_B1TK: Tensor | None,
    keep_BNTK: Tensor,
    dropout: float,
) -> Tensor:
    scores_BNTK = query_BNTD @ (key_BNTD * query_BNTD.shape[-1] ** -0.5).transpose(2, 3)
    if mask_B1TK is None:
        mask_B1TK = torch.ones(scores_BNTK.shape[2:], dtype=torch.bool).tril()
    probabilities_BNTK = scores_BNTK.masked_fill(~mask_B1TK, -torch.inf).softmax(-1)
    return (probabilities_BNTK * keep_BNTK) @ (value_BNTD / (1 - dropout))


@torch.compiler.disable  # a kernel of its own anyway, and the number of sequences changes with each batch
def _attend_offsets(
    query_BTND: Tensor, key_BTND: Tensor, value_BTND: Tensor, offsets_S: Tensor, dropout: float
) -> Tensor:
    batch, length = query_BTND.shape[:2]
    query, key, value = (tensor.flatten(0, 1) for tensor in (query_BTND, key_BTND, value_BTND))
    # `torch.nn.attention.varlen` calls the same operation, with dropout 0 alone; nested tensors call it as we do.
    out, *_ = flash_attention(query, key, value, offsets_S, offsets_S, length, length, dropout, True, False)
    return out.unflatten(0, (batch, length))
