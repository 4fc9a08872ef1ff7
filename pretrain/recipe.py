"""The settings of a run: a TOML file, `key=value` on the command line over it, defaults below it.

One class for each section; unknown keys are refused with the nearest known one, all mistakes are reported together.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data.common.files import UserError, read_json, read_manifest, sha256, whole_file
from data.common.settings import Section, override, read_toml, validate
from model.config import PRESETS, Boundaries, DecoderConfig, Initialization, Recomputation
from pretrain import ROOT

BUNDLED = ROOT / "launch" / "recipes"


class ModelSection(Section):
    preset: str = "biogpt"
    """Shape by name: tiny, biogpt, biogpt-large. The keys below change single values of it."""
    hidden_size: int | None = Field(default=None, ge=1)
    num_hidden_layers: int | None = Field(default=None, ge=1)
    num_attention_heads: int | None = Field(default=None, ge=1)
    intermediate_size: int | None = Field(default=None, ge=1)
    max_position_embeddings: int | None = Field(default=None, ge=1)
    vocab_size: int | None = Field(default=None, ge=5)
    """Checked against the shards where given; otherwise it is theirs."""
    hidden_dropout_prob: float = Field(default=0.1, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(default=0.1, ge=0, lt=1)
    activation_dropout: float = Field(default=0.0, ge=0, lt=1)
    layerdrop: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a layer is skipped in a micro-batch."""
    gradient_checkpointing: Recomputation = "none"
    """Recompute activations in the backward pass. "selective": the cheap ones, a third of their memory for little time;
    "full": all of a layer, nearly all of it for a third more time."""
    boundaries: Boundaries = "none"
    """"document": attention stays inside a document of a packed block, positions begin anew. BioGPT's crosses them."""
    initialization: Initialization = "fairseq"
    weights: str | None = None
    """Begin a new run with the weights of an HF folder, a .safetensors, a pytorch_model.bin or a fairseq checkpoint."""


class DataSection(Section):
    shards: str = "shards"
    """Folder written by `biogpt shards`."""
    allow_other: bool = False
    """Go on with other shards than the run began with; otherwise that is refused."""


class TrainSection(Section):
    run: str = "run"
    """Folder of this run. A run that is there goes on."""
    steps: int = Field(default=200_000, ge=1)
    """Optimizer steps in all."""
    global_batch_tokens: int = Field(default=524_288, ge=1)
    """Tokens of one optimizer step over all ranks and accumulation: a multiple of context_length."""
    context_length: int | None = Field(default=None, ge=2)
    """Tokens of a block; default: the model's max_position_embeddings."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Blocks that one rank runs at once."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    compile: bool | None = None
    """Compile the layers and the loss with torch.compile; default: on a GPU where a C compiler is found."""
    seed: int = Field(default=1, ge=0)
    stop_after_minutes: float = Field(default=0.0, ge=0)
    """Stop with a checkpoint after so long, counted from this start; 0: never."""
    max_skipped_steps: int = Field(default=10, ge=1)
    """So many steps in a row with gradients that are not finite end the run with an explanation."""


class OptimizerSection(Section):
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak of the schedule."""
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    gradient_clipping: float = Field(default=0.0, ge=0)
    """Largest norm of the gradient; 0: none."""
    decay_biases_and_norms: bool = True
    """BioGPT decays every parameter; false leaves out those of one dimension."""


class ScheduleSection(Section):
    kind: Literal["inverse_sqrt", "linear", "cosine", "wsd"] = "inverse_sqrt"
    """inverse_sqrt is BioGPT's; wsd: warm-up, stable, then decay_steps of linear decay."""
    warmup_steps: int = Field(default=20_000, ge=0)
    initial_learning_rate: float = Field(default=1e-7, ge=0)
    """Where the warm-up starts."""
    final_learning_rate: float = Field(default=0.0, ge=0)
    """Where linear, cosine and wsd end, at train.steps."""
    decay_steps: int = Field(default=0, ge=0)
    """Steps of wsd's decay."""


class DeepSpeedSection(Section):
    stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage."""
    offload_optimizer: bool = False
    """Moments and update on the CPU, by DeepSpeed's CPU Adam, which is compiled at its first use (stages 1 to 3)."""
    offload_parameters: bool = False
    """Weights on the CPU while they are not in use (stage 3)."""
    config: str | None = None
    """DeepSpeed JSON of your own; default: launch/deepspeed/zero{stage}.json."""


class CheckpointSection(Section):
    every_steps: int = Field(default=1_000, ge=1)
    keep_last: int = Field(default=3, ge=1)
    """The newest so many stay."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Those of every so many steps stay too; 0: none."""
    keep_best: bool = True
    """The one with the lowest held-out loss stays too."""


class EvaluateSection(Section):
    every_steps: int = Field(default=1_000, ge=1)
    """Held-out loss at step 0, every so many steps, at each checkpoint and at the end."""
    max_blocks: int = Field(default=0, ge=0)
    """Blocks of the validation split to evaluate; 0: all."""


class LogSection(Section):
    every_steps: int = Field(default=10, ge=1)


class Recipe(Section):
    """All settings of a run."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    log: LogSection = LogSection()

    def context_length(self) -> int:
        """Tokens of a block."""
        return self.train.context_length or int(self._shape()["max_position_embeddings"])

    def global_batch_size(self) -> int:
        """Blocks of one optimizer step."""
        return self.train.global_batch_tokens // self.context_length()

    def gradient_accumulation_steps(self, ranks: int) -> int:
        """Micro-batches of one rank in a step; UserError where the global batch does not divide."""
        context_length, blocks = self.context_length(), self.global_batch_size()
        at_once = self.train.micro_batch_size * ranks
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
        """The model's shape with the shards' vocabulary."""
        rest: dict[str, Any] = {"layerdrop_seed": self.train.seed, "vocab_size": vocab_size}
        try:
            return DecoderConfig(**(self._shape() | rest))
        except ValueError as error:
            raise UserError(f"model.{error}") from None

    def _shape(self) -> dict[str, Any]:
        given = self.model.model_dump(exclude={"preset", "weights"}, exclude_none=True)
        return PRESETS[self.model.preset] | given


def load_recipe(source: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe from a TOML file or the name of a bundled one, with `section.key=value` overrides.

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
    """Names of the recipes that come with the program."""
    return sorted(path.stem for path in BUNDLED.glob("*.toml"))


def check_settings(settings: dict[str, Any], source: str) -> Recipe:
    """Validate settings that come from `source`; UserError reports all mistakes together."""
    recipe = validate(Recipe, settings, source)
    if recipe.model.preset not in PRESETS:
        raise UserError(f"{source}: model.preset = {recipe.model.preset!r}: choose from {', '.join(PRESETS)}")
    if recipe.model.weights and recipe.model.initialization != ModelSection().initialization:
        raise UserError(
            f"{source}: model.initialization and model.weights: the weights are drawn or read; leave one out"
        )
    if recipe.deepspeed.stage == 0 and recipe.train.precision != "fp32":
        raise UserError(
            f"{source}: deepspeed.stage = 0 with train.precision = {recipe.train.precision!r}: DeepSpeed keeps no fp32"
            " accumulation there; use deepspeed.stage=1, or train.precision=fp32"
        )
    if recipe.deepspeed.offload_optimizer and recipe.deepspeed.stage == 0:
        raise UserError(f"{source}: deepspeed.offload_optimizer = true: needs deepspeed.stage 1, 2 or 3")
    if recipe.deepspeed.offload_optimizer and recipe.deepspeed.stage < 3 and recipe.model.layerdrop:
        raise UserError(
            f"{source}: deepspeed.offload_optimizer = true with model.layerdrop: stages 1 and 2 would update a dropped"
            " layer with its gradient of an earlier step (DeepSpeed 0.19); use deepspeed.stage=3"
        )
    if recipe.deepspeed.offload_parameters and recipe.deepspeed.stage != 3:
        raise UserError(f"{source}: deepspeed.offload_parameters = true: needs deepspeed.stage=3")
    check_schedule(recipe, source)
    limit = recipe._shape()["max_position_embeddings"]
    if recipe.context_length() > limit:
        raise UserError(
            f"{source}: train.context_length = {recipe.context_length()}: longer than the model's"
            f" max_position_embeddings {limit}"
        )
    recipe.decoder_config(vocab_size=8)
    return recipe


def check_schedule(recipe: Recipe, source: str) -> None:
    """UserError where a key of the schedule is missing, does not fit, or would do nothing."""
    schedule = recipe.schedule
    kind, warmup = schedule.kind, schedule.warmup_steps
    decay, final = schedule.decay_steps, schedule.final_learning_rate
    if kind == "wsd" and not decay:
        raise UserError(f'{source}: schedule.kind = "wsd" needs schedule.decay_steps')
    if kind == "wsd" and warmup + decay > recipe.train.steps:
        raise UserError(
            f"{source}: schedule.warmup_steps {warmup} and schedule.decay_steps {decay} are more than train.steps"
            f" {recipe.train.steps}"
        )
    if kind != "wsd" and decay:
        raise UserError(
            f'{source}: schedule.decay_steps = {decay}: schedule.kind = "{kind}" reads none; leave it out, or use wsd'
        )
    if kind == "inverse_sqrt" and final:
        raise UserError(
            f'{source}: schedule.final_learning_rate = {final}: schedule.kind = "{kind}" reads none; leave it out, or'
            " use linear, cosine or wsd"
        )


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved settings as TOML, paths absolute. JSON's strings, numbers and arrays are TOML's too."""
    lines = []
    settings = recipe.model_dump(mode="json", exclude_none=True)
    for section, key in (("data", "shards"), ("train", "run"), ("deepspeed", "config"), ("model", "weights")):
        if key in settings[section]:
            settings[section][key] = str(Path(settings[section][key]).resolve())
    for section, values in settings.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
    with whole_file(path) as stream:
        stream.write("\n".join(lines).encode())


def deepspeed_config(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """The DeepSpeed JSON of the recipe with every "auto" filled in; UserError where it contradicts the recipe."""
    own = recipe.deepspeed.config
    path = Path(own) if own else ROOT / "launch" / "deepspeed" / f"zero{recipe.deepspeed.stage}.json"
    config = read_json(path)
    accumulation = recipe.gradient_accumulation_steps(ranks)
    decided: dict[str, Any] = {
        "train_batch_size": recipe.global_batch_size(),
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "bf16.enabled": recipe.train.precision == "bf16",
        "fp16.enabled": recipe.train.precision == "fp16",
        "zero_optimization.stage": recipe.deepspeed.stage,
    }
    for part in ("optimizer", "parameters"):
        key = "offload_param" if part == "parameters" else f"offload_{part}"
        wanted = "cpu" if getattr(recipe.deepspeed, f"offload_{part}") else "none"
        if wanted == "cpu" or key in config.get("zero_optimization", {}):
            decided[f"zero_optimization.{key}.device"] = wanted
    if "optimizer" in config or "scheduler" in config:
        raise UserError(f"{path}: remove `optimizer` and `scheduler`; the recipe decides both")
    if "activation_checkpointing" in config:
        raise UserError(
            f"{path}: remove `activation_checkpointing`, it would do nothing; the key is model.gradient_checkpointing"
        )
    for key, value in decided.items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section.setdefault(part, {})
        if section.setdefault(name, "auto") not in ("auto", value):
            raise UserError(f'{path}: {key} = {json.dumps(section[name])}, but the recipe says {value}; write "auto"')
        section[name] = value
    return config


def check_inputs(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """Refuse, before any rank starts, what can be known to fail. Returns the manifest of the shards."""
    manifest = read_manifest(Path(recipe.data.shards), "shards")
    vocabulary = manifest["counts"]["vocabulary"]
    if recipe.model.vocab_size not in (None, vocabulary):
        raise UserError(
            f"model.vocab_size = {recipe.model.vocab_size}: {recipe.data.shards} was made with a vocabulary of"
            f" {vocabulary}; leave the key out"
        )
    if not manifest["counts"]["validation"]["tokens"]:
        raise UserError(
            f"{recipe.data.shards}: its validation split is empty; make the corpus with a larger --validation-fraction"
        )
    deepspeed_config(recipe, ranks)
    return manifest


def optimizer_kind(recipe: Recipe) -> str:
    """What makes the updates; recorded in checkpoints, for another one would round differently."""
    return "deepspeed.ops.adam.DeepSpeedCPUAdam" if recipe.deepspeed.offload_optimizer else "torch.optim.AdamW"


def given_weights(recipe: Recipe) -> str | None:
    """Where a new run takes its weights from, absolute; None where they are drawn."""
    return str(Path(recipe.model.weights).resolve()) if recipe.model.weights else None


def data_identity(recipe: Recipe) -> dict[str, Any]:
    """What the order and content of the training data depend on, besides the step."""
    return {
        "shards": sha256(Path(recipe.data.shards) / "manifest.json"),
        "context_length": recipe.context_length(),
        "global_batch_tokens": recipe.train.global_batch_tokens,
        "seed": recipe.train.seed,
    }
