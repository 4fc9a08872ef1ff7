"""Megatron-LM's indexed dataset: `.bin` holds the tokens, `.idx` says where those of each document begin.

    .idx = b"MMIDIDX\\0\\0", <Q version 1, <B dtype code, <Q sequences, <Q documents,
           int32 lengths (tokens), int64 offsets (bytes), int64 document index (sequences before each document)

Here every document is one sequence. A third file, `.bytes.npy`, holds the number of UTF-8 bytes of each document's
text (int32), from which bits per byte are computed. The format is that of megatron/core/datasets/indexed_dataset.py.
"""

import struct
from pathlib import Path

import numpy as np

from data.common.files import UserError, whole_file

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def write_index(prefix: Path, dtype: np.dtype, lengths: np.ndarray, text_bytes: np.ndarray) -> None:
    """Write `prefix.idx` and `prefix.bytes.npy` for the documents of `prefix.bin`.

    lengths: the number of tokens of each document; text_bytes: the number of UTF-8 bytes of each document's text.
    """
    offsets = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1] * dtype.itemsize, out=offsets[1:])
    with whole_file(prefix.with_name(prefix.name + ".idx")) as stream:
        stream.write(MAGIC + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(lengths) + 1))
        stream.write(lengths.astype("<i4").tobytes())
        stream.write(offsets.astype("<i8").tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
    with whole_file(prefix.with_name(prefix.name + ".bytes.npy")) as stream:
        np.save(stream, text_bytes.astype("<i4"))


class IndexedTokens:
    """One shard as memory maps.

    tokens: those of all documents, one document after another; lengths: the number of tokens of each document;
    text_bytes: the number of UTF-8 bytes of each document's text. Raises UserError, which names a damaged file.
    """

    def __init__(self, prefix: Path) -> None:
        index = prefix.with_name(prefix.name + ".idx")
        content = np.memmap(index, np.uint8, "r") if index.stat().st_size else np.zeros(0, np.uint8)
        start = len(MAGIC) + struct.calcsize("<QBQQ")
        head = content[:start].tobytes()
        if head[: len(MAGIC)] != MAGIC or len(head) < start:
            raise UserError(f"{index}: not a Megatron index; make the shards again")
        version, code, sequences, documents = struct.unpack_from("<QBQQ", head, len(MAGIC))
        if version != 1 or code not in DTYPES or len(content) != start + 12 * sequences + 8 * documents:
            raise UserError(f"{index}: damaged Megatron index; make the shards again")
        self.lengths = content[start : start + 4 * sequences].view("<i4")
        data = prefix.with_name(prefix.name + ".bin")
        dtype = np.dtype(DTYPES[code])
        if data.stat().st_size != int(self.lengths.sum()) * dtype.itemsize:
            raise UserError(
                f"{data}: {data.stat().st_size} bytes, but {index.name} lists another number; make the shards again"
            )
        # An empty file cannot be memory-mapped.
        self.tokens = np.memmap(data, dtype, "r") if data.stat().st_size else np.zeros(0, dtype)
        self.text_bytes = np.load(prefix.with_name(prefix.name + ".bytes.npy"), mmap_mode="r")
