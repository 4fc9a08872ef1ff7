"""Cross entropy on the tied head without ever holding all logits.

Rows are processed in chunks. For each chunk the logits, the loss and the gradients of the hidden states and the weight
are computed together, so that no logits outlive a chunk, as in Liger's fused linear cross entropy (Hsu et al. 2024).

Letters in tensor names: R rows (positions of all blocks), H hidden size, V vocabulary padded.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from model.config import CACHED_LOGITS, CHUNK_LOGITS, COMPILED_CHUNK_LOGITS

IGNORE_INDEX = -100
"""Targets with this value do not count, as in torch and transformers."""
ChunkLoss = Callable[..., tuple[Tensor, ...]]


def linear_cross_entropy(
    hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, vocabulary: int, compiled: bool = False
) -> Tensor:
    """Summed negative log-likelihood in nats of targets under softmax(hidden @ weight.T), a scalar in fp32.

    Rows of the weight from `vocabulary` on never enter the softmax. Targets of -100 do not count.
    """
    if hidden_RH.is_cpu and not compiled:  # a GPU's host would have to wait, and each number of rows be compiled
        hidden_RH, targets_R = rows_with_a_target(hidden_RH, targets_R)
    needs_gradient = torch.is_grad_enabled() and (hidden_RH.requires_grad or weight_VH.requires_grad)
    if needs_gradient:
        return _LinearCrossEntropy.apply(hidden_RH, weight_VH, targets_R, vocabulary, compiled)  # type: ignore[return-value]
    chunk = compiled_chunk_loss() if compiled else chunk_loss
    total = torch.zeros((), device=hidden_RH.device)
    for rows in chunks(hidden_RH, weight_VH, compiled):
        total += chunk(hidden_RH[rows], weight_VH, targets_R[rows], vocabulary, False)[0]
    return total


def rows_with_a_target(hidden_RH: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that count, without a copy if all do. The host waits for their number."""
    counted_R = targets_R != IGNORE_INDEX
    if counted_R.all():
        return hidden_RH, targets_R
    return hidden_RH[counted_R], targets_R[counted_R]


def chunks(hidden_RH: Tensor, weight_VH: Tensor, compiled: bool) -> list[slice]:
    """The rows of each chunk. All chunks but the last have the same size.

    If they are compiled, the last has it too where more than half of the usual size divides the rows, because each size
    compiles a graph of its own.
    """
    rows, logits = len(hidden_RH), COMPILED_CHUNK_LOGITS if compiled else CHUNK_LOGITS
    size = max(logits[hidden_RH.device.type] // len(weight_VH), 1)
    if compiled:
        size = largest_divisor(rows, size // 2 + 1, size)
    return [slice(start, start + size) for start in range(0, rows, size)]


@cache
def largest_divisor(number: int, least: int, most: int) -> int:
    """The largest number from `least` to `most` that divides a number, or `most` if there is none."""
    return next((each for each in range(most, least - 1, -1) if number % each == 0), most)


def chunk_loss(
    hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, vocabulary: int, gradients: bool
) -> tuple[Tensor, ...]:
    """The loss of some rows in fp32. With `gradients`, also those of hidden states and weight, in their dtype."""
    find = losses_and_slopes
    if hidden_RH.is_cpu and not torch.compiler.is_compiling():
        find = losses_and_slopes_in_place
    losses_R1, slopes_RV = find(hidden_RH @ weight_VH.T, targets_R, vocabulary, gradients)
    if not gradients:
        return (losses_R1.sum(),)
    slopes_RV = slopes_RV.to(hidden_RH.dtype)
    return losses_R1.sum(), slopes_RV @ weight_VH, slopes_RV.T @ hidden_RH


def losses_and_slopes(logits_RV: Tensor, targets_R: Tensor, vocabulary: int, gradients: bool) -> tuple[Tensor, Tensor]:
    """The loss of each row, (R, 1), and with `gradients` its derivatives by the row's logits, (R, V), both in fp32."""
    counts_R1 = (targets_R != IGNORE_INDEX)[:, None]
    columns_R1 = targets_R[:, None].clamp(min=0)
    logits_RV = logits_RV.float()
    logits_RV[:, vocabulary:] = -torch.inf
    log_softmax_RV = logits_RV.log_softmax(-1)
    losses_R1 = -(log_softmax_RV.gather(1, columns_R1) * counts_R1)
    if not gradients:
        return losses_R1, log_softmax_RV
    del logits_RV
    if torch.compiler.is_compiling():  # a comparison becomes part of the kernel, and a scatter would not
        words_V = torch.arange(log_softmax_RV.shape[1], device=log_softmax_RV.device)
        slopes_RV = log_softmax_RV.exp() - (words_V == columns_R1).float()
    else:
        slopes_RV = log_softmax_RV.exp_()
        slopes_RV.scatter_add_(1, columns_R1, torch.full_like(columns_R1, -1, dtype=slopes_RV.dtype))
    return losses_R1, slopes_RV.mul_(counts_R1)


def losses_and_slopes_in_place(
    logits_RV: Tensor, targets_R: Tensor, vocabulary: int, gradients: bool
) -> tuple[Tensor, Tensor]:
    """The same, a few rows at a time, which stay in a CPU's caches. The slopes take the place of the logits."""
    size = max(CACHED_LOGITS // logits_RV.shape[1], 1)
    losses_R1 = torch.empty(len(targets_R), 1)
    for start in range(0, len(targets_R), size):
        rows = slice(start, start + size)
        losses_R1[rows], slopes_RV = losses_and_slopes(logits_RV[rows], targets_R[rows], vocabulary, gradients)
        if gradients:
            logits_RV[rows] = slopes_RV
    return losses_R1, logits_RV


@cache
def compiled_chunk_loss() -> ChunkLoss:
    """`chunk_loss` compiled by inductor, once for all decoders."""
    return torch.compile(chunk_loss, dynamic=False)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, vocabulary: int, compiled: bool
    ) -> Tensor:
        chunk = compiled_chunk_loss() if compiled else chunk_loss
        total = torch.zeros((), device=hidden_RH.device)
        hidden_gradient_RH = torch.empty_like(hidden_RH)
        of_chunks, weight_gradient_VH = chunks(hidden_RH, weight_VH, compiled), None
        for rows in of_chunks:
            loss, of_hidden, of_weight = chunk(hidden_RH[rows], weight_VH, targets_R[rows], vocabulary, True)
            total += loss
            hidden_gradient_RH[rows] = of_hidden
            if len(of_chunks) == 1:
                weight_gradient_VH = of_weight
            elif weight_gradient_VH is None:
                weight_gradient_VH = of_weight.float()  # chunks add up without rounding
            else:
                weight_gradient_VH += of_weight
        if weight_gradient_VH is None:  # no row counts
            weight_gradient_VH = torch.zeros_like(weight_VH)
        ctx.save_for_backward(hidden_gradient_RH, weight_gradient_VH)
        ctx.dtype = weight_VH.dtype
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        hidden_gradient_RH, weight_gradient_VH = ctx.saved_tensors
        scaled_VH = torch.empty_like(weight_gradient_VH, dtype=ctx.dtype)
        torch.mul(weight_gradient_VH, slope, out=scaled_VH)  # no second fp32 copy
        scaled_RH = (hidden_gradient_RH.float() * slope).to(
            hidden_gradient_RH.dtype
        )  # bf16 cannot represent slope exactly
        return scaled_RH, scaled_VH, None, None, None
