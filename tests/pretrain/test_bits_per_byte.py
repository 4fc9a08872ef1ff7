"""Bits per byte against sums by hand and against a plain slow loop: one window at a time, without batch and mask."""

import gzip
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BioGptConfig,
    BioGptForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

from data.common.files import UserError, write_manifest
from data.text.tokenizer import read_merges
from data.text.train import write_tokenizer_files
from launch.cli import app
from pretrain.bits_per_byte import (
    CausalModel,
    Score,
    document_windows,
    ends_of_text,
    evaluate_corpora,
    open_model,
    score_texts,
    source_name,
    tokenize,
)
from tests.shared import SHARED, needs_shared

TEXTS = [
    "Aspirin helps.",
    "The role of α-synuclein in Parkinson's disease is not known; β-blockers may help “some” patients.",
    "A text that spells </s> and <unk> and <|endoftext|> and <s> out.",
    "Tamoxifen resistance, p53 (mutated) and 5-fluorouracil: a randomized trial of 120 volunteers. " * 2,
    "x",
    "中文 is unknown to most of them, and so is \u200b.",
    "Results were significant (P < 0.05), but confounded. " * 3,
]
CONTEXT = 24  # so that most texts need several windows
WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "aspirin": 3, "helps": 4, "pain": 5}


def save_gpt2(folder: Path, texts: list[str] = TEXTS, vocabulary: int = 300, context: int = CONTEXT) -> Path:
    """GPT-2's kind: byte-level BPE without unknown token; the tokenizer adds nothing, BOS and EOS are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(texts, trainer)
    names = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=context,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_biogpt(folder: Path, fast: bool, merges: Sequence[tuple[str, str]] = (), context: int = CONTEXT) -> Path:
    """BioGPT's kind: its tokenizer puts `</s>` before a text and knows ASCII and the products of merges only."""
    characters = [chr(code) for code in range(33, 127)]
    pieces = [*characters, *(f"{character}</w>" for character in characters)]
    products = [first + second for first, second in merges]
    names = dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", *pieces, *products])
    folder.mkdir()
    write_tokenizer_files(folder, {name: index for index, name in enumerate(names)}, list(merges))
    if not fast:
        (folder / "tokenizer.json").unlink()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "BioGptTokenizer"}))
    config = biogpt_config(len(names), context, num_hidden_layers=2, initializer_range=0.5)
    BioGptForCausalLM(config).save_pretrained(folder)
    return folder


def biogpt_config(vocab_size: int, context: int, **others: Any) -> BioGptConfig:
    """The shape of a tiny model."""
    shape: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    return BioGptConfig(vocab_size=vocab_size, max_position_embeddings=context, **shape, **others)


def word_tokenizer(begins: bool, **names: str) -> PreTrainedTokenizerFast:
    """Three words and `<unk>`. begins: whether it puts `<s>` before a text, as Llama's does."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])  # type: ignore
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names)


def save_llama(folder: Path) -> Path:
    word_tokenizer(True, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    LlamaForCausalLM(llama_config()).save_pretrained(folder)
    return folder


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("models")
    return {
        "gpt2": save_gpt2(folder / "gpt2"),
        "biogpt": save_biogpt(folder / "biogpt", fast=True),
        "slow": save_biogpt(folder / "slow", fast=False),
        "llama": save_llama(folder / "llama"),
    }


def make_corpus(folder: Path, sources: dict[str, list[str]], split: str = "validation") -> Path:
    """A corpus folder whose split has these texts, by the files they came from."""
    folder.mkdir()
    pairs = [(source, text) for source, texts in sources.items() for text in texts]
    names, texts = ([pair[column] for pair in pairs] for column in (0, 1))
    pq.write_table(pa.table({"source_file": names, "text": texts}), folder / f"{split}-00000.parquet", row_group_size=3)
    write_manifest(folder, "corpus", {}, {})
    return folder


def bigram_model(probabilities: dict[tuple[str, str], float], tokenizer: Any, length: int = 100) -> CausalModel:
    """A model that reads the last token only. The likelihood of a pair that is not named is 0."""
    table = torch.zeros(len(WORDS), len(WORDS))
    for (before, after), probability in probabilities.items():
        table[WORDS[before], WORDS[after]] = probability
    # Every row becomes a distribution: the rest goes to the first token that has none.
    for row in table:
        if row.sum() < 1:
            row[int((row == 0).nonzero()[0])] = 1 - row.sum()

    def logits(inputs_BT: Tensor, _: Tensor) -> Tensor:
        return table.log()[inputs_BT]

    return CausalModel("bigrams", logits, tokenizer, len(WORDS), length, *ends_of_text(tokenizer), torch.device("cpu"))


PAIRS = {
    ("<s>", "aspirin"): 1 / 2, ("aspirin", "helps"): 1 / 4, ("helps", "pain"): 1 / 8, ("pain", "</s>"): 1 / 2,
    ("aspirin", "<unk>"): 1 / 16, ("<unk>", "pain"): 1 / 2,
}  # fmt: skip


def test_bits_of_three_words_by_hand() -> None:
    model = bigram_model(PAIRS, word_tokenizer(True, bos_token="<s>", eos_token="</s>"))
    known, unknown = score_texts(model, ["aspirin helps pain", "aspirin heilt pain"])
    assert (known.documents, known.tokens, known.text_bytes, known.unknown_characters) == (1, 4, 18, 0)
    assert known.bits_per_byte == pytest.approx((1 + 2 + 3 + 1) / 18)
    assert known.loss == pytest.approx(7 * math.log(2) / 4)
    assert (unknown.tokens, unknown.unknown_characters, unknown.unknown_bytes) == (4, 5, 5)
    assert unknown.bits_per_byte == pytest.approx((1 + 4 + 1 + 1 + 5 * 8) / 18)


def test_a_tokenizer_without_bos_or_eos_pays_a_guess_among_the_vocabulary() -> None:
    guess = math.log2(len(WORDS))
    for begins, names, bits, begin, end in (
        (False, {"bos_token": "<s>", "eos_token": "</s>"}, 1 + 2 + 3 + 1, [1], [2]),  # BOS, though it puts none
        (False, {"eos_token": "</s>"}, guess + 2 + 3 + 1, [2], [2]),  # EOS begins: </s> -> aspirin is a guess here
        (True, {}, 1 + 2 + 3 + guess, [1], []),
        (False, {}, guess + 2 + 3 + guess, [], []),
    ):
        pairs = PAIRS | {("</s>", "aspirin"): 1 / len(WORDS)}
        model = bigram_model(pairs, word_tokenizer(begins, **names))
        assert (model.begin, model.end) == (begin, end)
        (score,) = score_texts(model, ["aspirin helps pain"])
        assert score.tokens == 4 and score.bits_per_byte == pytest.approx(bits / 18)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9])
def test_each_token_of_a_long_document_is_scored_once_with_half_a_window_before_it(length: int) -> None:
    for tokens in range(30):
        for begin, end in (([100], [101]), ([], [101]), ([100], []), ([], []), ([98, 99], [101])):
            sequence = [*begin, *range(tokens), *end]
            scored = []
            for inputs, targets in document_windows(begin, list(range(tokens)), end, length):
                assert 0 < len(inputs) == len(targets) <= length
                for position, target in enumerate(targets):
                    if target == -100:
                        continue
                    place = sequence.index(target)
                    before = inputs[: position + 1]
                    assert before == sequence[place - len(before) : place]
                    assert len(before) >= min(place, length // 2)
                    scored.append(target)
            assert scored == sequence[max(len(begin), 1) :]


@lru_cache
def by_transformers(folder: Path) -> tuple[Any, Any]:
    """The model and the tokenizer of a folder as transformers loads them."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@lru_cache
def slow_nats(folder: Path, text: str) -> tuple[float, int]:
    """The loss of a text by transformers alone, and its predictions: one token after the other, a window at a time."""
    model, tokenizer = by_transformers(folder)
    begin, end = {"gpt2": (0, 0), "biogpt": (2, 2), "slow": (2, 2), "llama": (1, 2)}[folder.name]
    pieces = tokenizer.tokenize(text, split_special_tokens=True)
    return plain_loop(model, [begin, *tokenizer.convert_tokens_to_ids(pieces), end], CONTEXT)


@torch.no_grad()
def plain_loop(model: Any, sequence: list[int], context: int) -> tuple[float, int]:
    """The summed loss of all tokens but the first, and their number."""
    total, windows = 0.0, {}
    for place in range(1, len(sequence)):
        start = math.ceil(max(place - context, 0) / (context // 2)) * (context // 2)
        if start not in windows:
            inputs = torch.tensor([sequence[start : min(start + context, len(sequence) - 1)]])
            windows[start] = model(input_ids=inputs).logits[0].double().log_softmax(-1)
        total -= windows[start][place - 1 - start, sequence[place]].item()
    return total, len(sequence) - 1


@pytest.mark.parametrize("name", ["gpt2", "biogpt", "slow", "llama"])
def test_losses_are_those_of_a_plain_loop(name: str, folders: dict[str, Path]) -> None:
    """Also in one batch with texts of other lengths, so padding changes nothing."""
    texts = [*TEXTS, "aspirin helps pain " * 20, "pain"]
    model = open_model(folders[name])
    for text, score in zip(texts, score_texts(model, texts), strict=True):
        nats, tokens = slow_nats(folders[name], text)
        assert score.tokens == tokens and score.loss == pytest.approx(nats / tokens, abs=1e-5)


def test_a_fast_and_a_slow_tokenizer_lose_the_same_characters(folders: dict[str, Path]) -> None:
    fast, slow = (open_model(folders[name]).tokenizer for name in ("biogpt", "slow"))
    assert fast.is_fast and not slow.is_fast
    found = tokenize(fast, TEXTS, "fast")
    assert found == tokenize(slow, TEXTS, "slow")
    assert [lost for _, lost in found] == ["", "αβ“”", "", "", "", "中文\u200b", ""]
    assert all(2 not in ids for ids, _ in found)  # `</s>` that is spelled out stays text
    ids, lost = tokenize(open_model(folders["gpt2"]).tokenizer, TEXTS, "gpt2")[2]
    assert 0 not in ids and lost == ""  # and so does <|endoftext|>


def test_characters_that_a_tokenizer_drops_are_lost_too() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))  # no unknown token: others get no token at all
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert tokenize(fast, ["a é\tb"], "") == [([0, 1], "é")]


class Hiding(PreTrainedTokenizer):
    """A tokenizer in Python that puts `<unk>` itself in the place of what it does not know."""

    def __init__(self) -> None:
        super().__init__(unk_token="<unk>")

    @property
    def vocab_size(self) -> int:
        return len(WORDS)

    def get_vocab(self) -> dict[str, int]:
        return WORDS

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [word if word in WORDS else "<unk>" for word in text.split()]

    def _convert_token_to_id(self, token: str) -> int:
        return WORDS[token]


def test_a_tokenizer_that_hides_what_it_loses_is_refused() -> None:
    assert tokenize(Hiding(), ["aspirin helps"], "hiding") == [([3, 4], "")]
    with pytest.raises(UserError, match=r"hiding: .* which characters become <unk>"):
        tokenize(Hiding(), ["aspirin heilt"], "hiding")


def test_several_models_and_corpora_stand_in_one_table(folders: dict[str, Path], tmp_path: Path) -> None:
    one = make_corpus(tmp_path / "one", {"pubmed26n0001.xml.gz": TEXTS[:3], "pubmed26n0002.xml.gz": TEXTS[3:5]})
    two = make_corpus(tmp_path / "two", {"notes.jsonl": TEXTS[5:]})
    gpt2, biogpt = folders["gpt2"], folders["biogpt"]
    arguments = ["evaluate", str(gpt2), str(biogpt), "--corpus", str(one), "--corpus", str(two)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    rows = [re.split(r"  +", line.strip()) for line in done.stdout.splitlines()]
    sources = {f"{one}: pubmed*n*.xml.gz": TEXTS[:5], f"{two}: notes.jsonl": TEXTS[5:], "all": TEXTS}
    expected = []
    for folder in (gpt2, biogpt):
        for source, texts in sources.items():
            pairs = [slow_nats(folder, text) for text in texts]
            lost = "".join(c for text in texts for c in text if not c.isascii()) if folder == biogpt else ""
            nats, tokens = (sum(pair[column] for pair in pairs) for column in (0, 1))
            bits = (nats / math.log(2) + 8 * len(lost.encode())) / sum(len(text.encode()) for text in texts)
            figures = [f"{len(texts):,}", f"{tokens:,}", f"{nats / tokens:.4f}", f"{bits:.4f}", f"{len(lost)}"]
            expected.append([str(folder), source, *figures])
    assert rows[0][0] == "model" and rows[1:-1] == expected
    assert "--shards" in done.stdout.splitlines()[-1]


def test_the_files_of_a_source_differ_in_numbers_only(folders: dict[str, Path], tmp_path: Path) -> None:
    assert source_name("pubmed26n0001.xml.gz") == source_name("pubmed26n1274.xml.gz") != source_name("notes.jsonl")
    corpus = make_corpus(tmp_path / "corpus", {"pubmed26n0001.xml.gz": TEXTS[:2], "pubmed26n0002.xml.gz": TEXTS[2:]})
    ((source, score),) = evaluate_corpora([folders["gpt2"]], [corpus], "validation")[str(folders["gpt2"])].items()
    assert source == "pubmed*n*.xml.gz" and score.documents == len(TEXTS)


def save_classifier(folder: Path) -> None:
    LlamaForSequenceClassification(llama_config()).save_pretrained(folder)


def save_bert(folder: Path) -> None:
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
    )
    BertForMaskedLM(config).save_pretrained(folder)


def save_t5(folder: Path) -> None:
    config = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def save_small(folder: Path) -> None:
    config = GPT2Config(vocab_size=len(WORDS) - 1, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("save", "mistake"),
    [
        (save_t5, "is an encoder and a decoder, not a causal language model"),
        (save_classifier, r"lacks weights of a causal language model \(lm_head.weight\)"),
        (save_bert, "its predictions depend on later tokens"),
        (save_small, "the tokenizer belongs to another model"),
    ],
)
def test_a_model_that_is_no_causal_language_model_is_named(
    save: Callable[[Path], None], mistake: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = make_corpus(tmp_path / "corpus", {"notes.jsonl": ["aspirin helps pain"]})
    save(tmp_path / "model")
    word_tokenizer(False, eos_token="</s>").save_pretrained(tmp_path / "model")
    capfd.readouterr()
    with pytest.raises(UserError, match=f"model: .*{mistake}") as raised:
        evaluate_corpora([tmp_path / "model"], [corpus], "validation")
    assert "\n" not in str(raised.value) and capfd.readouterr().out + capfd.readouterr().err == ""


def test_other_mistakes_are_named_before_a_model_is_scored(folders: dict[str, Path], tmp_path: Path) -> None:
    corpus, gpt2 = make_corpus(tmp_path / "corpus", {"notes.jsonl": TEXTS}), folders["gpt2"]
    bare, absent = tmp_path / "bare", tmp_path / "absent"
    shutil.copytree(gpt2, bare)
    for path in bare.glob("*token*"):
        path.unlink()
    for models_, corpora, split, mistake in (
        ([gpt2, bare], [corpus], "validation", "bare: has no tokenizer"),
        ([gpt2, absent], [corpus], "validation", "absent: "),
        ([gpt2], [corpus], "test", "corpus: the test split is empty"),
        ([gpt2], [gpt2], "validation", "gpt2: holds no manifest.json, so it is not a finished corpus folder"),
        ([gpt2], [corpus, absent], "validation", "absent: no such folder"),
    ):
        with pytest.raises(UserError, match=re.escape(mistake)):
            evaluate_corpora(models_, corpora, split)


@pytest.mark.slow
@needs_shared
def test_thousands_of_real_abstracts_score_as_in_a_plain_loop(tmp_path: Path) -> None:
    texts, context = [], 64
    for path in sorted((SHARED / "data" / "abstracts").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in islice(lines, 300)]
        texts += [" ".join(row[key] for key in ("title", "abstract", "text") if row.get(key)) for row in rows]
    merges = read_merges(SHARED / "tokenizers" / "biogpt" / "bpecodes")[:2000]
    torch.manual_seed(5)
    for folder in (
        save_gpt2(tmp_path / "gpt2", texts, 2000, context),
        save_biogpt(tmp_path / "biogpt", True, merges, context),
    ):
        transformers_model, _ = by_transformers(folder)
        model, together, largest, different = open_model(folder), Score(), 0.0, 0
        for start in range(0, len(texts), 256):
            some = texts[start : start + 256]
            tokenized = tokenize(model.tokenizer, some, "")
            for (ids, _), score in zip(tokenized, score_texts(model, some), strict=True):
                nats, tokens = plain_loop(transformers_model, [*model.begin, *ids, *model.end], context)
                assert tokens == score.tokens
                difference = abs(score.loss - nats / tokens)
                largest, different = max(largest, difference), different + (difference > 1e-5)
                together.add(score)
        print(f"{folder.name}: {together}; largest difference {largest:.1e} nats a token, {different} beyond 1e-5")
        assert together.documents == len(texts) >= 2_000 and different == 0
