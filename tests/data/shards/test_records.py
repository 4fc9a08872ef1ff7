"""data/shards/records.py: what it reads, what it refuses, and its padded batches against rows made by hand."""

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.common.files import UserError
from data.shards.order import EpochOrder
from data.shards.records import (
    PIECES,
    Encoded,
    JoinedRecords,
    Record,
    Records,
    encode_pieces,
    encode_texts,
    read_records,
)
from data.text.tokenizer import Tokenizer, read_merges
from data.text.train import with_reserved, write_tokenizer_files

KEYS = {"prompt": str, "target": str}


def write(path: Path, *objects: Any) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in objects))
    return path


def test_records_are_read_in_order_with_their_lines(tmp_path: Path) -> None:
    one, two = {"id": 7, "prompt": "a", "target": "é\u2028b"}, {"prompt": "", "target": ""}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(one, ensure_ascii=False) + "\n" + json.dumps(two))  # no newline at the end
    records = read_records(path, KEYS)
    assert [record.fields for record in records] == [one, two]
    assert [record.place for record in records] == [f"{path}: line 1", f"{path}: line 2"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "a", "target": ', "not JSON (Expecting value: line 1 column 27 (char 26))"),
        (b"", "not JSON (Expecting value"),
        (b"\xff", "not JSON ('utf-8' codec can't decode byte 0xff"),
        (b'["a", "b"]', "is a list; each line must be an object"),
        (b'{"prompt": "a", "label": 1}', 'has no "target"; it has prompt, label'),
        (b"{}", 'has no "prompt"; it has no key'),
        (b'{"prompt": "a", "target": 3}', '"target" is a number; it must be a text'),
        (b'{"prompt": ["a"], "target": "b"}', '"prompt" is a list; it must be a text'),
        (b'{"prompt": "a", "target": null}', '"target" is null; it must be a text'),
    ],
)
def test_a_mistake_names_the_file_and_the_line(line: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"prompt": "a", "target": "b"}\n' + line + b"\n")
    with pytest.raises(UserError) as caught:
        read_records(path, KEYS)
    assert str(caught.value).startswith(f"{path}: line 2: {said}") and "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.jsonl: cannot be read"):
        read_records(tmp_path / "absent.jsonl", KEYS)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="holds no record"):
        read_records(tmp_path / "empty.jsonl", KEYS)


def test_a_truth_value_is_not_a_number(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='"label" is true or false; it must be a number'):
        read_records(write(tmp_path / "a.jsonl", {"label": True}), {"label": int})


def test_texts_are_encoded_one_by_one(sample_folder: Path) -> None:
    texts = ["The role of IL-31b (n = 3).", "", "β-blockers 3.5%", "The role"]
    tokenizer = Tokenizer(sample_folder / "tokenizer")
    found = encode_texts(sample_folder / "tokenizer", texts)
    assert [ids.tolist() for ids in found] == [tokenizer.encode(text) for text in texts]
    assert {ids.dtype for ids in found} == {np.dtype(np.int64)}


def encoded(length: int, first: int) -> Encoded:
    """A record of ids that count up, with labels of ten times that, the first of which does not count."""
    ids = np.arange(first, first + length)
    return Encoded(ids, np.where(ids == first, -100, ids * 10))


def test_encoded_records_take_little_memory() -> None:
    """Four bytes an id and a label, besides some for each record; and one record at a time is encoded."""
    number, length = 10_000, 100
    row = np.arange(length)
    tracemalloc.start()
    records = Records((Encoded(row.copy(), row.copy()) for _ in range(number)), length, ignore_index=-100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    bytes_of_numbers = 4 * 2 * number * length
    assert bytes_of_numbers < peak < 1.5 * bytes_of_numbers
    assert len(records) == number and all((records[place].ids == row).all() for place in (0, 5_000, number - 1))


def test_a_batch_is_padded_to_its_longest_record_rounded_up() -> None:
    records = Records([encoded(3, 10), encoded(9, 20), encoded(13, 40)], context_length=30, ignore_index=-100)
    ids, labels = records.batch([1, 0], rows=3)
    # 30 / 8 rounded up is 4, and 9 rounded up to a multiple of 4 is 12.
    assert ids.tolist() == [[*range(20, 29), 1, 1, 1], [10, 11, 12, *[1] * 9], [1] * 12]
    assert labels.tolist() == [
        [-100, *range(210, 290, 10), *[-100] * 3], [-100, 110, 120, *[-100] * 9], [-100] * 12
    ]  # fmt: skip
    assert records.tokens.tolist() == [3, 9, 13] and records.counted.tolist() == [2, 8, 12]


def test_no_batch_is_longer_than_the_context() -> None:
    records = Records([encoded(30, 10)], context_length=30, ignore_index=-100)
    assert records.batch([0], rows=1)[0].shape == (1, 30)


def test_labels_of_a_whole_record_have_a_width_of_their_own() -> None:
    several = [Encoded(np.array([2, 9]), np.array(row)) for row in ([1, 0, 1], [0, 0, 0])]
    records = Records(several, context_length=16, ignore_index=-100, label_width=3)
    ids, labels = records.batch([0, 1], rows=3)
    assert ids.shape == (3, 2) and labels.tolist() == [[1, 0, 1], [0, 0, 0], [-100] * 3]
    assert labels.dtype == torch.int64 and records.counted.tolist() == [3, 3]


def test_files_are_joined_as_if_they_were_one() -> None:
    several = [encoded(3, 10), encoded(9, 20), encoded(13, 40), encoded(1, 50)]
    one = Records(several, context_length=30, ignore_index=-100)
    parts = [several[:1], several[1:1], several[1:]]  # the second has none
    joined = JoinedRecords([Records(part, context_length=30, ignore_index=-100) for part in parts])
    assert len(joined) == 4 and [each.ids.tolist() for each in joined] == [each.ids.tolist() for each in one]
    for places in ([0, 1, 2, 3], [3, 0], []):
        assert all(torch.equal(*pair) for pair in zip(joined.batch(places, 5), one.batch(places, 5), strict=True))
    assert joined.tokens.tolist() == one.tokens.tolist() and joined.counted.tolist() == one.counted.tolist()


def test_a_batch_without_records_is_padding() -> None:
    """As ranks need that have no held-out record left."""
    ids, labels = Records([encoded(3, 10)], context_length=16, ignore_index=-100).batch([], rows=2)
    assert ids.tolist() == [[1, 1]] * 2 and labels.tolist() == [[-100, -100]] * 2


def test_every_epoch_has_each_example_once_in_an_order_of_its_own() -> None:
    order = EpochOrder(20, seed=3)
    epochs = [[order.locate(number) for number in range(first, first + 20)] for first in (0, 20, 40)]
    assert all({epoch for epoch, _ in found} == {number} for number, found in enumerate(epochs))
    places = [[place for _, place in found] for found in epochs]
    assert all(Counter(found) == Counter(range(20)) for found in places)
    assert len({tuple(found) for found in places}) == 3
    assert [EpochOrder(20, seed=3).locate(number)[1] for number in range(40, 60)] == places[2]  # asked for at once
    assert order.places(range(15, 47)).tolist() == [*places[0][15:], *places[1], *places[2][:7]]
    assert [EpochOrder(20, seed=4).locate(number)[1] for number in range(20)] != places[0]


def reserved_folder(folder: Path, sample_folder: Path) -> Path:
    """The sample's tokenizer with three reserved ids."""
    tokenizer = Tokenizer(sample_folder / "tokenizer")
    vocabulary, merges = with_reserved(tokenizer.vocabulary, 3), read_merges(sample_folder / "tokenizer" / "merges.txt")
    write_tokenizer_files(folder, vocabulary, merges)
    return folder


def test_lists_are_encoded_piece_by_piece(sample_folder: Path, tmp_path: Path) -> None:
    plain, folder = Tokenizer(sample_folder / "tokenizer"), reserved_folder(tmp_path, sample_folder)
    first = len(plain.vocabulary)
    values = ["The role of IL-31b.", ["What is it? <reserved_1>", 2, 0, "The role"], [1], [], ""]
    found = encode_pieces(folder, [Record("", {"source": value}) for value in values], "source")
    assert [ids.tolist() for ids in found] == [
        plain.encode("The role of IL-31b."),
        [*plain.encode("What is it? <reserved_1>"), first + 2, first, *plain.encode("The role")],
        [first + 1],
        [],
        [],
    ]
    assert {ids.dtype for ids in found} == {np.dtype(np.int64)}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            ["a", 3],
            "holds the number 3; the tokenizer reserves 3 ids: make it with a larger `biogpt tokenizer --reserve`",
        ),
        ([-1], "holds the number -1; the tokenizer reserves 3 ids"),
        ([1.0], "holds a number; it may hold texts and whole numbers"),
        ([True], "holds true or false; it may hold"),
        ([["a"]], "holds a list; it may hold"),
        ([None], "holds null; it may hold"),
    ],
)
def test_a_list_with_anything_else_names_the_record(value: Any, said: str, sample_folder: Path, tmp_path: Path) -> None:
    records = read_records(write(tmp_path / "a.jsonl", {"source": "a"}, {"source": value}), {"source": PIECES})
    with pytest.raises(UserError) as caught:
        encode_pieces(reserved_folder(tmp_path, sample_folder), records, "source")
    assert str(caught.value).startswith(f'{tmp_path / "a.jsonl"}: line 2: "source" {said}')
    with pytest.raises(UserError, match='"source" is a number; it must be a text or a list'):
        read_records(write(tmp_path / "b.jsonl", {"source": 3}), {"source": PIECES})


def test_a_tokenizer_without_reserved_ids_is_named(sample_folder: Path) -> None:
    with pytest.raises(UserError, match=r"here: .* the tokenizer reserves no ids: make it"):
        encode_pieces(sample_folder / "tokenizer", [Record("here", {"source": [0]})], "source")
