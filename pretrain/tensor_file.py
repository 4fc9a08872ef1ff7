"""safetensors files by ranges: written from pieces of tensors that several ranks hold, and read into such pieces.

`safetensors` writes and reads whole tensors, which a rank of a large model has no memory for. The format is
https://github.com/huggingface/safetensors#format: the length of a JSON header in 8 bytes, the header, the numbers.
"""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.common.files import read_json, write_json
from model.architecture import Architecture

CHUNK = 4 << 20  # numbers that are on their way at once: 16 MB
Fragment = tuple[str, int, Tensor]
"""A run of numbers of one of our parameters: its name, where in the flattened parameter it starts, the numbers."""


class Piece(NamedTuple):
    """A run of numbers of one tensor of a file."""

    tensor: str
    """By transformers' name."""
    start: int
    """Where it starts in the flattened tensor."""
    length: int
    chunks: Callable[[], Iterator[Any]]
    """Its numbers as bytes: fp32, little-endian."""


class Layout:
    """Where the numbers of a model's parameters lie in its files, which have transformers' names and no padding."""

    def __init__(self, model: Architecture) -> None:
        self._views: dict[str, dict[str, Tensor]] = {}
        for name, parameter in model.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves a parameter empty
            self._views[name] = model.to_hf({name: torch.empty(shape, device="meta")})
            assert all(view.is_contiguous() for view in self._views[name].values()), name

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """The tensors of a file with these parameters: name -> shape, in the order of the file."""
        views = {tensor: view for name in names for tensor, view in self._views[name].items()}
        return {tensor: tuple(view.shape) for tensor, view in sorted(views.items())}

    def ranges(self, fragment: Fragment) -> Iterator[tuple[str, int, Tensor]]:
        """Tensor of the file, start in it, numbers: what a fragment holds of it. Padding is left out."""
        name, start, values = fragment
        for tensor, view in self._views[name].items():
            first = max(start, int(view.storage_offset()))
            last = min(start + values.numel(), int(view.storage_offset()) + view.numel())
            if first < last:
                yield tensor, first - int(view.storage_offset()), values[first - start : last - start]

    def pieces(self, fragments: Iterable[Fragment]) -> list[Piece]:
        """The pieces of a file that these fragments hold, in its order."""
        found = [
            Piece(tensor, start, values.numel(), lambda values=values: _bytes(values))
            for fragment in fragments
            for tensor, start, values in self.ranges(fragment)
        ]
        return sorted(found, key=_place)


def _place(piece: Piece) -> tuple[str, int]:
    return piece.tensor, piece.start


def _bytes(values: Tensor) -> Iterator[Any]:
    for chunk in values.split(CHUNK):
        yield chunk.cpu().numpy().data.cast("B")


def all_finite(values: Tensor) -> bool:
    """Whether no number is an infinity or NaN, in one pass and without a copy."""
    return not values.numel() or bool(torch.isfinite(torch.stack(values.aminmax())).all())


def write_share(path: Path, pieces: list[Piece]) -> None:
    """Write a rank's pieces to a file of its own, and beside it what they are. `read_share` gives them to rank 0."""
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for piece in pieces:
            for chunk in piece.chunks():
                digest.update(chunk)
                stream.write(chunk)
    index = {"pieces": [piece[:3] for piece in pieces], "sha256": digest.hexdigest()}
    write_json(_index(path), index)


def read_share(path: Path) -> Iterator[Piece]:
    """The pieces of a share. Each must be read before the next is asked for.

    Raises RuntimeError at its end if the bytes are not those that were written.
    """
    index, digest = read_json(_index(path)), hashlib.sha256()

    def chunks(count: int) -> Iterator[bytes]:
        for first in range(0, count, CHUNK):
            chunk = stream.read(4 * min(CHUNK, count - first))
            digest.update(chunk)
            yield chunk

    with path.open("rb") as stream:
        for tensor, start, count in index["pieces"]:
            yield Piece(tensor, start, count, lambda count=count: chunks(count))
    if digest.hexdigest() != index["sha256"]:
        raise RuntimeError(f"{path}: reads back differently than it was written; check the disk")


def remove_share(path: Path) -> None:
    """Remove the files of a share."""
    path.unlink()
    _index(path).unlink()


def _index(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], parts: list[Iterable[Piece]]) -> str:
    """Write a safetensors file, as `safetensors.torch.save_file` does, from the pieces of all ranks.

    parts: for each rank its pieces, in the order of the file. Returns the sha256 of what was written. Raises
    AssertionError if the pieces leave a gap or overlap.
    """
    digest, pieces = hashlib.sha256(), heapq.merge(*parts, key=_place)
    with path.open("wb") as stream:

        def write(content: Any) -> None:
            digest.update(content)
            stream.write(content)

        write(_header(shapes))
        piece = next(pieces, None)
        for tensor, shape in shapes.items():
            reached, count = 0, torch.Size(shape).numel()
            while piece and piece.tensor == tensor:
                assert piece.start == reached, (tensor, piece.start, reached)
                for chunk in piece.chunks():
                    write(chunk)
                reached += piece.length
                piece = next(pieces, None)
            assert reached == count, (tensor, reached, count)
        assert piece is None, piece
    return digest.hexdigest()


def _header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        entries[tensor] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def read_fragments(path: Path, layout: Layout, fragments: Iterable[Fragment]) -> None:
    """Fill the fragments from a verified safetensors file of fp32. Padding, which the file has not, becomes 0.

    Raises KeyError if the file lacks a tensor.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        for fragment in fragments:
            fragment[2].zero_()
            for tensor, start, values in layout.ranges(fragment):
                stream.seek(8 + length + header[tensor]["data_offsets"][0] + 4 * start)
                for chunk in values.split(CHUNK):
                    buffer = torch.empty(len(chunk))
                    stream.readinto(buffer.numpy().data.cast("B"))
                    chunk.copy_(buffer)
