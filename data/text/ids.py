"""Special tokens, the integer type of ids and the files of a tokenizer: what a training rank knows of the text path."""

from pathlib import Path

import numpy as np

from data.common.files import read_json

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
BOS_ID, PAD_ID, EOS_ID, UNK_ID = range(len(SPECIAL_TOKENS))
RESERVED = "<reserved_{}>"
"""Names of the reserved ids, from 0. They are the last of a vocabulary, and no text ever becomes one: Moses escapes
"<"."""


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The integer type of ids: uint16 for a vocabulary of up to 65,535, otherwise int32.

    int32 is the only 4-byte integer of the shards' format: Megatron's dtype codes have no uint32, and its readers
    refuse an unknown code. Ids are never negative and far below 2**31, so their bytes are those of uint32.
    """
    return np.dtype(np.uint16 if vocabulary_size <= 65_535 else np.int32)


def reserved_ids(tokenizer: Path) -> range:
    """The reserved ids of a tokenizer folder: number n of the range is that of `<reserved_n>`. Empty if it has none.

    Raises UserError if the folder's `vocab.json` is missing or damaged.
    """
    vocabulary: dict[str, int] = read_json(tokenizer / "vocab.json")
    return range(vocabulary.get(RESERVED.format(0), len(vocabulary)), len(vocabulary))


def tokenizer_files(folder: Path) -> list[str]:
    """Those of TOKENIZER_FILES that a folder has. A folder from elsewhere may have no `tokenizer.json`."""
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()]
