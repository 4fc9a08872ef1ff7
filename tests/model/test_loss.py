"""The chunked loss against torch's plain one; what it holds at once; the padding of the vocabulary."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

import model.config
import model.loss
from model.decoder import Decoder
from model.loss import (
    chunks,
    compiled_chunk_loss,
    linear_cross_entropy,
    losses_and_slopes,
    losses_and_slopes_in_place,
)
from tests.model.shapes import kept_for_backward, small_config, small_decoder


def problem(rows: int = 50, width: int = 24, vocabulary: int = 101) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a weight padded to 128 rows whose padding is not zero, targets with some that do not count."""
    torch.manual_seed(2)
    hidden, weight = torch.randn(rows, width), torch.randn(128, width)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[::7] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("logits_at_once", [1, 128 * 7, 128 * 50, 2**24])
def test_loss_and_gradients_are_those_of_the_plain_one(logits_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of 1, 7 and all rows, of which the caches hold 3; scaled as the loop scales it."""
    monkeypatch.setitem(model.loss.CHUNK_LOGITS, "cpu", logits_at_once)
    monkeypatch.setattr(model.loss, "CACHED_LOGITS", 128 * 3)
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets, 101)
    (loss / 37).backward()
    plain_hidden, plain_weight, _ = problem()
    plain = F.cross_entropy(plain_hidden @ plain_weight[:101].T, targets, reduction="sum")
    (plain / 37).backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert hidden.grad is not None and weight.grad is not None
    assert plain_hidden.grad is not None and plain_weight.grad is not None
    assert torch.allclose(hidden.grad, plain_hidden.grad, atol=1e-6)
    assert torch.allclose(weight.grad, plain_weight.grad, atol=1e-6)
    assert not weight.grad[101:].any()
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, 101).item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits_at_once", [1, 128 * 7, 2**24])
def test_a_few_rows_at_a_time_give_the_bits_of_all_at_once(
    logits_at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.loss, "CACHED_LOGITS", logits_at_once)
    torch.manual_seed(3)
    logits, (_, _, targets) = torch.randn(50, 128).to(dtype), problem()
    losses, slopes = losses_and_slopes(logits.clone(), targets, 101, True)
    in_place = logits.clone()
    found, written = losses_and_slopes_in_place(in_place, targets, 101, True)
    assert torch.equal(found, losses) and torch.equal(written, slopes.to(dtype))
    assert written.data_ptr() == in_place.data_ptr()


def test_rows_without_a_target_cost_nothing() -> None:
    hidden, weight, targets = problem(640)
    targets[6:] = -100
    with Largest() as largest:
        loss = linear_cross_entropy(hidden, weight, targets, 101)
    assert largest.numbers == weight.numel() < 640 * 128
    assert loss.item() == pytest.approx(linear_cross_entropy(hidden[:6], weight, targets[:6], 101).item(), rel=1e-6)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), 101)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert not loss and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("chunk", [8, 400])
def test_in_bf16_gradients_are_as_near_to_fp32s_as_the_plain_ones(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 43 chunks, and in one: added up in bf16, the weight's gradient would lose by each."""
    monkeypatch.setitem(model.loss.CHUNK_LOGITS, "cpu", 128 * chunk)
    exact_hidden, exact_weight, targets = problem(400)
    F.cross_entropy(exact_hidden @ exact_weight[:101].T, targets, reduction="sum").div(1000).backward()
    errors = []
    for fused in (True, False):
        hidden, weight = (tensor.detach().bfloat16().requires_grad_() for tensor in (exact_hidden, exact_weight))
        if fused:
            loss = linear_cross_entropy(hidden, weight, targets, 101)
        else:
            loss = F.cross_entropy((hidden @ weight[:101].T).float(), targets, reduction="sum")
        loss.div(1000).backward()
        assert hidden.grad is not None and weight.grad is not None and weight.grad.dtype == torch.bfloat16
        assert exact_hidden.grad is not None and exact_weight.grad is not None
        errors.append(
            [
                (hidden.grad.float() - exact_hidden.grad).norm() / exact_hidden.grad.norm(),
                (weight.grad.float() - exact_weight.grad).norm() / exact_weight.grad.norm(),
            ]
        )
    assert all(ours < 1.1 * plain for ours, plain in zip(*errors, strict=True)), errors


class Largest(TorchDispatchMode):
    """The most numbers that any operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_no_more_logits_than_a_chunk_are_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.loss.CHUNK_LOGITS, "cpu", 128 * 64)
    hidden, weight, targets = problem(640)
    with Largest() as ours, kept_for_backward() as kept:
        linear_cross_entropy(hidden, weight, targets, 101).backward()
    with Largest() as plain, kept_for_backward() as plain_kept:
        F.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()
    assert plain.numbers == 640 * 128
    assert ours.numbers <= max(128 * 64, hidden.numel(), weight.numel()) < plain.numbers / 4
    # From the forward to the backward pass: the two gradients, where the plain one keeps all logits.
    assert sum(kept.values()) <= hidden.nbytes + weight.nbytes < sum(plain_kept.values()) / 4
    assert [rows.stop - rows.start for rows in chunks(hidden, weight, compiled=False)] == [64] * 10


def test_a_padded_vocabulary_trains_as_an_unpadded_one_and_its_padding_stays_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten steps of AdamW with weight decay; 101 words in 128 rows beside 101 rows."""
    padded = Decoder(small_config())
    state = {name: tensor.clone() for name, tensor in padded.state_dict().items()}
    monkeypatch.setattr(model.config, "VOCABULARY_MULTIPLE", 1)
    unpadded = Decoder(small_config())
    assert unpadded.embed_tokens.weight.shape == (101, 60)
    unpadded.load_state_dict(state | {"embed_tokens.weight": state["embed_tokens.weight"][:101]})
    losses = []
    for decoder in (padded, unpadded):
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2, weight_decay=0.1)
        generator = torch.Generator().manual_seed(4)
        losses.append([])
        for _ in range(10):
            ids = torch.randint(4, 101, (4, 21), generator=generator)
            loss = decoder(ids[:, :-1], ids[:, 1:]) / 80
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=2e-5) and losses[0][-1] < losses[0][0] - 0.1
    assert not padded.embed_tokens.weight[101:].any()
    assert torch.allclose(padded.embed_tokens.weight[:101], unpadded.embed_tokens.weight, atol=1e-4)


def test_the_decoders_loss_is_the_sum_over_targets_that_count() -> None:
    decoder = small_decoder().eval()
    ids, targets = torch.randint(4, 101, (2, 10)), torch.randint(4, 101, (2, 10))
    targets[1, 3:] = -100
    log_probabilities = decoder(ids).log_softmax(-1)
    expected = sum(
        -log_probabilities[row, position, target].item()
        for row in range(2)
        for position, target in enumerate(targets[row].tolist())
        if target != -100
    )
    assert decoder(ids, targets).item() == pytest.approx(expected, rel=1e-5)


def sizes(rows: int, compiled: bool) -> list[int]:
    hidden, weight = torch.zeros(rows, 1), torch.zeros(128, 1)
    return [min(each.stop, rows) - each.start for each in chunks(hidden, weight, compiled)]


def test_compiled_chunks_are_equal_where_the_rows_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.loss.CHUNK_LOGITS, "cpu", 128 * 100)
    monkeypatch.setitem(model.loss.COMPILED_CHUNK_LOGITS, "cpu", 128 * 100)
    assert sizes(640, compiled=False) == [100] * 6 + [40]
    assert sizes(640, compiled=True) == [80] * 8
    assert sizes(100, compiled=True) == [100] and sizes(64, compiled=True) == [64]
    assert sizes(211, compiled=True) == [100, 100, 11]  # a prime


def test_the_compiled_loss_is_the_plain_one_in_two_graphs_that_hold_the_logits_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A graph with gradients and one without, though 640 rows do not divide into chunks of the usual size."""
    monkeypatch.setitem(model.loss.COMPILED_CHUNK_LOGITS, "cpu", 128 * 100)
    torch._dynamo.reset()
    compiled_chunk_loss.cache_clear()
    counters.clear()
    hidden, weight, targets = (tensor.detach() for tensor in problem(640))
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()

    def train_and_evaluate() -> float:
        loss = linear_cross_entropy(hidden, weight, targets, 101, compiled=True)
        loss.backward()
        with torch.no_grad():
            assert linear_cross_entropy(hidden, weight, targets, 101, compiled=True).item() == loss.item()
        return loss.item()

    try:
        found, codes = run_and_get_code(train_and_evaluate)
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    finally:
        compiled_chunk_loss.cache_clear()
    allocations = [line for line in codes[0].splitlines() if "= empty_strided_cpu((80, 128)" in line]
    assert len(allocations) == 1 and "bfloat16" in allocations[0], allocations
    exact = F.cross_entropy(hidden.double() @ weight.double()[:101].T, targets, reduction="sum")
    of_hidden, of_weight = torch.autograd.grad(exact, (hidden, weight))
    assert found == pytest.approx(exact.item(), rel=1e-3)
    assert hidden.grad is not None and weight.grad is not None
    assert (hidden.grad - of_hidden).norm() < 1e-2 * of_hidden.norm()
    assert (weight.grad - of_weight).norm() < 1e-2 * of_weight.norm() and not weight.grad[101:].any()
