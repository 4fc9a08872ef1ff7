"""Near duplicates: texts that share most of their runs of five words, by MinHash (Broder 1997) and banding.

112 hashes in 14 bands of 8, as FineWeb's (Penedo et al. 2024): two texts of Jaccard similarity s have a band in common
with probability 1 - (1 - s^8)^14, which is 5 % at 0.5, 56 % at 0.7, 92 % at 0.8, 99.96 % at 0.9.

Each part holds its bands sorted, so equal bands of all parts are joined slice by slice, the slices being of hashes.
Memory at 38 million texts: some 0.2 GB beside the keys. Disk: 168 bytes a text, beside its part.
"""

import os
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np

from data.common.files import whole_file
from data.common.hashing import mix64
from data.common.workers import progress

WORDS = 5  # in a run
BANDS, HASHES_OF_BAND = 14, 8
SEED = 1
SLICES = 16  # of a band, joined one after another


def shingles(folded: str) -> list[str]:
    """The runs of five words from each word on; the last four are shorter."""
    words = folded.split()
    return [" ".join(words[start : start + WORDS]) for start in range(len(words))]


def band_hashes(texts: Iterable[str]) -> np.ndarray:
    """A uint64 for each band of each text, shape (BANDS, texts). The texts come case folded."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # of rensa: one task, one core
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  (a compiled module without stubs)

    digests = RMinHash.digest_matrix_from_token_sets(map(shingles, texts), BANDS * HASHES_OF_BAND, SEED).to_rows()
    halves = np.array(digests, np.uint32).reshape(-1, BANDS, HASHES_OF_BAND).view(np.uint64)
    hashes = np.zeros(halves.shape[:2], np.uint64)
    for column in range(halves.shape[2]):
        hashes = mix64(hashes ^ halves[:, :, column], salt=0)
    return hashes.T


def write_bands(folder: Path, hashes: np.ndarray) -> None:
    """Write bands, shape (BANDS, texts), each in the order of its hashes, and the rows of the texts in that order."""
    order = np.argsort(hashes, axis=1, kind="stable")
    for name, content in (("bands", np.take_along_axis(hashes, order, axis=1)), ("rows", order.astype(np.uint32))):
        with whole_file(folder / f"{name}.npy") as stream:
            np.save(stream, content)


def near_duplicates(parts: list[Path], starts: np.ndarray, pmid: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """Which of the rows that stay have a band in common with one of a lower PMID.

    parts: folders in order; starts: the first row of each; pmid, stays: of every row.
    """
    found = np.zeros(len(stays), bool)
    with progress("corpus: near duplicates", BANDS * SLICES) as advance:
        for band, number in product(range(BANDS), range(SLICES)):
            hashes, rows = _slice(parts, starts, band, number)
            hashes, rows = hashes[stays[rows]], rows[stays[rows]]
            found[repeats(hashes, pmid[rows], rows)] = True
            advance()
    return found


def _slice(parts: list[Path], starts: np.ndarray, band: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes and rows of a slice of a band, of all parts. One file is open at a time."""
    first, last = np.uint64((number << 64) // SLICES), np.uint64(((number + 1 << 64) - 1) // SLICES)
    hashes, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for part, start in zip(parts, starts, strict=False):
        sorted_hashes = np.load(part / "bands.npy", mmap_mode="r")[band]
        here = slice(np.searchsorted(sorted_hashes, first), np.searchsorted(sorted_hashes, last, "right"))
        hashes.append(np.array(sorted_hashes[here]))
        rows.append(np.load(part / "rows.npy", mmap_mode="r")[band][here] + start)
    return np.concatenate(hashes), np.concatenate(rows)


def repeats(hashes: np.ndarray, pmid: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Those rows whose hash one with a lower PMID has too; the negative ones of other text come after all others."""
    order = np.lexsort((pmid.view(np.uint64), hashes))
    return rows[order[1:][hashes[order][1:] == hashes[order][:-1]]]
