"""Records to fine-tune on: JSON lines -> ids and labels, and padded batches of them. It knows no objective.

A file holds an object on each line, such as {"id": "1", "prompt": "...", "target": "..."}. An objective names the keys
that it needs, and turns each record into `Encoded`: the ids that the model reads and the labels that it learns. Other
keys are ignored. Files are read and encoded once, some records at a time; ids and labels stay in memory. Where an
objective takes `PIECES`, a value is a text or a list of texts and reserved numbers, such as
["What colour is the disc?", 17, 4].
"""

import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args

import numpy as np
import torch

from data.common.files import UserError
from data.text.ids import PAD_ID, reserved_ids

PADDINGS = 8
"""Rows are padded to a multiple of the context length divided by this. So there are few different lengths, each of
which `train.compile` compiles anew, and little padding."""
PIECES = str | list
"""The type of a value that `encode_pieces` encodes."""
KINDS: dict[type | UnionType, str] = {
    str: "a text",
    list: "a list",
    int: "a number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    PIECES: "a text or a list",
}
Keys = Mapping[str, type | UnionType]
"""The keys that each record must have, and the type of their values: one of `KINDS`."""


class Record(NamedTuple):
    """An object of a JSON lines file."""

    place: str
    """The file and the line, for messages."""
    fields: dict[str, Any]


class Encoded(NamedTuple):
    """What a model reads and learns of a record."""

    ids: np.ndarray
    """(T,) int64; at most as many as the context holds."""
    labels: np.ndarray
    """One for each id, or of a target of its own, or as many as every record of the file has. Where nothing counts
    stands `ignore_index`."""
    cut: bool = False
    """Whether the record was longer than the context, so that a part of it is missing."""
    answer: Any = None
    """What predictions are scored by, if they are."""


def read_records(path: Path, keys: Keys) -> list[Record]:
    """The records of a file, in its order.

    Raises UserError that names the file and the line of the first mistake.
    """
    return list(stream_records(path, keys))


def stream_records(path: Path, keys: Keys) -> Iterator[Record]:
    """The same, of which one is in memory at a time. A mistake is found when its line is reached."""
    number = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                yield _read_record(f"{path}: line {number}", line.rstrip(b"\r\n"), keys)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a file of JSON lines") from None
    if not number:
        raise UserError(f"{path}: holds no record")


def _read_record(place: str, line: bytes, keys: Keys) -> Record:
    try:
        fields = json.loads(line)
    except ValueError as error:  # also of bytes that are not UTF-8
        raise UserError(f"{place}: not JSON ({error}); each line must be an object") from None
    if not isinstance(fields, dict):
        raise UserError(f"{place}: is {_kind(fields)}; each line must be an object, {{...}}")
    for key, kind in keys.items():
        if key not in fields:
            raise UserError(f'{place}: has no "{key}"; it has {", ".join(fields) or "no key"}')
        if type(fields[key]) not in (get_args(kind) or (kind,)):
            raise UserError(f'{place}: "{key}" is {_kind(fields[key])}; it must be {KINDS[kind]}')
    return Record(place, fields)


def _kind(value: Any) -> str:
    return KINDS.get(type(value), "null")


def encode_texts(tokenizer: Path, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text by the tokenizer of a folder, int64, without `</s>`."""
    import pyarrow as pa

    from data.text.tokenizer import Tokenizer  # here, because a rank that trains on blocks processes no text

    ids, lengths = Tokenizer(tokenizer).encode_batch(pa.array(texts, pa.string()))
    return np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1])


def encode_pieces(tokenizer: Path, records: Sequence[Record], key: str) -> list[np.ndarray]:
    """The ids of the value that each record has under `key`, of type `PIECES`, int64, without `</s>`.

    Each text of a list is encoded by itself, and number n is the reserved id n of the tokenizer. Raises UserError that
    names the record if its list holds anything else, or a number that the tokenizer does not reserve.
    """
    reserved = reserved_ids(tokenizer)
    values = [_pieces(record, key, len(reserved)) for record in records]
    texts = iter(encode_texts(tokenizer, [piece for pieces in values for piece in pieces if isinstance(piece, str)]))
    nothing = np.zeros(0, np.int64)
    return [
        np.concatenate([nothing, *(next(texts) if isinstance(piece, str) else [reserved[piece]] for piece in pieces)])
        for pieces in values
    ]


def _pieces(record: Record, key: str, reserved: int) -> list[str | int]:
    """The value of a key as a list of texts and numbers from 0 to `reserved` - 1."""
    value = record.fields[key]
    for piece in value if isinstance(value, list) else []:
        if type(piece) not in (str, int):
            raise UserError(f'{record.place}: "{key}" holds {_kind(piece)}; it may hold texts and whole numbers')
        if isinstance(piece, int) and not 0 <= piece < reserved:
            raise UserError(
                f'{record.place}: "{key}" holds the number {piece}; the tokenizer reserves {reserved or "no"} ids: make'
                " it with a larger `biogpt tokenizer --reserve`"
            )
    return value if isinstance(value, list) else [value]


def encode_with_offsets(tokenizer: Path, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """The ids of each text, as of `encode_texts`, and where each token begins and ends in the text, in characters."""
    from data.text.fast_tokenizer import make_fast_tokenizer
    from data.text.tokenizer import Tokenizer, read_merges

    slow = Tokenizer(tokenizer)
    fast = make_fast_tokenizer(slow.vocabulary, read_merges(tokenizer / "merges.txt"), slow.normalize_punctuation)
    fast.encode_special_tokens = True  # as text: "</s>" in a text is no end
    encodings = fast.encode_batch(list(texts), add_special_tokens=False)
    return [(encoding.ids, encoding.offsets) for encoding in encodings]


class Records:
    """The encoded records of a file, by their places in it. Four bytes an id and a label."""

    def __init__(
        self,
        encoded: Iterable[Encoded],
        context_length: int,
        ignore_index: int,
        label_width: int | None = None,
        pad_id: int = PAD_ID,
    ) -> None:
        """label_width: how many labels each record has; None means as many as each has, padded. pad_id: of the ids."""
        self._context_length, self._ignore_index = context_length, ignore_index
        self._label_width, self._pad_id = label_width, pad_id
        self._ids, self._labels, self._cut, self._answers, counted = _Rows(), _Rows(), array("b"), [], array("i")
        for each in encoded:
            self._ids.append(each.ids)
            self._labels.append(each.labels)
            self._cut.append(each.cut)
            self._answers.append(each.answer)
            counted.append(int((each.labels != ignore_index).sum()))
        self.tokens = np.diff(self._ids.bounds)
        """How many ids each record has."""
        self.counted = np.array(counted)
        """How many of its labels count."""
        self.cut = sum(self._cut)
        """How many records were longer than the context."""

    def __len__(self) -> int:
        return len(self._answers)

    def __getitem__(self, place: int) -> Encoded:
        return Encoded(self._ids[place], self._labels[place], bool(self._cut[place]), self._answers[place])

    def __iter__(self) -> Iterator[Encoded]:
        return map(self.__getitem__, range(len(self)))

    def batch(self, places: Sequence[int], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (rows, S) int64 and labels (rows, T or `label_width`) of records, padded on the right.

        S and T are those of the longest record, rounded up (`PADDINGS`). Padded ids are `pad_id` and padded labels do
        not count; so are the rows after those of `places`.
        """
        chosen = [self[place] for place in places]
        length = self._padded(max((len(each.ids) for each in chosen), default=1))
        width = self._label_width or self._padded(max((len(each.labels) for each in chosen), default=1))
        ids = np.full((rows, length), self._pad_id, np.int64)
        labels = np.full((rows, width), self._ignore_index, np.int64)
        for row, each in enumerate(chosen):
            ids[row, : len(each.ids)] = each.ids
            labels[row, : len(each.labels)] = each.labels
        return torch.from_numpy(ids), torch.from_numpy(labels)

    def _padded(self, longest: int) -> int:
        step = math.ceil(self._context_length / PADDINGS)
        return min(math.ceil(longest / step) * step, self._context_length)


class JoinedRecords(Records):
    """The records of several files, one file after the other, without a copy of them."""

    def __init__(self, files: Sequence[Records]) -> None:
        """files: all with the same settings."""
        first = files[0]
        super().__init__((), first._context_length, first._ignore_index, first._label_width, first._pad_id)
        self._files, self._starts = files, np.cumsum([0, *map(len, files)])
        self.tokens = np.concatenate([file.tokens for file in files])
        self.counted = np.concatenate([file.counted for file in files])
        self.cut = sum(file.cut for file in files)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, place: int) -> Encoded:
        file = int(np.searchsorted(self._starts, place, "right")) - 1
        return self._files[file][place - int(self._starts[file])]


class _Rows:
    """Rows of whole numbers, of different lengths, one after the other."""

    def __init__(self) -> None:
        self._numbers, self.bounds = array("i"), array("q", [0])
        """bounds: where each row begins, and the last one ends."""

    def append(self, row: np.ndarray) -> None:
        self._numbers.frombytes(row.astype(np.int32).tobytes())
        self.bounds.append(len(self._numbers))

    def __getitem__(self, place: int) -> np.ndarray:
        start, end = self.bounds[place : place + 2]
        return np.frombuffer(self._numbers, np.int32)[start:end].astype(np.int64)
