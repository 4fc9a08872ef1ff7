"""Special tokens and the integer type of ids: all that a training rank needs to know of the text path."""

import numpy as np

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
BOS_ID, PAD_ID, EOS_ID, UNK_ID = range(len(SPECIAL_TOKENS))


def token_dtype(vocabulary_size: int) -> np.dtype:
    """uint16 up to a vocabulary of 65,535, else int32.

    Of 4-byte integers the shards' format has no other: Megatron's dtype codes know no uint32, and its readers refuse a
    code that they do not know. Ids are never negative and far below 2**31, so the bytes are the same.
    """
    return np.dtype(np.uint16 if vocabulary_size <= 65_535 else np.int32)
