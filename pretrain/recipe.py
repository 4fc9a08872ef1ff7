"""The settings of a run: defaults, a TOML file over them, and `section.key=value` on the command line over both.

Each section has a class of its own. Unknown keys are refused with the nearest known one, and all mistakes are reported
together.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from data.common.files import UserError, whole_file
from data.common.settings import Section, override, read_toml, validate
from data.shards.mixture import LONGEST_PERIOD, period_of
from data.text.ids import BOS_ID, EOS_ID, PAD_ID
from model.config import PRESETS, Boundaries, DecoderConfig, EncoderDecoderConfig, Initialization, Recomputation
from pretrain import ROOT
from pretrain.given import ENCODER_LAYERS, SHAPE, given_model

BUNDLED = ROOT / "launch" / "recipes"
ON_SHARDS = ("next_token", "fill_in_the_middle", "denoising")
"""The objectives that learn from shards; the others learn from records."""
ENCODER_DECODER = ("source_target", "denoising")
"""The objectives that train an encoder and a decoder; the others train a causal decoder."""


# Bounds keep every number finite and computable. They are far from what makes sense.
Steps = Annotated[int, Field(le=10**9)]
Step = Annotated[int, Field(ge=1, le=10**9)]
Size = Annotated[int, Field(le=2**20)]
Rate = Annotated[float, Field(le=1e30, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]
Shape = TypeVar("Shape", bound=DecoderConfig)
SOURCE = re.compile(r"[A-Za-z0-9_-]+")
"""Names of the folders in a table of `data.shards` or `data.records`."""


class ModelSection(Section):
    preset: str = "biogpt"
    """Shape by name: tiny, biogpt, biogpt-large. The keys below override single values of it."""
    hidden_size: Size | None = Field(default=None, ge=1)
    num_hidden_layers: Size | None = Field(default=None, ge=1)
    num_encoder_layers: Size | None = Field(default=None, ge=1)
    """Layers of the encoder, for an objective that trains an encoder and a decoder. The default is as many as the
    decoder's."""
    share_layers: bool = False
    """The encoder and the decoder use the same layers, but for the decoder's cross attention."""
    num_attention_heads: Size | None = Field(default=None, ge=1)
    intermediate_size: Size | None = Field(default=None, ge=1)
    max_position_embeddings: Size | None = Field(default=None, ge=1)
    vocab_size: int | None = Field(default=None, ge=5, lt=2**31)
    """If given, it must be that of the shards. By default it is taken from them."""
    hidden_dropout_prob: Probability = 0.1
    attention_probs_dropout_prob: Probability = 0.1
    activation_dropout: Probability = 0.0
    layerdrop: Probability = 0.0
    """Probability that a layer is skipped in a micro-batch."""
    gradient_checkpointing: Recomputation = "none"
    """Recompute activations in the backward pass to save their memory. "selective" recomputes the cheap ones: about a
    third of a layer's. "full" recomputes whole layers. docs/benchmarks.md has measured times and memory."""
    boundaries: Boundaries = "none"
    """"document": attention stays inside each document of a packed block, and positions start again at each document.
    "none": attention crosses documents, as in BioGPT."""
    initialization: Initialization = "fairseq"
    """How weights are drawn: "fairseq" as the original BioGPT, "hf" as transformers."""
    weights: Name | None = None
    """Start a new run from the weights of an HF folder, a .safetensors file, a pytorch_model.bin or a fairseq
    checkpoint. A run on records starts from an HF folder or a run, and takes its shape and its tokenizer too. An
    encoder and a decoder may both start from a causal decoder; the cross attention is drawn then."""
    encoder: Name | None = None
    """Folder of a BERT or a BertGenerationEncoder of transformers, for objective.kind = "source_target": the encoder,
    with its own tokenizer for the source. The keys above are then the decoder's."""


def _check_folders(given: Any) -> Any:
    """A folder, or a table of them; for PlainValidator."""
    folders = given if isinstance(given, dict) else {"train": given}
    fit = (SOURCE.fullmatch(name) and isinstance(folder, str) and folder for name, folder in folders.items())
    if folders and all(fit):
        return given
    raise PydanticCustomError("folders", 'must be a folder, or a table of folders, as in {pubmed = "a", pmc = "b"}')


Folders = Annotated[str | dict[str, str], PlainValidator(_check_folders)]


class DataSection(Section):
    shards: Folders = "shards"
    """Folder written by `biogpt shards`; or a table of several, made with the same tokenizer: a name -> its folder."""
    weights: dict[str, Annotated[float, Field(gt=0, le=1e6)]] | None = None
    """For a table of folders, the share of each in the blocks or records of training: its name -> a number. 9 and 1 are
    90 % and 10 %. The held-out loss is weighted in the same way."""
    records: Folders | None = None
    """Folder of records to learn from, instead of shards: train.jsonl, validation.jsonl and, if you like, test.jsonl;
    or a table of several: a name -> its folder."""
    tokenizer: Name | None = None
    """For a run on records whose weights are drawn, the folder of its tokenizer. With model.weights, theirs is
    taken."""
    allow_other: bool = False
    """Resume a run with other shards or records than it was started with. Otherwise that is refused."""


class TrainSection(Section):
    run: Name = "run"
    """Folder of this run. If it holds a run already, that run is resumed."""
    steps: Steps = Field(default=200_000, ge=1)
    """Total number of optimizer steps."""
    global_batch_tokens: int = Field(default=524_288, ge=1, le=2**40)
    """Tokens of one optimizer step, over all ranks and accumulation steps. A multiple of context_length."""
    global_batch_examples: Size | None = Field(default=None, ge=1)
    """For a run on records, instead of global_batch_tokens: records of one optimizer step."""
    context_length: Size | None = Field(default=None, ge=2)
    """Tokens of a block, or the most of a record. The default is the model's max_position_embeddings."""
    micro_batch_size: Size = Field(default=8, ge=1)
    """Blocks or records that one rank processes at once."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of the working weights and activations. Master weights are always fp32."""
    compile: bool | None = None
    """Compile the layers and the loss with torch.compile. By default for shards on a GPU, if a C compiler is found."""
    seed: int = Field(default=1, ge=0, lt=2**63)
    """Seed of the initial weights, the order of the data, dropout and layerdrop."""
    stop_after_minutes: Rate = Field(default=0.0, ge=0)
    """Stop with a checkpoint this many minutes after this start. 0 means never."""
    hang_minutes: Rate = Field(default=5.0, ge=0)
    """End the run, and name the rank that hangs, if no rank moves for this long and for ten times a usual step. The
    first step, evaluations and checkpoints get five times that. 0 means never."""
    max_skipped_steps: Steps = Field(default=10, ge=1)
    """End the run, with an explanation, after this many consecutive steps whose gradients are not finite."""


class ObjectiveSection(Section):
    kind: Literal[
        "next_token",
        "fill_in_the_middle",
        "denoising",
        "prompt_target",
        "source_target",
        "token_classification",
        "sequence_classification",
    ] = "next_token"
    """What the model learns: "next_token" predicts each token of packed blocks from those before it.
    "fill_in_the_middle" does too, and moves the middle of some documents behind what follows it. "denoising" writes
    packed blocks again, with an encoder that reads them with spans of words masked. "prompt_target"
    predicts the target of each record, and its end, after the prompt. "source_target" predicts it too, with an encoder
    that reads the source of the record. "token_classification" finds labelled spans of characters,
    "sequence_classification" the label or labels of a text."""
    fim_rate: float = Field(default=0.5, gt=0, le=1)
    """For "fill_in_the_middle": probability that a document is rearranged."""
    mask_share: float = Field(default=0.3, gt=0, lt=1)
    """For "denoising": share of the words that are masked."""
    span_length: float = Field(default=3.0, gt=0, le=1e3)
    """For "denoising": mean number of words of a masked span. The numbers are drawn by Poisson."""


class OptimizerSection(Section):
    kind: Literal["adamw", "muon"] = "adamw"
    """"muon": hidden matrices are updated by their orthogonalized momentum, everything else by AdamW. Its updates are
    scaled to AdamW's size, so learning_rate and weight_decay mean the same for both."""
    learning_rate: Rate = Field(default=2e-4, gt=0)
    """Peak of the schedule."""
    betas: tuple[Probability, Probability] = (0.9, 0.98)
    epsilon: Rate = Field(default=1e-8, gt=0)
    weight_decay: Rate = Field(default=0.01, ge=0)
    gradient_clipping: Rate = Field(default=0.0, ge=0)
    """Scale gradients down to at most this norm. 0 means no clipping."""
    decay_biases_and_norms: bool = True
    """BioGPT applies weight decay to every parameter. false exempts those with one dimension."""
    momentum: Probability = 0.95
    """Muon's."""
    newton_schulz_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the products that make Muon's updates orthogonal. bf16 is faster on a GPU; then a run that is
    resumed on another number of ranks takes visibly other steps."""


class ScheduleSection(Section):
    kind: Literal["inverse_sqrt", "linear", "cosine", "wsd"] = "inverse_sqrt"
    """inverse_sqrt is BioGPT's. wsd is warm-up, a constant rate, then decay_steps of linear decay."""
    warmup_steps: Steps = Field(default=20_000, ge=0)
    """Steps of linear warm-up."""
    initial_learning_rate: Rate = Field(default=1e-7, ge=0)
    """Rate at the start of the warm-up."""
    final_learning_rate: Rate = Field(default=0.0, ge=0)
    """Rate of linear, cosine and wsd at the end, after train.steps."""
    decay_steps: Steps = Field(default=0, ge=0)
    """Steps of linear decay at the end of wsd."""


class DeepSpeedSection(Section):
    stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage."""
    offload_optimizer: bool = False
    """Keep the optimizer's states and compute its updates on the CPU (stages 1 to 3). DeepSpeed compiles its CPU Adam
    at the first use."""
    offload_parameters: bool = False
    """Keep weights on the CPU while they are not in use (stage 3)."""
    config: Name | None = None
    """Your own DeepSpeed JSON file. The default is launch/deepspeed/zero{stage}.json."""


class CheckpointSection(Section):
    every_steps: Steps = Field(default=1_000, ge=1)
    """Save a checkpoint every this many steps, and at the end."""
    background: bool = True
    """Write checkpoints while the run goes on. Each rank holds a copy of its share meanwhile: 12 bytes a parameter,
    divided by the ranks. If false, the run waits and no copy is made. The last checkpoint is always waited for."""
    keep_last: Steps = Field(default=3, ge=1)
    """Keep this many of the newest checkpoints."""
    keep_every_steps: Steps = Field(default=0, ge=0)
    """Also keep the checkpoints whose step is a multiple of this. 0 means none."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest held-out loss."""


class EvaluateSection(Section):
    every_steps: Steps = Field(default=1_000, ge=1)
    """Compute the held-out loss at step 0, every this many steps, at each checkpoint and at the end."""
    max_blocks: Steps = Field(default=0, ge=0)
    """Evaluate at most this many blocks or records of each validation split. 0 means all."""


class LogSection(Section):
    every_steps: Steps = Field(default=10, ge=1)
    """Log the loss, the speed and the other figures every this many steps."""
    profile_steps: tuple[Step, Step] | None = None
    """The first and the last step of which rank 0 writes a profiler's trace into the run's folder `traces`."""


class Recipe(Section):
    """All settings of a run."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    log: LogSection = LogSection()

    def on_records(self) -> bool:
        """Whether the objective learns from records, and not from blocks."""
        return self.objective.kind not in ON_SHARDS

    def has_encoder(self) -> bool:
        """Whether the objective trains an encoder and a decoder, and not a causal decoder."""
        return self.objective.kind in ENCODER_DECODER

    def context_length(self) -> int:
        """Tokens of a block, or the most of a record."""
        return self.train.context_length or int(self._shape()["max_position_embeddings"])

    def global_batch_size(self) -> int:
        """Blocks or records of one optimizer step."""
        return self.train.global_batch_examples or self.train.global_batch_tokens // self.context_length()

    def global_batch(self) -> str:
        """What one optimizer step learns from, in words."""
        return (
            f"{self.global_batch_size():,} records"
            if self.on_records()
            else f"{self.train.global_batch_tokens:,} tokens"
        )

    def gradient_accumulation_steps(self, ranks: int) -> int:
        """Micro-batches of one rank in a step. Raises UserError if the global batch does not divide evenly."""
        context_length, blocks = self.context_length(), self.global_batch_size()
        at_once = self.train.micro_batch_size * ranks
        if self.on_records() and blocks % at_once:
            raise UserError(
                f"train.global_batch_examples = {blocks}: does not divide over {ranks} ranks x micro_batch_size"
                f" {self.train.micro_batch_size}; {max(round(blocks / at_once), 1) * at_once} would"
            )
        if self.on_records():
            return blocks // at_once
        if self.train.global_batch_tokens % context_length:
            raise UserError(
                f"train.global_batch_tokens = {self.train.global_batch_tokens}: not a multiple of the context length"
                f" {context_length}; the nearest is {max(blocks, 1) * context_length}"
            )
        if blocks % at_once:
            raise UserError(
                f"train.global_batch_tokens = {self.train.global_batch_tokens}: {blocks} blocks of {context_length}"
                f" tokens do not divide over {ranks} ranks x micro_batch_size {self.train.micro_batch_size};"
                f" {max(round(blocks / at_once), 1) * at_once * context_length} would"
            )
        return blocks // at_once

    def decoder_config(self, vocab_size: int) -> DecoderConfig:
        """The shape of a causal decoder, with this vocabulary size. Raises UserError if it is impossible."""
        return self._config(DecoderConfig, vocab_size)

    def encoder_decoder_config(self, vocab_size: int) -> EncoderDecoderConfig:
        """The shape of an encoder and a decoder, with this vocabulary size. Raises UserError if it is impossible."""
        layers = self.model.num_encoder_layers or self._shape()["num_hidden_layers"]
        own = {"num_encoder_layers": layers, "share_layers": self.model.share_layers}
        return self._config(EncoderDecoderConfig, vocab_size, **own)

    def trained_config(self, vocab_size: int) -> DecoderConfig:
        """The shape of the model that the objective trains. Raises UserError if it is impossible."""
        return self.encoder_decoder_config(vocab_size) if self.has_encoder() else self.decoder_config(vocab_size)

    def _config(self, kind: type[Shape], vocab_size: int, **own: Any) -> Shape:
        ids = {"bos_token_id": BOS_ID, "pad_token_id": PAD_ID, "eos_token_id": EOS_ID}
        rest: dict[str, Any] = {"layerdrop_seed": self.train.seed, "vocab_size": vocab_size, **ids, **own}
        try:
            return kind(**(self._shape() | rest))
        except ValueError as error:
            raise UserError(f"model.{error}") from None

    def trained_positions(self) -> int:
        """How many positions of the model are trained: those of the context, or all that given weights had.

        Fine-tuning on records leaves positions beyond its context as pretraining made them.
        """
        tuned = self.on_records() and self.model.weights
        return int(self._shape()["max_position_embeddings"]) if tuned else self.context_length()

    def with_shards(self, shards: Path) -> "Recipe":
        """The same recipe for shards, or records, in another folder."""
        changed = {self.data_key(): str(shards), "weights": None}
        return self.model_copy(update={"data": self.data.model_copy(update=changed)})

    def data_key(self) -> Literal["shards", "records"]:
        """The key of [data] that names the folders of training data."""
        return "records" if self.on_records() else "shards"

    def data_folders(self) -> dict[str, Path]:
        """The folders of shards or records, in the order of their names.

        One that is not in a table is called "train" if it holds shards, and "records" if it holds records.
        """
        given = getattr(self.data, self.data_key()) or {}
        alone = "records" if self.on_records() else "train"
        folders = given if isinstance(given, dict) else {alone: given}
        return {name: Path(folders[name]) for name in sorted(folders)}

    def data_weights(self) -> dict[str, Fraction]:
        """The share of each folder of shards or records in training. They sum to 1."""
        weights = self.data.weights or {}
        given = {name: Fraction(str(weights.get(name, 1))) for name in self.data_folders()}
        return {name: weight / sum(given.values()) for name, weight in given.items()}

    def _shape(self) -> dict[str, Any]:
        other = {"preset", "weights", "num_encoder_layers", "share_layers", "encoder"}
        given = self.model.model_dump(exclude=other, exclude_none=True)
        return PRESETS[self.model.preset] | given


def load_recipe(source: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Load a recipe from a TOML file, or a bundled one by name, with `section.key=value` overrides.

    Raises UserError that names every unknown key and bad value in one line.
    """
    path = BUNDLED / f"{source}.toml" if source in bundled_recipes() else Path(source)
    try:
        settings = read_toml(path)
    except (FileNotFoundError, IsADirectoryError):
        names = ", ".join(bundled_recipes())
        raise UserError(f"{source}: no such recipe file, nor a bundled recipe ({names})") from None
    override(settings, overrides, str(path))
    return check_settings(settings, path.name)


def bundled_recipes() -> list[str]:
    """The names of the recipes that come with the program."""
    return sorted(path.stem for path in BUNDLED.glob("*.toml"))


def check_settings(settings: dict[str, Any], source: str) -> Recipe:
    """Validate settings that come from `source`. Raises UserError that reports all mistakes together."""
    recipe = validate(Recipe, settings, source)
    if recipe.model.preset not in PRESETS:
        raise UserError(f"{source}: model.preset = {recipe.model.preset!r}: choose from {', '.join(PRESETS)}")
    if mistakes := list(_record_mistakes(recipe)):
        raise UserError(f"{source}: {'; '.join(mistakes)}")
    recipe = _with_given_shape(recipe)
    mistakes = [
        *_model_mistakes(recipe),
        *_data_mistakes(recipe),
        *_objective_mistakes(recipe),
        *_optimizer_mistakes(recipe),
        *_deepspeed_mistakes(recipe),
        *_schedule_mistakes(recipe),
    ]
    first, last = recipe.log.profile_steps or (0, 0)
    if first > last:
        mistakes.append(f"log.profile_steps = [{first}, {last}]: the first step is after the last")
    if mistakes:
        raise UserError(f"{source}: {'; '.join(mistakes)}")
    return recipe


def _record_mistakes(recipe: Recipe) -> Iterator[str]:
    """Keys that a run on records needs, and keys that it does not use; and the other way round."""
    data, train, model = recipe.data, recipe.train, recipe.model
    kind, defaults = f'objective.kind = "{recipe.objective.kind}"', Recipe()
    needed = {"data.records": data.records, "train.global_batch_examples": train.global_batch_examples}
    if not recipe.has_encoder():
        for key in ("num_encoder_layers", "share_layers"):
            if getattr(model, key) != getattr(defaults.model, key):
                yield f"model.{key}: {kind} has no encoder; remove it"
    if model.encoder:
        if recipe.objective.kind != "source_target":
            yield f"model.encoder: {kind} does not use it; remove it"
        for key in ("num_encoder_layers", "share_layers"):
            if getattr(model, key) != getattr(defaults.model, key):
                yield f"model.{key}: the folder model.encoder decides the encoder's layers; remove it"
    if not recipe.on_records():
        for key in (key for key, value in {**needed, "data.tokenizer": data.tokenizer}.items() if value is not None):
            yield f"{key}: {kind} does not use it; remove it, or choose an objective that learns from records"
        return
    for key in (key for key, value in needed.items() if value is None):
        yield f"{key}: is missing; {kind} needs it"
    if not model.weights and not data.tokenizer:
        yield f"model.weights: is missing; {kind} needs it, or data.tokenizer if the weights are to be drawn"
    if model.weights and data.tokenizer:
        yield "data.tokenizer and model.weights: the weights have a tokenizer of their own; remove one of the keys"
    unused = {
        "data.shards": data.shards != defaults.data.shards,
        "train.global_batch_tokens": train.global_batch_tokens != defaults.train.global_batch_tokens,
        "model.preset": model.weights and model.preset != defaults.model.preset,
        "model.boundaries": model.boundaries != defaults.model.boundaries,
    }
    for key in (key for key, given in unused.items() if given):
        yield f"{key}: {kind} does not use it; remove it"


def _with_given_shape(recipe: Recipe) -> Recipe:
    """The recipe of a run on records with the shape of its given weights, unless it says the whole shape itself.

    That of a run in progress does, so that the weights that it started from may be gone.
    """
    missing = [key for key in SHAPE if getattr(recipe.model, key) is None]
    if not recipe.on_records() or not recipe.model.weights or not missing:
        return recipe
    shape = given_model(Path(recipe.model.weights)).shape
    if ENCODER_LAYERS in shape and not recipe.has_encoder():
        raise UserError(
            f'model.weights = {recipe.model.weights}: is an encoder and a decoder; objective.kind = "'
            f'{recipe.objective.kind}" trains a causal decoder'
        )
    if ENCODER_LAYERS in shape and recipe.model.num_encoder_layers is None and not recipe.model.encoder:
        missing.append(ENCODER_LAYERS)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={key: shape[key] for key in missing})})


def _model_mistakes(recipe: Recipe) -> Iterator[str]:
    if recipe.model.weights and recipe.model.initialization != ModelSection().initialization:
        yield "model.initialization and model.weights: weights are either drawn or read, so remove one of the keys"
    limit = recipe._shape()["max_position_embeddings"]
    if recipe.context_length() > limit:
        yield (
            f"train.context_length = {recipe.context_length()}: longer than the model's max_position_embeddings {limit}"
        )
    try:
        recipe.trained_config(vocab_size=8)
    except UserError as error:
        yield str(error)


def _data_mistakes(recipe: Recipe) -> Iterator[str]:
    key, weights = recipe.data_key(), recipe.data.weights or {}
    given = getattr(recipe.data, key)
    table = given if isinstance(given, dict) else {}
    for name in sorted(weights.keys() - table.keys()):
        yield f"data.weights.{name}: data.{key} has no folder of that name; it has {', '.join(table) or 'no table'}"
    if len(table) > 1:
        for name in sorted(table.keys() - weights.keys()):
            yield f"data.weights.{name}: is missing; every folder of data.{key} needs its share"
        if period_of(list(recipe.data_weights().values())) > LONGEST_PERIOD:
            yield "data.weights: give the shares with fewer digits, as in 0.75 and 0.25"


def _objective_mistakes(recipe: Recipe) -> Iterator[str]:
    chosen, default = recipe.objective, ObjectiveSection()
    users = {"fim_rate": "fill_in_the_middle", "mask_share": "denoising", "span_length": "denoising"}
    for key, user in users.items():
        if chosen.kind != user and getattr(chosen, key) != getattr(default, key):
            yield f'objective.{key}: objective.kind = "{chosen.kind}" does not use it; remove it, or use {user}'
    if chosen.kind == "denoising" and recipe.model.boundaries != ModelSection().boundaries:
        yield 'model.boundaries: objective.kind = "denoising" does not use it; remove it'


def _optimizer_mistakes(recipe: Recipe) -> Iterator[str]:
    chosen, default = recipe.optimizer, OptimizerSection()
    for key in ("momentum", "newton_schulz_precision"):
        if chosen.kind != "muon" and getattr(chosen, key) != getattr(default, key):
            yield f'optimizer.{key}: optimizer.kind = "{chosen.kind}" does not use it; remove it, or use muon'
    if chosen.kind == "muon" and recipe.deepspeed.offload_optimizer:
        yield 'deepspeed.offload_optimizer = true: optimizer.kind = "muon" cannot be offloaded; use adamw'


def _deepspeed_mistakes(recipe: Recipe) -> Iterator[str]:
    chosen, precision = recipe.deepspeed, recipe.train.precision
    if chosen.stage == 0 and precision != "fp32":
        yield (
            f"deepspeed.stage = 0 with train.precision = {precision!r}: DeepSpeed does not accumulate in fp32 there;"
            " use deepspeed.stage=1, or train.precision=fp32"
        )
    if chosen.offload_optimizer and chosen.stage == 0:
        yield "deepspeed.offload_optimizer = true: needs deepspeed.stage 1, 2 or 3"
    elif chosen.offload_optimizer and chosen.stage < 3 and recipe.model.layerdrop:
        yield (
            "deepspeed.offload_optimizer = true with model.layerdrop: at stages 1 and 2, DeepSpeed 0.19 would update a"
            " dropped layer with its gradient of an earlier step; use deepspeed.stage=3"
        )
    if chosen.stage == 3 and recipe.model.share_layers and recipe.model.layerdrop:
        yield (
            "deepspeed.stage = 3 with model.share_layers and model.layerdrop: DeepSpeed 0.19 cannot skip a layer that"
            " runs twice in a step; use deepspeed.stage=2"
        )
    if chosen.offload_parameters and chosen.stage != 3:
        yield "deepspeed.offload_parameters = true: needs deepspeed.stage=3"


def _schedule_mistakes(recipe: Recipe) -> Iterator[str]:
    """Keys of the schedule that are missing, do not fit or would do nothing."""
    schedule = recipe.schedule
    kind, warmup = schedule.kind, schedule.warmup_steps
    decay, final = schedule.decay_steps, schedule.final_learning_rate
    if kind == "wsd" and not decay:
        yield 'schedule.kind = "wsd": needs schedule.decay_steps'
    elif kind == "wsd" and warmup + decay > recipe.train.steps:
        yield (
            f"schedule.warmup_steps {warmup} and schedule.decay_steps {decay} together are more than train.steps"
            f" {recipe.train.steps}"
        )
    elif kind != "wsd" and decay:
        yield f'schedule.decay_steps = {decay}: schedule.kind = "{kind}" does not use it; remove it, or use wsd'
    if kind == "inverse_sqrt" and final:
        yield (
            f'schedule.final_learning_rate = {final}: schedule.kind = "{kind}" does not use it; remove it, or use'
            " linear, cosine or wsd"
        )


PATHS = (
    ("data", "shards"),
    ("data", "records"),
    ("data", "tokenizer"),
    ("train", "run"),
    ("deepspeed", "config"),
    ("model", "weights"),
    ("model", "encoder"),
)
"""The settings that name files or folders of this machine: section, key."""


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved settings as TOML, with absolute paths."""
    settings = recipe.model_dump(mode="json", exclude_none=True)
    if recipe.on_records():
        del settings["data"]["shards"]
    for section, key in PATHS:
        if isinstance(settings[section].get(key), dict):
            settings[section][key] = {name: str(Path(each).resolve()) for name, each in settings[section][key].items()}
        elif key in settings[section]:
            settings[section][key] = str(Path(settings[section][key]).resolve())
    with whole_file(path) as stream:
        tomli_w.dump(settings, stream)


def given_folders(recipe: Recipe) -> dict[str, str | None]:
    """The absolute paths of the weights that a new run starts from, or None if they are drawn, and of an encoder."""
    given = {"weights": recipe.model.weights, **({"encoder": recipe.model.encoder} if recipe.model.encoder else {})}
    return {key: str(Path(path).resolve()) if path else None for key, path in given.items()}
