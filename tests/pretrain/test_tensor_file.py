"""Files written from ranks' pieces: the bytes of `safetensors`, whatever the pieces are."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.decoder import Decoder
from model.hf import from_hf
from pretrain import tensor_file
from pretrain.tensor_file import Fragment, Layout, read_fragments, read_share, write_share, write_tensors
from tests.model.shapes import small_config


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(1)
    return Decoder(small_config(vocab_size=83))  # the embedding is padded, and q, k and v are apart in a file


def cut(state: dict[str, Tensor], ranks: int, rng: random.Random) -> list[list[Fragment]]:
    """Every parameter cut at random places, each part held by a rank drawn at random."""
    shares: list[list[Fragment]] = [[] for _ in range(ranks)]
    for name, tensor in state.items():
        cuts = sorted({0, tensor.numel(), *(rng.randrange(tensor.numel()) for _ in range(rng.randrange(6)))})
        for start, stop in itertools.pairwise(cuts):
            rng.choice(shares).append((name, start, tensor.flatten()[start:stop]))
    return shares


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_pieces_of_any_cut_give_the_bytes_of_safetensors(
    ranks: int, decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK", 100)  # numbers
    state = dict(decoder.named_parameters())
    state = {name: parameter.detach() for name, parameter in state.items()}
    layout, rng = Layout(decoder), random.Random(ranks)
    save_file(decoder.to_hf(state), tmp_path / "theirs", metadata={"format": "pt"})
    for _ in range(20):
        own, *others = cut(state, ranks, rng)
        paths = [tmp_path / f"share-{number}" for number in range(len(others))]
        for path, share in zip(paths, others, strict=True):
            write_share(path, layout.pieces(share))
        parts = [layout.pieces(own), *map(read_share, paths)]
        write_tensors(tmp_path / "ours", layout.shapes(state), parts)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        read = {name: torch.full_like(tensor, 7.0) for name, tensor in state.items()}
        for share in cut(read, ranks, rng):
            read_fragments(tmp_path / "ours", layout, share)
        expected = from_hf(load_file(tmp_path / "theirs"))
        assert all(torch.equal(read[name], expected[name]) for name in state)


def test_a_rank_reads_what_it_holds_and_little_at_once(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffers of a read: none is longer than a chunk, and together they are the half that is asked for."""
    state = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    layout = Layout(decoder)
    save_file(decoder.to_hf(state), tmp_path / "file", metadata={"format": "pt"})
    halves = [(name, 0, torch.empty(tensor.numel() // 2)) for name, tensor in state.items()]
    buffers, empty = [], torch.empty
    monkeypatch.setattr(tensor_file, "CHUNK", 100)
    monkeypatch.setattr(torch, "empty", lambda size: buffers.append(size) or empty(size))
    read_fragments(tmp_path / "file", layout, halves)
    assert max(buffers) == 100 and sum(buffers) == sum(values.numel() for _, _, values in halves)


def test_a_share_that_changed_is_an_error(decoder: Decoder, tmp_path: Path) -> None:
    layout, state = Layout(decoder), {name: each.detach() for name, each in decoder.named_parameters()}
    write_share(tmp_path / "share", layout.pieces([(name, 0, tensor.view(-1)) for name, tensor in state.items()]))
    content = bytearray((tmp_path / "share").read_bytes())
    content[1234] ^= 1
    (tmp_path / "share").write_bytes(content)
    with pytest.raises(RuntimeError, match="share: reads back differently"):
        write_tensors(tmp_path / "ours", layout.shapes(state), [read_share(tmp_path / "share")])


@pytest.mark.parametrize("fault", ["gap", "overlap", "missing"])
def test_pieces_that_do_not_fit_are_an_error(fault: str, decoder: Decoder, tmp_path: Path) -> None:
    layout, state = Layout(decoder), {name: each.detach() for name, each in decoder.named_parameters()}
    fragments = [(name, 0, tensor.view(-1)) for name, tensor in state.items()]
    name, start, values = fragments[3]
    fragments[3] = (name, 1, values[1:])
    if fault != "gap":
        fragments.append((name, start, values[:2]) if fault == "overlap" else (name, start, values[:1]))
    if fault == "missing":
        del fragments[5]
    with pytest.raises(AssertionError):
        write_tensors(tmp_path / "ours", layout.shapes(state), [layout.pieces(fragments)])
