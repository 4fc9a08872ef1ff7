"""Text <-> ids. One text path: what the shards hold is what transformers' BioGptTokenizer gives on the same folder.

The folder holds `vocab.json`, `merges.txt` and `tokenizer_config.json` as `BioGptTokenizer` reads them,
`tokenizer.json` for `AutoTokenizer` (the same ids, several times as fast), and our manifest. Where it asks for Moses'
punctuation normalisation, `tokenizer.json` and we do it; the slow `BioGptTokenizer` cannot. Ids 0 to 3 are
`<s> <pad> </s> <unk>`; then come the types of the training split.
"""

import re
import shutil
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from sacremoses import MosesPunctNormalizer

from data.common.files import (
    MANIFEST,
    UserError,
    make_folder,
    parts_folder,
    read_json,
    read_manifest,
    sha256,
    verify_files,
    write_json,
)
from data.common.parquet import row_groups, split_files
from data.common.workers import Task, Workers, run_tasks
from data.text import moses
from data.text.bpe import END_OF_WORD, Merge, Segmenter, learn_merges
from data.text.fast_tokenizer import make_fast_tokenizer
from data.text.ids import BOS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS, UNK_ID, token_dtype

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")
BIOGPT_FILES = ("bpecodes", "dict.txt")
PIECES_REMEMBERED = 1_000_000
TOKENS_REMEMBERED = 250_000
LONGEST_REMEMBERED = 60  # characters: a bound of the memory in bytes too
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",  # with it AutoTokenizer loads tokenizer.json
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


class Tokenizer:
    """Ids of texts by Moses, BPE and the vocabulary; nothing is put before or after them.

    The ids of each piece of text (see `data.text.moses`) are remembered, in bounded memory: once it is full it begins
    anew with the pieces of the batch at hand, and the frequent ones are among them.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / MANIFEST).is_file():  # an HF folder from elsewhere has none
            verify_files(folder, read_manifest(folder, "tokenizer", "hf"))
        self.vocabulary: dict[str, int] = read_json(folder / "vocab.json")
        first = SPECIAL_TOKENS if isinstance(self.vocabulary, dict) else ()
        if [self.vocabulary.get(token) for token in first] != [BOS_ID, PAD_ID, EOS_ID, UNK_ID]:
            raise UserError(f"{folder / 'vocab.json'}: ids 0 to 3 are not {', '.join(SPECIAL_TOKENS)}; not BioGPT's")
        config = folder / "tokenizer_config.json"
        self.normalize_punctuation = config.is_file() and read_json(config).get("normalize_punctuation", False)
        self.dtype = token_dtype(len(self.vocabulary))
        self._segment = Segmenter(_read_merges(folder / "merges.txt"))
        self._tokens = {index: token for token, index in self.vocabulary.items()}
        self._memory: dict[str, bytes] = {}
        self._ids_of_token = lru_cache(TOKENS_REMEMBERED)(self._find_ids)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without `</s>`. Special tokens in a text are text, never ids 0 to 2."""
        return self.encode_batch(pa.array([text]))[0].tolist()

    def encode_batch(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """The ids of texts (strings without nulls), one after the other, and how many are each text's (int64)."""
        ids, lengths = [np.zeros(0, self.dtype)], [np.zeros(0, np.int64)]
        for batch in moses.batches(texts):
            pieces = moses.take_apart(normalize(batch) if self.normalize_punctuation else batch)
            taken = pa.array(self._ids_of_pieces(pieces.distinct), pa.large_binary()).take(pa.array(pieces.codes))
            offsets = np.frombuffer(taken.buffers()[1], np.int64)[: len(taken) + 1] // self.dtype.itemsize
            ids.append(np.frombuffer(taken.buffers()[2] or b"", self.dtype)[: offsets[-1]])
            lengths.append(np.diff(offsets[pieces.ends], prepend=0))
        return np.concatenate(ids), np.concatenate(lengths)

    def _ids_of_pieces(self, pieces: list[str]) -> list[bytes]:
        """The ids of each piece, as bytes of `dtype`: remembered, or found and remembered where it is short."""
        found: list[Any] = list(map(self._memory.get, pieces))
        missing = [index for index, ids in enumerate(found) if ids is None]
        for index, tokens in zip(missing, moses.tokenize_pieces([pieces[index] for index in missing]), strict=True):
            found[index] = b"".join(map(self._ids_of_token, tokens))
        if len(self._memory) + len(missing) > PIECES_REMEMBERED:
            self._memory, missing = {}, list(range(len(pieces)))
        self._memory.update(
            (pieces[index], found[index]) for index in missing if len(pieces[index]) <= LONGEST_REMEMBERED
        )
        return found

    def _find_ids(self, token: str) -> bytes:
        return np.array([self.vocabulary.get(piece, UNK_ID) for piece in self._segment(token)], self.dtype).tobytes()

    def tokens(self, ids: list[int]) -> list[str]:
        """The written form of ids."""
        return [self._tokens[index] for index in ids]


def normalize(texts: pa.Array) -> pa.Array:
    """Texts with their punctuation as sacremoses' `MosesPunctNormalizer("en")` writes it, in a quarter of its time."""
    normalized = []
    for text in texts.to_pylist():
        for needed, rule, replacement in _punctuation_rules():
            if needed in text:
                text = rule.sub(replacement, text)
        normalized.append(text.strip())
    return pa.array(normalized, texts.type)


@lru_cache(maxsize=1)
def _punctuation_rules() -> list[tuple[str, re.Pattern[str], str]]:
    """sacremoses' rules, each after what a text must hold for it to match: the character that is not ASCII, if any.

    One space becomes one space: only of two and more is there anything to do.
    """
    substitutions: Any = MosesPunctNormalizer("en").substitutions
    rules = [("  +" if rule == " +" else rule, replacement) for rule, replacement in substitutions]
    needed = ["".join(re.findall(r"[^\x00-\x7f]|^  ", rule)[:1]) for rule, _ in rules]
    return [(must, re.compile(rule), new) for must, (rule, new) in zip(needed, rules, strict=True)]


def tokenizer_files(folder: Path) -> list[str]:
    """Which of TOKENIZER_FILES a folder has: one from elsewhere may have no `tokenizer.json`."""
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _read_merges(path: Path) -> list[Merge]:
    """The merges as BioGptTokenizer reads them: a count may follow the pair, as in BioGPT's published file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a tokenizer folder holds {', '.join(TOKENIZER_FILES[:3])}")
    pairs = [line.split()[:2] for line in _read_text(path).split("\n")[:-1]]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) != 2:
            raise UserError(f"{path}: line {number} is not a pair of tokens")
    return [(first, second) for first, second in pairs]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); fetch it again") from None


def train_tokenizer(
    corpus: Path,
    out: Path,
    merges: int,
    min_count: int,
    workers: Workers,
    min_word_count: int = 1,
    normalize_punctuation: bool = False,
) -> dict[str, Any]:
    """Learn merges and vocabulary on the training split of `corpus`; write the folder `out`, return its manifest.

    merges: at most so many; min_count: types seen less often than this in the training split become `<unk>`;
    min_word_count: words seen less often have no say in the merges.
    """
    if merges < 0 or min_count < 1 or min_word_count < 1:
        given = f"--merges {merges} --min-count {min_count} --min-word-count {min_word_count}"
        raise UserError(f"{given}: merges from 0, the others from 1")
    corpus_manifest = read_manifest(corpus, "corpus")
    verify_files(corpus, corpus_manifest)
    files, parts = split_files(corpus, corpus_manifest, "train"), parts_folder(out)
    request = {
        "corpus": {file.name: corpus_manifest["files"][file.name]["sha256"] for file in files},
        "merges": merges,
        "min_count": min_count,
        "min_word_count": min_word_count,
        "normalize_punctuation": normalize_punctuation,
    }
    settings = {"normalize_punctuation": normalize_punctuation}

    def fill(folder: Path) -> dict[str, Any]:
        tasks = [
            Task("tokenizer part", file, request["corpus"][file.name], parts / file.name, settings) for file in files
        ]
        run_tasks(count_words, tasks, workers, "tokenizer: counting words")
        word_counts: Counter[str] = Counter()
        for task in tasks:
            word_counts.update(read_json(task.folder / "words.json"))
        frequent = {word: count for word, count in word_counts.items() if count >= min_word_count}
        learned = learn_merges(Counter(frequent), merges)
        vocabulary, token_counts = make_vocabulary(word_counts, learned, min_count)
        write_tokenizer_files(folder, vocabulary, learned, normalize_punctuation)
        return {
            "words": word_counts.total(),
            "distinct_words": len(word_counts),
            "merges": len(learned),
            "vocabulary": len(vocabulary),
            "tokens": token_counts.total(),
        }

    manifest = make_folder(out, "tokenizer", request, fill)
    shutil.rmtree(parts, ignore_errors=True)
    return manifest


def count_words(file: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """How often each Moses token occurs in the texts of a Parquet file, as `words.json`. Returns counts."""
    pieces: Counter[str] = Counter()
    for rows in row_groups(file, ["text"]):
        for texts in moses.batches(rows["text"].combine_chunks()):
            pieces.update(moses.count_pieces(normalize(texts) if settings["normalize_punctuation"] else texts))
    words: Counter[str] = Counter()
    for tokens, count in zip(moses.tokenize_pieces(list(pieces)), pieces.values(), strict=True):
        for token in tokens:
            words[token] += count
    write_json(folder / "words.json", words)
    return {"words": words.total()}


def make_vocabulary(
    word_counts: Counter[str], merges: list[Merge], min_count: int
) -> tuple[dict[str, int], Counter[str]]:
    """Token -> id, and the count of each token in the training text.

    After the special tokens: all types, count descending, then token ascending by code point; then the parts and
    products of merges that no text ends up with (transformers issue 21838 is what comes of leaving them out); then
    fairseq's `madeupword` tokens, less those that are types of the text, up to a multiple of 8.
    """
    segment = Segmenter(merges)
    counts: Counter[str] = Counter()
    for word, count in word_counts.items():
        for token in segment(word):
            counts[token] += count
    kept = {token: count for token, count in counts.items() if count >= min_count}
    for first, second in merges:
        for token in (first, second, first + second):
            kept.setdefault(token, counts[token])
    ordered = sorted(kept, key=lambda token: (-kept[token], token))
    missing = -(len(SPECIAL_TOKENS) + len(ordered)) % 8
    padding = [name for index in range(16) if (name := f"madeupword{index:04d}") not in kept][:missing]
    tokens = [*SPECIAL_TOKENS, *ordered, *padding]
    return {token: index for index, token in enumerate(tokens)}, counts


def write_tokenizer_files(
    folder: Path, vocabulary: dict[str, int], merges: list[Merge], normalize_punctuation: bool = False
) -> None:
    """TOKENIZER_FILES: three that transformers' `BioGptTokenizer.from_pretrained` reads, and `tokenizer.json`."""
    write_json(folder / "vocab.json", vocabulary)
    text = "".join(f"{first} {second}\n" for first, second in merges)
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG | {"normalize_punctuation": normalize_punctuation})
    fast = make_fast_tokenizer(vocabulary, merges, normalize_punctuation)
    (folder / "tokenizer.json").write_text(fast.to_str(pretty=True), encoding="utf-8")


def tokenizer_from_biogpt(source: Path, out: Path, normalize_punctuation: bool = False) -> dict[str, Any]:
    """Write the tokenizer of BioGPT's published `bpecodes` and `dict.txt` as the folder `out`; return its manifest.

    The ids are those of transformers' `microsoft/biogpt`: the special tokens, then the dictionary in its order.
    """
    for name in BIOGPT_FILES:
        if not (source / name).is_file():
            raise UserError(f"{source / name}: no such file; --from-biogpt takes a folder of {', '.join(BIOGPT_FILES)}")
    request = {
        "biogpt": {name: sha256(source / name) for name in BIOGPT_FILES},
        "normalize_punctuation": normalize_punctuation,
    }

    def fill(folder: Path) -> dict[str, Any]:
        merges = _read_merges(source / "bpecodes")
        if not merges:
            raise UserError(f"{source / 'bpecodes'}: holds no merge; fetch it again")
        entries = _read_text(source / "dict.txt").removesuffix("\n").split("\n")
        tokens = [*SPECIAL_TOKENS, *(_hf_token(entry.split(" ")[0]) for entry in entries)]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        if len(vocabulary) < len(tokens):
            twice = Counter(tokens).most_common(1)[0][0]
            raise UserError(f"{source / 'dict.txt'}: holds {twice!r} more than once; fetch it again")
        write_tokenizer_files(folder, vocabulary, merges, normalize_punctuation)
        return {"merges": len(merges), "vocabulary": len(vocabulary)}

    return make_folder(out, "tokenizer", request, fill)


def _hf_token(entry: str) -> str:
    """A token of fairseq's dictionary as transformers writes it: `tok@@` stands within a word, `tok` ends one."""
    if entry.startswith("madeupword"):
        return entry
    return entry[:-2] if entry.endswith("@@") else entry + END_OF_WORD
