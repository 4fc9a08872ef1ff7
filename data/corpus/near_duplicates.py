"""Near duplicates: texts that share most of their runs of five words, found by MinHash (Broder 1997) and banding.

Each text has 112 hashes in 14 bands of 8, as in FineWeb (Penedo et al. 2024). Two texts of Jaccard similarity s have
at least one band in common with probability 1 - (1 - s^8)^14: 5 % at 0.5, 56 % at 0.7, 92 % at 0.8, 99.96 % at 0.9.

Each part stores its bands sorted by hash. The bands of all parts are joined one range of hashes at a time.
Memory at 38 million texts: about 0.2 GB on top of the keys. Disk: 168 bytes for each text, beside its part.
"""

import os
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np

from data.common.files import whole_file
from data.common.hashing import mix64
from data.common.workers import progress
from data.corpus.duplicates import repeats

WORDS_OF_RUN = 5
BANDS, HASHES_OF_BAND = 14, 8
SEED = 1
RANGES = 16  # of hashes, into which a band is divided; they are joined one after another


def near_duplicates(parts: list[Path], starts: np.ndarray, pmid: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """Mask of the rows that share a band with a row of a lower PMID. Only rows in the mask `stays` are compared.

    parts: the folders of all parts, in order; starts: the first row of each part; pmid, stays: one entry for each row.
    """
    found = np.zeros(len(stays), bool)
    with progress("corpus: near duplicates", BANDS * RANGES) as advance:
        for band, number in product(range(BANDS), range(RANGES)):
            hashes, rows = _read_range(parts, starts, band, number)
            hashes, rows = hashes[stays[rows]], rows[stays[rows]]
            found[repeats(hashes, pmid[rows], rows)] = True
            advance()
    return found


def _read_range(parts: list[Path], starts: np.ndarray, band: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of one band that lie in one range, of all parts, and their rows. One file is open at a time."""
    first, last = np.uint64((number << 64) // RANGES), np.uint64(((number + 1 << 64) - 1) // RANGES)
    hashes, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for part, start in zip(parts, starts, strict=False):
        sorted_hashes = np.load(part / "bands.npy", mmap_mode="r")[band]
        here = slice(np.searchsorted(sorted_hashes, first), np.searchsorted(sorted_hashes, last, "right"))
        hashes.append(np.array(sorted_hashes[here]))
        rows.append(np.load(part / "rows.npy", mmap_mode="r")[band][here] + start)
    return np.concatenate(hashes), np.concatenate(rows)


def band_hashes(texts: Iterable[str]) -> np.ndarray:
    """A uint64 for each band of each text, shape (BANDS, texts). Fold the texts first (`duplicates.fold`)."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # rensa's threads: a task uses one core
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  (a compiled module without stubs)

    digests = RMinHash.digest_matrix_from_token_sets(map(shingles, texts), BANDS * HASHES_OF_BAND, SEED).to_rows()
    halves = np.array(digests, np.uint32).reshape(-1, BANDS, HASHES_OF_BAND).view(np.uint64)
    hashes = np.zeros(halves.shape[:2], np.uint64)
    for column in range(halves.shape[2]):
        hashes = mix64(hashes ^ halves[:, :, column], salt=0)
    return hashes.T


def shingles(folded: str) -> list[str]:
    """The run of five words that starts at each word. The last four runs are shorter."""
    words = folded.split()
    return [" ".join(words[start : start + WORDS_OF_RUN]) for start in range(len(words))]


def write_bands(folder: Path, hashes: np.ndarray) -> None:
    """Write `bands.npy`, each band sorted by hash, and `rows.npy`, the row of the text that each hash belongs to.

    hashes: shape (BANDS, texts).
    """
    order = np.argsort(hashes, axis=1, kind="stable")
    for name, content in (("bands", np.take_along_axis(hashes, order, axis=1)), ("rows", order.astype(np.uint32))):
        with whole_file(folder / f"{name}.npy") as stream:
            np.save(stream, content)
