"""Continue prompts with transformers' own generation, for `biogpt generate`."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.common.files import UserError
from data.text.bpe import END_OF_WORD
from model.architecture import Architecture
from pretrain.encoder_folder import read_shape
from pretrain.hf_folder import CAUSAL, SEQUENCE_TO_SEQUENCE, WITH_BERT, check_hf, load_tokenizer, read_hf
from pretrain.load import best_device, load_decoder, load_encoder_decoder, load_run

STANDARD_INPUT = "-"
POSITIONS = 1024
"""The context of a folder whose `config.json` does not name it: the default of transformers' BioGptConfig."""


class Prompt(NamedTuple):
    """A text to continue."""

    text: str
    place: str
    """What a message calls it: "the prompt", or its file and line."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token is chosen, and when a text ends. By default the likeliest token is taken."""

    max_new_tokens: int = 60
    """A text ends after so many tokens, where the model ends it, or where its context is full."""
    min_new_tokens: int = 0
    """The model may not end a text earlier."""
    beams: int = 1
    """Beam search with this many beams; it stops when as many texts have ended."""
    sample: bool = False
    """Draw tokens at random."""
    temperature: float = 1.0
    """Logits are divided by it before a token is drawn."""
    top_k: int = 50
    """Draw from the so many likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities sum to at least this."""
    seed: int = 1

    def __post_init__(self) -> None:
        """Raises UserError if the settings contradict each other."""
        if self.sample and self.beams > 1:
            raise UserError("choose one of --sample and --beams")
        if not self.sample and (self.temperature, self.top_k, self.top_p) != (1.0, 50, 1.0):
            raise UserError("--temperature, --top-k and --top-p need --sample")
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"--min-new-tokens {self.min_new_tokens}: is more than --max-new-tokens {self.max_new_tokens}"
            )

    def options(self, room: int) -> dict[str, Any]:
        """The arguments of transformers' `generate`. room: how many tokens the context still holds."""
        chosen: dict[str, Any] = {"do_sample": self.sample, "num_beams": self.beams}
        if self.sample:
            chosen |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        if self.beams > 1:
            chosen["early_stopping"] = True
        new_tokens = min(self.max_new_tokens, room)
        return chosen | {"max_new_tokens": new_tokens, "min_new_tokens": min(self.min_new_tokens, new_tokens)}


def read_prompts(path: str) -> list[Prompt]:
    """The lines of a file or, for "-", of standard input.

    Raises UserError if the file cannot be read or is not UTF-8, or names the line that is empty.
    """
    name = "standard input" if path == STANDARD_INPUT else path
    try:
        content = sys.stdin.buffer.read() if path == STANDARD_INPUT else Path(path).read_bytes()
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 ({error})") from None
    if lines == [""]:
        raise UserError(f"{name}: holds no prompt; write one a line")
    return [Prompt(line, f"{name}: line {number}") for number, line in enumerate(lines, start=1)]


def generate(
    folder: Path,
    prompts: list[Prompt],
    decoding: Decoding,
    batch_size: int = 8,
    step: str = "",
    show: Callable[[str], Any] = lambda _: None,
) -> list[str]:
    """Continue each prompt with the model of a run or of an HF folder. The results include the prompts.

    A model with an encoder reads each prompt as its source, and the results are the targets alone.

    show: gets the texts while they are made, a line feed after each. A text that is not in a batch with others comes
    word by word, except from beam search. step: as for `load_run`.

    Raises UserError, before the model is loaded, if the folder is neither a run nor an HF folder with a tokenizer, or
    if a prompt is empty or fills the model's context.
    """
    for prompt in prompts:
        if not prompt.text.strip():
            raise UserError(f"{prompt.place} is empty; write the first words of a text")
    tokenizer_folder, context_length, has_encoder, load, encoder_folder = _open(folder, step)
    tokenizer = reader = load_tokenizer(tokenizer_folder)
    read_as: dict[str, Any] = {}
    if encoder_folder:  # as in training
        reader = load_tokenizer(encoder_folder)
        read_as = {"add_special_tokens": False, "split_special_tokens": True, "return_token_type_ids": False}
    # New tokens follow the last token of every prompt of a batch. An encoder counts positions from the first.
    reader.padding_side = "right" if has_encoder else "left"
    lengths = [len(ids) for ids in reader([prompt.text for prompt in prompts], verbose=False, **read_as)["input_ids"]]
    for prompt, length in zip(prompts, lengths, strict=True):
        if length >= context_length + has_encoder:
            raise UserError(f"{prompt.place} has {length} tokens; the model holds {context_length}")
    device = best_device()
    model, texts = load(device), []
    torch.manual_seed(decoding.seed)
    for batch in _batches(lengths, batch_size, context_length - (0 if has_encoder else decoding.max_new_tokens)):
        texts_of_batch = [prompts[index].text for index in batch]
        encoded = reader(texts_of_batch, padding=True, return_tensors="pt", **read_as).to(device)
        options = decoding.options(context_length - (0 if has_encoder else encoded["input_ids"].shape[1]))
        streamer = Words(tokenizer, show) if len(batch) == 1 and decoding.beams == 1 else None
        output = model.generate(**encoded, **options, streamer=streamer)
        made = [tokenizer.decode(ids, skip_special_tokens=True) for ids in output]
        show("\n" if streamer else "".join(f"{text}\n" for text in made))
        texts += made
    return texts


class Words:
    """Shows a growing text word by word, for `streamer` of transformers' `generate`.

    A word is shown when the next word is known, so what was shown never changes, and all of it is the decoded text. A
    word decides whether a space stands before it: none before a full stop or a closing bracket. A hyphen that joins two
    words (Moses' "@-@") decides it for the word before too: "a ?" is written "a?", and "a ? @-@ b" is written "a ?-b".
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], Any]) -> None:
        self._tokenizer, self._show = tokenizer, show
        self._ids: list[int] = []
        self._last_words_end = self._settled = self._shown = 0  # two numbers of ids, and one of characters

    def put(self, ids: Tensor) -> None:
        """Take the prompt's ids, at the first call, and then the next id."""
        for index in ids.flatten().tolist():
            self._ids.append(index)
            token = self._tokenizer.convert_ids_to_tokens(index)
            if token.endswith(END_OF_WORD):
                if token != f"@-@{END_OF_WORD}":
                    self._settled = self._last_words_end
                self._last_words_end = len(self._ids)
        self._show_up_to(self._settled)

    def end(self) -> None:
        """Show what is left: the text may end inside a word."""
        self._show_up_to(len(self._ids))

    def _show_up_to(self, count: int) -> None:
        text = self._tokenizer.decode(self._ids[:count], skip_special_tokens=True)
        if len(text) > self._shown:
            self._show(text[self._shown :])
            self._shown = len(text)


def _batches(lengths: list[int], size: int, room: int) -> Iterator[range]:
    """The indices of consecutive prompts that are continued together.

    room: the longest prompt after which all new tokens fit into the context. A longer one stands alone, because its
    batch would end earlier than the other prompts may.
    """
    start = 0
    while start < len(lengths):
        stop = start + 1
        while stop < min(start + size, len(lengths)) and max(lengths[start : stop + 1]) <= room:
            stop += 1
        yield range(start, stop)
        start = stop


class Opened(NamedTuple):
    """A model to generate with."""

    tokenizer: Path
    """Folder of the tokenizer of what is written, and of the prompt unless the encoder has one of its own."""
    context_length: int
    """Of a prompt with its continuation, or of each of the encoder and the decoder."""
    has_encoder: bool
    load: Callable[[torch.device], Any]
    """Loads the model as transformers has it."""
    encoder: Path | None = None
    """Folder of the tokenizer of an encoder that has one of its own."""


def _open(folder: Path, step: str) -> Opened:
    if (folder / "recipe.toml").is_file():
        recipe, checkpoints, _ = load_run(folder, step)
        length, has_encoder = recipe.trained_positions(), recipe.has_encoder()

        def load(device: torch.device) -> Any:
            load_own = load_encoder_decoder if has_encoder else load_decoder
            model = load_own(folder, recipe, checkpoints).with_positions(length)
            return _in_transformers(model).to(device).eval()

        if recipe.model.encoder:
            length = min(length, read_shape(folder / "encoder")["max_position_embeddings"])
            return Opened(folder / "tokenizer", length, has_encoder, load, folder / "encoder")
        return Opened(folder / "tokenizer", length, has_encoder, load)
    if step:
        raise UserError(f"{folder}: is not a run, so it has no --step to choose")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: neither a run (no recipe.toml) nor an exported folder (no config.json)")
    config = check_hf(folder, "biogpt", "blenderbot", "encoder-decoder")
    if config["model_type"] == "encoder-decoder":
        length = min(config[side]["max_position_embeddings"] for side in ("encoder", "decoder"))
        return Opened(folder, length, True, lambda device: read_hf(folder, device, WITH_BERT), folder / "encoder")
    has_encoder = config["model_type"] == "blenderbot"
    length, name = config.get("max_position_embeddings", POSITIONS), SEQUENCE_TO_SEQUENCE if has_encoder else CAUSAL
    return Opened(folder, length, has_encoder, lambda device: read_hf(folder, device, name))


def _in_transformers(model: Architecture) -> Any:
    """transformers' model with the weights of ours."""
    import transformers

    kind: Any = getattr(transformers, model.hf_config()["architectures"][0])
    config = kind.config_class(**model.hf_config())
    return kind.from_pretrained(None, config=config, state_dict=model.hf_weights())
