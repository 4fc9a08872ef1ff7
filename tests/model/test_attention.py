"""Segments by a plain loop; the rule of kernels; the variable-length kernel's call, with a plain one in its place."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend

import model.attention
import model.decoder
from model.attention import (
    EVERYTHING,
    Segments,
    attend,
    keep_mask,
    kernel_name,
    kernels,
    segment_mask,
    segment_offsets,
    segment_positions,
    takes_offsets,
)
from model.decoder import documents
from model.loss import compiled_chunk_loss
from tests.model.shapes import small_config, small_decoder

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_segments_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    for _ in range(50):
        segments = (torch.rand(3, 17) < 0.2).cumsum(1)
        positions, offsets, mask = torch.zeros(3, 17), [], torch.zeros(3, 1, 17, 17, dtype=torch.bool)
        for row in range(3):
            start = 0
            for column in range(17):
                if column == 0 or segments[row, column] != segments[row, column - 1]:
                    start = column
                    offsets.append(17 * row + column)
                positions[row, column] = column - start
                mask[row, 0, column, start : column + 1] = True
        assert torch.equal(segment_positions(segments), positions.long())
        assert torch.equal(segment_mask(segments), mask)
        assert segment_offsets(segments).tolist() == [*offsets, 51]
        assert segment_offsets(segments).dtype == torch.int32


@pytest.mark.parametrize(
    ("device", "dtype", "head_size", "taken"),
    [
        (GPU, torch.bfloat16, 64, True),
        (GPU, torch.float16, 64, True),
        (GPU, torch.float32, 64, False),
        (GPU, torch.bfloat16, 12, False),
        (CPU, torch.bfloat16, 64, False),
    ],
)
def test_the_variable_length_kernel_serves_where_it_can(
    device: torch.device, dtype: torch.dtype, head_size: int, taken: bool
) -> None:
    assert takes_offsets(device, dtype, head_size) is taken


def test_the_variable_length_kernel_takes_our_call_and_has_a_gradient() -> None:
    """On the device "meta" torch checks arguments and shapes of the real operation, and computes nothing."""
    query, key, value = torch.empty(3, 2, 20, 5, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    offsets = torch.empty(7, device="meta", dtype=torch.int32)
    for dropout in (0.0, 0.1):
        out = attend(query, key, value, Segments(None, offsets), dropout)
        assert out.shape == (2, 20, 5, 8) and out.dtype == torch.bfloat16
        gradients = torch.autograd.grad(out.sum(), (query, key, value))
        assert [each.shape for each in gradients] == [query.shape] * 3


def test_cudnn_serves_only_where_it_does_not_round_the_dropout() -> None:
    assert all(SDPBackend.CUDNN_ATTENTION in kernels(dropout) for dropout in (0.0, 0.125, 0.5))
    assert all(SDPBackend.CUDNN_ATTENTION not in kernels(dropout) for dropout in (0.1, 0.2, 0.05))
    assert all(SDPBackend.FLASH_ATTENTION in kernels(dropout) for dropout in (0.0, 0.1))


def plain_varlen(query: Any, key: Any, value: Any, offsets_q: Any, offsets_k: Any, *rest: Any) -> tuple[Any, ...]:
    """aten._flash_attention_forward by a loop, which checks what it is given."""
    longest_q, longest_k, dropout, is_causal, return_debug_mask = rest
    assert query.shape == (40, 5, 12) and longest_q == longest_k == 20
    assert is_causal and not return_debug_mask and dropout == 0
    assert offsets_q is offsets_k and offsets_q.dtype == torch.int32
    pieces = []
    for start, stop in itertools.pairwise(offsets_q):
        parts = [tensor[start:stop].transpose(0, 1) for tensor in (query, key, value)]
        pieces.append(F.scaled_dot_product_attention(*parts, is_causal=True).transpose(0, 1))
    return torch.cat(pieces), None, None, None, None


def test_offsets_give_what_the_mask_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs on GPUs alone; a loop over the sequences stands in for it."""
    monkeypatch.setattr(model.attention, "flash_attention", plain_varlen)
    query, key, value = torch.randn(3, 2, 20, 5, 12)
    segments = (torch.rand(2, 20) < 0.2).cumsum(1)
    by_offsets = attend(query, key, value, Segments(None, segment_offsets(segments)), 0.0)
    by_mask = attend(query, key, value, Segments(segment_mask(segments), None), 0.0)
    assert torch.allclose(by_offsets, by_mask, atol=1e-6)


def test_another_number_of_documents_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder as on a GPU: offsets, compiled layers."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **more: real(function, backend="aot_eager", **more))
    monkeypatch.setattr(model.attention, "flash_attention", plain_varlen)
    monkeypatch.setattr(model.decoder, "takes_offsets", lambda *_: True)
    found_by_the_model: list[Tensor] = []
    monkeypatch.setattr(model.decoder, "segment_offsets", lambda segments: found_by_the_model.append(segments))
    torch._dynamo.reset()
    compiled_chunk_loss.cache_clear()
    compiled, plain = small_decoder(boundaries="document"), small_decoder(boundaries="document")
    compiled.compile_layers()
    graphs = []
    for number in (1, 3, 7, 4):
        ids = torch.randint(4, 101, (2, 20))
        ids[:, :number] = 2
        compiled.zero_grad()
        plain.zero_grad()
        for decoder in (compiled, plain):
            decoder(ids, ids, segment_offsets(documents(ids, 2))).backward()
        for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None and torch.allclose(one.grad, other.grad, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    compiled_chunk_loss.cache_clear()
    assert graphs[0] == graphs[-1], graphs
    assert not found_by_the_model  # on a GPU it would wait for them


@pytest.mark.parametrize("documents", [False, True])
def test_dropout_on_a_cpu_is_that_of_the_probabilities(documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients against a plain one with the same draws."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 13, 3, 8, requires_grad=True) for _ in range(3))
    segments = (torch.rand(2, 13) < 0.3).cumsum(1) if documents else torch.zeros(2, 13)
    keep = torch.rand(2, 3, 13, 13) >= 0.3
    monkeypatch.setattr(model.attention, "keep_mask", lambda shape, dropout: keep)
    out = attend(query, key, value, Segments(segment_mask(segments), None) if documents else EVERYTHING, 0.3)
    slope = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (query, key, value), slope)
    scores = torch.einsum("bqnd,bknd->bnqk", query, key) / math.sqrt(8)
    probabilities = scores.where(segment_mask(segments), -torch.inf).softmax(-1)
    plain = torch.einsum("bnqk,bknd->bqnd", torch.where(keep, probabilities / 0.7, 0.0), value)
    assert torch.allclose(out, plain, atol=1e-6)
    for one, other in zip(gradients, torch.autograd.grad(plain, (query, key, value), slope), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_draws_are_kept_with_their_probability_and_independent() -> None:
    torch.manual_seed(0)
    for dropout in (0.1, 0.5, 0.0001):
        keep = keep_mask((7, 3, 333, 333), dropout)
        count = keep.numel()
        rate = keep.sum().item() / count
        assert abs(rate - (1 - dropout)) < 5 * math.sqrt(dropout * (1 - dropout) / count) + 2**-16
        for distance in (1, 2, 3, 4):
            first, second = keep.flatten()[:-distance], keep.flatten()[distance:]
            both = (~first & ~second).sum().item() / count
            assert abs(both - dropout**2) < 5 * math.sqrt(dropout**2 / count) + 2**-15 * dropout
    assert not torch.equal(keep_mask((999,), 0.5), keep_mask((999,), 0.5))


def test_dropout_on_a_cpu_keeps_no_probabilities() -> None:
    """Probabilities are T x T in floats; what is kept for the backward pass is T x D, and a byte for each draw."""
    query, key, value = (torch.randn(1, 200, 2, 8, requires_grad=True) for _ in range(3))
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        attend(query, key, value, EVERYTHING, 0.1)
    assert max(sizes) == 200 * 200 * 2 and sum(sizes) < 2 * 200 * 200 * 2


def test_the_kernel_is_named() -> None:
    plain, dropout = small_config(), small_config(attention_probs_dropout_prob=0.1)
    documents = small_config(boundaries="document")
    assert kernel_name(plain, CPU, torch.float32, 40) == "flash"
    assert kernel_name(dropout, CPU, torch.bfloat16, 40) == "recomputed (a CPU has no fused kernel with dropout)"
    assert kernel_name(documents, CPU, torch.float32, 40) == "flash, document mask"
    assert kernel_name(
        small_config(boundaries="document", num_attention_heads=3, hidden_size=72), GPU, torch.bfloat16, 40
    ) == ("flash over variable lengths")
