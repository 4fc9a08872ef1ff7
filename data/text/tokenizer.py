"""Text <-> ids, with the files of a tokenizer folder. `train` makes such folders.

There is one text path: the ids in the shards are those of transformers' BioGptTokenizer on the same folder. The folder
holds `vocab.json`, `merges.txt` and `tokenizer_config.json` as `BioGptTokenizer` reads them, `tokenizer.json` for
`AutoTokenizer` (the same ids, several times as fast), and our manifest. If the folder asks for Moses' punctuation
normalisation, `tokenizer.json` and this module do it; the slow `BioGptTokenizer` cannot. Ids 0 to 3 are
`<s> <pad> </s> <unk>`, and the token types of the training split follow.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.common.files import MANIFEST, UserError, read_json, read_manifest, verify_files
from data.text import moses
from data.text.bpe import Merge, Segmenter
from data.text.ids import BOS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS, TOKENIZER_FILES, UNK_ID, token_dtype
from data.text.punctuation import normalize

FRAGMENTS_REMEMBERED = 1_000_000
TOKENS_REMEMBERED = 250_000
LONGEST_REMEMBERED = 60  # characters of a fragment: bounds the bytes of the memory too


class Tokenizer:
    """Turns texts into ids by Moses, BPE and the vocabulary, and puts nothing before or after them.

    The ids of each fragment of text (see `data.text.moses`) are remembered, in bounded memory. When the memory is full,
    it starts again with the fragments of the current batch, which include the frequent ones.
    """

    def __init__(self, folder: Path) -> None:
        """Read a tokenizer folder. Raises UserError, which names the file that is missing, changed or not BioGPT's."""
        if (folder / MANIFEST).is_file():  # an HF folder from elsewhere has none
            verify_files(folder, read_manifest(folder, "tokenizer", "hf"))
        self.vocabulary: dict[str, int] = read_json(folder / "vocab.json")
        first = SPECIAL_TOKENS if isinstance(self.vocabulary, dict) else ()
        if [self.vocabulary.get(token) for token in first] != [BOS_ID, PAD_ID, EOS_ID, UNK_ID]:
            raise UserError(f"{folder / 'vocab.json'}: ids 0 to 3 are not {', '.join(SPECIAL_TOKENS)}; not BioGPT's")
        config = folder / "tokenizer_config.json"
        self.normalize_punctuation = config.is_file() and read_json(config).get("normalize_punctuation", False)
        self.dtype = token_dtype(len(self.vocabulary))
        self._segment = Segmenter(read_merges(folder / "merges.txt"))
        self._tokens = {index: token for token, index in self.vocabulary.items()}
        self._memory: dict[str, bytes] = {}
        self._ids_of_token = lru_cache(TOKENS_REMEMBERED)(self._find_ids)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without `</s>`. Special tokens in a text are read as text and never get ids 0 to 2."""
        return self.encode_batch(pa.array([text]))[0].tolist()

    def encode_batch(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """The ids of texts (strings without nulls), one text after another, and how many each text has (int64)."""
        ids, lengths = [np.zeros(0, self.dtype)], [np.zeros(0, np.int64)]
        for batch in moses.batches(texts):
            fragments = moses.take_apart(normalize(batch) if self.normalize_punctuation else batch)
            ids_of_distinct = pa.array(self._ids_of_fragments(fragments.distinct), pa.large_binary())
            taken = ids_of_distinct.take(pa.array(fragments.codes))
            offsets = np.frombuffer(taken.buffers()[1], np.int64)[: len(taken) + 1] // self.dtype.itemsize
            ids.append(np.frombuffer(taken.buffers()[2] or b"", self.dtype)[: offsets[-1]])
            lengths.append(np.diff(offsets[fragments.ends], prepend=0))
        return np.concatenate(ids), np.concatenate(lengths)

    def _ids_of_fragments(self, fragments: list[str]) -> list[bytes]:
        """The ids of each fragment, as bytes of `dtype`. Short fragments are remembered."""
        found: list[Any] = list(map(self._memory.get, fragments))
        missing = [index for index, ids in enumerate(found) if ids is None]
        for index, tokens in zip(missing, moses.tokenize_fragments([fragments[i] for i in missing]), strict=True):
            found[index] = b"".join(map(self._ids_of_token, tokens))
        if len(self._memory) + len(missing) > FRAGMENTS_REMEMBERED:
            self._memory, missing = {}, list(range(len(fragments)))
        self._memory.update(
            (fragments[index], found[index]) for index in missing if len(fragments[index]) <= LONGEST_REMEMBERED
        )
        return found

    def _find_ids(self, token: str) -> bytes:
        """The ids of one Moses token."""
        return np.array([self.vocabulary.get(each, UNK_ID) for each in self._segment(token)], self.dtype).tobytes()

    def tokens(self, ids: list[int]) -> list[str]:
        """The tokens that ids stand for, as the vocabulary writes them."""
        return [self._tokens[index] for index in ids]


def read_merges(path: Path) -> list[Merge]:
    """The merges in a file, as BioGptTokenizer reads them: a count may follow a pair, as in BioGPT's published file.

    Raises UserError, which names the file if it is missing or not UTF-8, and the line if it is not a pair.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; a tokenizer folder holds {', '.join(TOKENIZER_FILES[:3])}")
    pairs = [line.split()[:2] for line in read_text(path).split("\n")[:-1]]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) != 2:
            raise UserError(
                f"{path}: line {number} is not a pair of tokens; make the folder again or fetch the file again"
            )
    return [(first, second) for first, second in pairs]


def read_text(path: Path) -> str:
    """The content of a text file. UserError names a file that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); fetch it again") from None
