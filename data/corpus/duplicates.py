"""Equal texts: what two texts must have in common to count as the same, and which rows repeat another's."""

import hashlib
import unicodedata

import numpy as np

NOT_COMPARED = bytes(code for code in range(128) if not chr(code).isalnum())  # ASCII's white space and punctuation


def fold(text: str) -> str:
    """The text with compatibility forms (NFKC) and case folded: "ﬁrst" and "First" both become "first"."""
    return unicodedata.normalize("NFKC", text).casefold()


def comparison_key(text: str) -> bytes:
    """The bytes that equal texts have in common: folded, in UTF-8, without ASCII white space and punctuation."""
    return fold(text).encode().translate(None, NOT_COMPARED)


def hash64(content: bytes) -> int:
    """A 64-bit hash of bytes, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def repeats(hashes: np.ndarray, pmid: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rows whose hash also belongs to a row with a lower PMID.

    hashes, pmid, rows: one entry for each row to compare. The negative numbers of other text count as higher than all
    PMIDs, so PubMed's copy of a text is the one that is kept.
    """
    order = np.lexsort((pmid.view(np.uint64), hashes))
    return rows[order[1:][hashes[order][1:] == hashes[order][:-1]]]
