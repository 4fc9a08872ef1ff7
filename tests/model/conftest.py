"""Fixtures of the models' tests."""

from collections.abc import Iterator

import pytest
import torch

from model.loss import compiled_chunk_loss


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile by dynamo and AOT autograd, without inductor's C++."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **more: real(function, backend="aot_eager", **more))
    compiled_chunk_loss.cache_clear()
    torch._dynamo.reset()
    yield
    compiled_chunk_loss.cache_clear()
