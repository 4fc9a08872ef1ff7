"""Make tokenizer folders: learn merges and a vocabulary from a corpus, or convert BioGPT's published files."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.common.disk import disk_full_named
from data.common.files import (
    MANIFEST,
    UserError,
    check_places,
    make_folder,
    parts_folder,
    read_json,
    read_manifest,
    sha256,
    verify_files,
    write_json,
)
from data.common.lease import Lease, hold
from data.common.ownership import remove_parts
from data.common.parquet import row_groups, split_files
from data.common.workers import Task, Workers, run_tasks
from data.text import moses
from data.text.bpe import END_OF_WORD, Merge, Segmenter
from data.text.fast_tokenizer import make_fast_tokenizer
from data.text.ids import RESERVED, SPECIAL_TOKENS
from data.text.learn_bpe import learn_merges
from data.text.punctuation import normalize
from data.text.tokenizer import read_merges, read_text

WORDS_FILE = "words.json"  # of a part
ASCII_TYPES = tuple(character + end for character in map(chr, range(0x21, 0x7F)) for end in ("", END_OF_WORD))
FORMAT_WITHOUT_ASCII = 2  # of tokenizer folders that may lack some of ASCII_TYPES
BIOGPT_FILES = ("bpecodes", "dict.txt")
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",  # so that AutoTokenizer loads tokenizer.json
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


def train_tokenizer(
    corpus: Path,
    out: Path,
    merges: int,
    min_count: int,
    workers: Workers,
    min_word_count: int = 1,
    normalize_punctuation: bool = False,
    reserve: int = 0,
) -> dict[str, Any]:
    """Learn merges and a vocabulary from the training split of `corpus`. Writes the folder `out`, returns its manifest.

    merges: learn at most this many; min_count: token types that occur less often in the training split become `<unk>`;
    min_word_count: words that occur less often are ignored when merges are learned; reserve: append this many ids that
    no text becomes. A folder of format 2 made by the same request is finished work and stays as it is, because shards
    and runs hold its ids. Raises UserError, which names a number out of range, a corpus that is not whole or an `out`
    made from other inputs or settings.
    """
    _check_numbers(merges, min_count, min_word_count)
    check_places(out, [corpus])
    corpus_manifest = read_manifest(corpus, "corpus")
    with disk_full_named(out, str(out)), hold(out) as lease:
        numbers = (merges, min_count, min_word_count)
        return _train_tokenizer(corpus, corpus_manifest, out, numbers, workers, normalize_punctuation, reserve, lease)


def _train_tokenizer(
    corpus: Path,
    corpus_manifest: dict[str, Any],
    out: Path,
    numbers: tuple[int, int, int],
    workers: Workers,
    normalize_punctuation: bool,
    reserve: int,
    lease: Lease,
) -> dict[str, Any]:
    """What train_tokenizer does while it holds the lease of `out`."""
    merges, min_count, min_word_count = numbers
    verify_files(corpus, corpus_manifest)
    files, parts = split_files(corpus, corpus_manifest, "train"), parts_folder(out)
    request = {
        "corpus": {file.name: corpus_manifest["files"][file.name]["sha256"] for file in files},
        "merges": merges,
        "min_count": min_count,
        "min_word_count": min_word_count,
        "normalize_punctuation": normalize_punctuation,
        **_reserve_entry(reserve),
    }
    settings = {"normalize_punctuation": normalize_punctuation}
    tasks = [Task("tokenizer part", file, request["corpus"][file.name], parts / file.name, settings) for file in files]

    def fill(folder: Path) -> dict[str, Any]:
        run_tasks(count_words, tasks, workers, "tokenizer: counting words", lease)
        word_counts = _add_up(task.folder / WORDS_FILE for task in tasks)
        frequent = {word: count for word, count in word_counts.items() if count >= min_word_count}
        learned = learn_merges(Counter(frequent), merges)
        vocabulary, token_counts = make_vocabulary(word_counts, learned, min_count)
        vocabulary = with_reserved(vocabulary, reserve)
        write_tokenizer_files(folder, vocabulary, learned, normalize_punctuation)
        return {
            "words": word_counts.total(),
            "distinct_words": len(word_counts),
            "merges": len(learned),
            "vocabulary": len(vocabulary),
            **_reserve_entry(reserve),
            "tokens": token_counts.total(),
        }

    manifest = _made_before(out, request) or make_folder(out, "tokenizer", request, fill, lease)
    remove_parts(parts, "tokenizer part")
    return manifest


def _made_before(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a folder of format 2 that the same request made; None for anything else."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = read_manifest(out, "tokenizer")
    return manifest if (manifest["version"], manifest["request"]) == (FORMAT_WITHOUT_ASCII, request) else None


def _reserve_entry(reserve: int) -> dict[str, int]:
    """The entry for the reserved ids in the request and in the counts. Without any it is as before there was one."""
    return {"reserve": reserve} if reserve else {}


def with_reserved(vocabulary: dict[str, int], reserve: int) -> dict[str, int]:
    """The vocabulary with this many reserved ids after all others."""
    return vocabulary | {RESERVED.format(index): len(vocabulary) + index for index in range(reserve)}


def _check_numbers(merges: int, min_count: int, min_word_count: int) -> None:
    if merges < 0 or min_count < 1 or min_word_count < 1:
        given = f"--merges {merges} --min-count {min_count} --min-word-count {min_word_count}"
        raise UserError(f"{given}: --merges must be at least 0, the others at least 1")


def _add_up(files: Iterable[Path]) -> Counter[str]:
    """The counts in all files of words together."""
    word_counts: Counter[str] = Counter()
    for file in files:
        word_counts.update(read_json(file))
    return word_counts


def count_words(file: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Count the Moses tokens in the texts of a Parquet file into `words.json`. Returns the number of all."""
    fragments: Counter[str] = Counter()
    for rows in row_groups(file, ["text"]):
        for texts in moses.batches(rows["text"].combine_chunks()):
            fragments.update(moses.count_fragments(normalize(texts) if settings["normalize_punctuation"] else texts))
    words: Counter[str] = Counter()
    for tokens, count in zip(moses.tokenize_fragments(list(fragments)), fragments.values(), strict=True):
        for token in tokens:
            words[token] += count
    write_json(folder / WORDS_FILE, words)
    return {"words": words.total()}


def make_vocabulary(
    word_counts: Counter[str], merges: list[Merge], min_count: int
) -> tuple[dict[str, int], Counter[str]]:
    """Token -> id, and how often each token occurs in the training text.

    The vocabulary lists, in this order:

    - the special tokens;
    - all token types, the parts and products of merges among them even if no text ends up with them (transformers'
      issue 21838 shows what happens without them), by count from the highest, then by code point;
    - among them every printable ASCII character, inside a word and at its end, so that no ASCII text gives `<unk>`,
      however small the vocabulary and whatever `min_count`;
    - fairseq's `madeupword` tokens, up to a multiple of 8, without those that are types of the text.
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
    for token in ASCII_TYPES:
        kept.setdefault(token, counts[token])
    ordered = sorted(kept, key=lambda token: (-kept[token], token))
    missing = -(len(SPECIAL_TOKENS) + len(ordered)) % 8
    padding = [name for index in range(16) if (name := f"madeupword{index:04d}") not in kept][:missing]
    tokens = [*SPECIAL_TOKENS, *ordered, *padding]
    return {token: index for index, token in enumerate(tokens)}, counts


def tokenizer_from_biogpt(
    source: Path, out: Path, normalize_punctuation: bool = False, reserve: int = 0
) -> dict[str, Any]:
    """Write the tokenizer of BioGPT's published `bpecodes` and `dict.txt` as the folder `out`. Returns its manifest.

    The ids are those of transformers' `microsoft/biogpt`: the special tokens, then the dictionary in its order.
    reserve: append this many ids that no text becomes. Raises UserError, which names a missing or damaged file.
    """
    check_places(out, [source])
    for name in BIOGPT_FILES:
        if not (source / name).is_file():
            raise UserError(f"{source / name}: no such file; --from-biogpt takes a folder of {', '.join(BIOGPT_FILES)}")
    request = {
        "biogpt": {name: sha256(source / name) for name in BIOGPT_FILES},
        "normalize_punctuation": normalize_punctuation,
        **_reserve_entry(reserve),
    }

    def fill(folder: Path) -> dict[str, Any]:
        merges = read_merges(source / "bpecodes")
        if not merges:
            raise UserError(f"{source / 'bpecodes'}: holds no merge; fetch it again")
        vocabulary = with_reserved(_read_dictionary(source / "dict.txt"), reserve)
        write_tokenizer_files(folder, vocabulary, merges, normalize_punctuation)
        return {"merges": len(merges), "vocabulary": len(vocabulary), **_reserve_entry(reserve)}

    return _made_before(out, request) or make_folder(out, "tokenizer", request, fill)


def _read_dictionary(path: Path) -> dict[str, int]:
    """Token -> id from fairseq's dictionary, after the special tokens. UserError names a token that stands twice."""
    entries = read_text(path).removesuffix("\n").split("\n")
    tokens = [*SPECIAL_TOKENS, *(_hf_token(entry.split(" ")[0]) for entry in entries)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise UserError(f"{path}: holds {twice!r} more than once; fetch it again")
    return vocabulary


def _hf_token(entry: str) -> str:
    """A token of fairseq's dictionary as transformers writes it. `tok@@` stands within a word, `tok` ends one."""
    if entry.startswith("madeupword"):
        return entry
    return entry[:-2] if entry.endswith("@@") else entry + END_OF_WORD


def write_tokenizer_files(
    folder: Path, vocabulary: dict[str, int], merges: list[Merge], normalize_punctuation: bool = False
) -> None:
    """Write TOKENIZER_FILES: three that `BioGptTokenizer.from_pretrained` reads, and `tokenizer.json`."""
    write_json(folder / "vocab.json", vocabulary)
    text = "".join(f"{first} {second}\n" for first, second in merges)
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG | {"normalize_punctuation": normalize_punctuation})
    fast = make_fast_tokenizer(vocabulary, merges, normalize_punctuation)
    (folder / "tokenizer.json").write_text(fast.to_str(pretty=True), encoding="utf-8")
