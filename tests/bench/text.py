"""What the text path costs: `python -m tests.bench.text` prints a table. Needs `../shared`; about 5 minutes.

CPU time of one core; what is compared takes turns, slice by slice of the texts.
"""

import contextlib
import io
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from subword_nmt.learn_bpe import learn_bpe
from transformers import AutoTokenizer, BioGptTokenizer

from data.text import moses
from data.text.learn_bpe import learn_merges
from data.text.tokenizer import Tokenizer
from tests.bench.machine import machine, peak
from tests.bench.needs import need_shared
from tests.data.reference import published_biogpt, texts_of
from tests.paths import SHARED

SLICES = 4  # of the texts, of which the first half warms the memory
Row = tuple[str, str, str, str]
WORDS = 10_000_000
STREAM = f"""
import itertools, sys; from pathlib import Path; import pyarrow as pa; from data.text.tokenizer import Tokenizer
tokenizer = Tokenizer(Path(sys.argv[1]))
words = ("".join(letters) for letters in itertools.product("abcdefghijkl", repeat=7))
for _ in range({WORDS} // 1_000_000):
    tokenizer.encode_batch(pa.array([" ".join(itertools.islice(words, 200)) for _ in range(5_000)]))
"""
LEARNED = 5_000_000
LEARN = f"""
import random; from collections import Counter; from data.text.learn_bpe import learn_merges
rng, counts = random.Random(1), Counter()
while len(counts) < {LEARNED}:
    counts["".join(rng.choices("etaoinshrdlcumwf", k=rng.randint(6, 16)))] += rng.randint(1, 50)
learn_merges(counts, 1_000)
"""


def shared_texts() -> list[str]:
    """Title and abstract of all entries, in an order of chance."""
    files = sorted((SHARED / "data" / "abstracts").glob("*.jsonl.gz"))
    texts = [text for file in files for text in texts_of(file)]
    random.Random(1).shuffle(texts)
    return texts


def text_to_ids(folder: Path, texts: list[str]) -> list[Row]:
    """Ids by us cold, with half of the texts seen, and with all seen, beside transformers' slow tokenizer."""
    slow, cold, seen = BioGptTokenizer.from_pretrained(folder), Tokenizer(folder), Tokenizer(folder)
    seen.encode_batch(pa.array(texts))
    took, differing = np.zeros((SLICES, 3)), 0
    for index in range(SLICES):
        some = texts[index * len(texts) // SLICES : (index + 1) * len(texts) // SLICES]
        before = time.process_time()
        expected: Any = slow(some)["input_ids"]
        took[index, 0] = time.process_time() - before
        for column, tokenizer in ((1, cold), (2, seen)):
            before = time.process_time()
            ids, lengths = tokenizer.encode_batch(pa.array(some))
            took[index, column] = time.process_time() - before
            found = np.split(ids, np.cumsum(lengths))[:-1]
            differing += sum(theirs[1:] != ours.tolist() for theirs, ours in zip(expected, found, strict=True))
    half, number = SLICES // 2, f"{len(texts):,}"
    print(f"{number} texts by two memories each: {differing} with other ids than transformers gives", flush=True)
    assert not differing
    against = "transformers' slow `BioGptTokenizer`"
    return [
        ratio(
            "text to ids, memory warmed on half of the texts, measured on the other half", against, took[half:], 1, 25
        ),
        ratio("text to ids, every word seen", against, took, 2, 60),
        ratio(f"text to ids, cold start over all {number} texts", against, took, 1, 15),
    ]


def fast_tokenizer(folder: Path, texts: list[str]) -> Row:
    """`tokenizer.json` in batches on one thread, beside the slow tokenizer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    slow, fast = BioGptTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    took, differing = np.zeros((SLICES, 2)), 0
    for index in range(SLICES):
        some, found = texts[index * len(texts) // SLICES : (index + 1) * len(texts) // SLICES], []
        for column, tokenizer in enumerate((slow, fast)):
            before = time.process_time()
            found.append(tokenizer(some)["input_ids"])
            took[index, column] = time.process_time() - before
        differing += sum(ours != theirs for ours, theirs in zip(*found, strict=True))
    assert not differing
    against = "transformers' slow `BioGptTokenizer`"
    return ratio(f"fast tokenizer, batches, one thread; {differing} differing of {len(texts):,}", against, took, 1, 4)


def learning(texts: list[str]) -> Row:
    """10,000 merges from the word counts of the texts, beside subword-nmt's."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(moses.tokenize(text))
    took = np.zeros((3, 2))
    for round_ in range(len(took)):
        learned, before = io.StringIO(), time.process_time()
        with contextlib.redirect_stderr(io.StringIO()):
            learn_bpe([f"{word} {count}" for word, count in counts.items()], learned, 10_000, is_dict=True)
        took[round_, 0] = time.process_time() - before
        before = time.process_time()
        merges = learn_merges(counts, 10_000)
        took[round_, 1] = time.process_time() - before
        assert [" ".join(merge) for merge in merges] == learned.getvalue().split("\n")[1:-1]
    return ratio("learn 10,000 merges, identical, three times", "`subword_nmt.learn_bpe`", took, 1, 10)


def ratio(what: str, against: str, took: np.ndarray, column: int, least: int) -> Row:
    theirs, ours = took[:, 0].sum(), took[:, column].sum()
    return what, against, f"{ours:.2f} s, {theirs:.1f} s: {theirs / ours:.1f}x", f"{least}x"


def memory(folder: Path) -> list[Row]:
    """Peak memory of a process that meets ever new words, and of one that learns from many."""
    worker, learner = peak(STREAM, str(folder)), peak(LEARN)
    return [
        (f"peak memory of a worker on a stream of {WORDS:,} distinct words", "", f"{worker / 1e9:.2f} GB", "1 GB"),
        (f"peak memory of learning from {LEARNED:,} distinct words of 11 letters", "", f"{learner / 1e9:.2f} GB", ""),
    ]


def main() -> None:
    """Measure everything and print the table."""
    need_shared()
    with tempfile.TemporaryDirectory() as temporary:
        folder = published_biogpt(Path(temporary))
        texts = shared_texts()
        rows = [*text_to_ids(folder, texts), learning(texts), fast_tokenizer(folder, texts), *memory(folder)]
    print(f"\n{machine()}\n\n| what | against | measured | at least |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
