"""What a run will need: parameters, memory of each rank, steps, tokens and days. `biogpt plan` prints it.

This is arithmetic over a recipe: neither torch nor DeepSpeed is imported. What DeepSpeed keeps was read in its source
(0.19.8), what a layer keeps in `model/decoder.py`. `python -m tests.bench.plan` compares both with measured runs.

Letters: P parameters, with the padded vocabulary; B what of a bucket is filled. Bytes are bytes of one rank.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

from rich import box
from rich.console import Console
from rich.table import Table

from data.common.files import MANIFEST, UserError, read_json, read_manifest
from model.config import CACHED_LOGITS, CHUNK_LOGITS, COMPILED_CHUNK_LOGITS, DecoderConfig, Recomputation
from pretrain.deepspeed_config import deepspeed_config
from pretrain.gpus import GPUS, Gpu
from pretrain.recipe import Recipe, load_recipe
from pretrain.record import read_record

VOCABULARY = 42_384
"""BioGPT's, for a recipe whose shards do not exist yet."""
MFU = 0.4
"""Assumed where no run was measured. llm.c reaches 0.46 at this size on an H100."""
MARGIN = 0.08
"""Part of a GPU's memory that is left to CUDA, nccl and fragments."""
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
ALL_REDUCE = 500_000_000
"""Gradients that DeepSpeed reduces at once at stage 0."""
PROCESS = 1e8
"""What the first steps of a CPU run bring in besides tensors: modules imported at first use, the kernels' own memory.
Fitted to runs of 36M parameters (`tests.bench.plan`)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank. Each part is given at its largest; they are not all there at once."""

    weights: float
    """Working weights, and the fp32 masters that are updated."""
    gradients: float
    """Gradients that are kept from one micro-batch to the next."""
    optimizer: float
    activations: float
    """What the layers keep for the backward pass, of one micro-batch."""
    logits: float
    """A chunk of logits, and the gradients that the loss keeps."""
    buffers: float
    """The most of what is there for a moment: gathered weights, gradients being reduced, the update's own tensors."""
    build: float
    """The peak until the first step."""
    step: float
    """The peak of a step. A resumed run takes a step while it loads, so this is the peak of loading too."""
    copies: float
    """Copies of the state while a checkpoint is written in the background: memory of the host, not of the GPU."""


def parameter_count(config: DecoderConfig) -> int:
    """Parameters while training: those of the exported model and the rows that pad the vocabulary."""
    return config.parameter_count() + (config.padded_vocab_size - config.vocab_size) * config.hidden_size


def optimizer_bytes(recipe: Recipe, config: DecoderConfig) -> int:
    """Bytes of the optimizer's states over all ranks, in fp32: AdamW keeps two numbers for each parameter, Muon one."""
    hidden = config.num_hidden_layers * config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)
    return 8 * parameter_count(config) - (4 * hidden if recipe.optimizer.kind == "muon" else 0)


def memory(recipe: Recipe, vocabulary: int, ranks: int, cpu: bool = False) -> Memory:
    """The memory of a rank. cpu: of a run on CPUs, where what was never written to takes no room."""
    config = recipe.decoder_config(vocabulary)
    number, width = parameter_count(config), BYTES[recipe.train.precision]
    stage, share = recipe.deepspeed.stage, number / ranks
    zero = deepspeed_config(recipe, ranks).get("zero_optimization", {})
    bucket = zero.get("reduce_bucket_size", ALL_REDUCE)
    filled = min(number, bucket)
    states = optimizer_bytes(recipe, config) / (ranks if stage else 1)
    activations = activation_bytes(recipe, config, cpu)
    logits = logit_bytes(recipe, config, cpu)
    # torch's update on a CPU makes two temporary tensors of the size of what it updates. On a GPU it is one kernel.
    temporary = 8 * share if cpu else 0
    masters = 4 * share if stage and (stage < 3 or width == 2) else 0
    empty = 0 if cpu else width * (bucket - filled)  # a bucket is allocated whole
    gathered, kept = 0.0, 0.0
    if stage == 0:
        weights, gradients = width * number, 4 * number
        reducing, updating = 4 * min(number, ALL_REDUCE), 4 * number
        temporary = 8 * config.padded_vocab_size * config.hidden_size if cpu else 0  # one parameter at a time
    elif stage == 1 and recipe.train.precision == "bf16":  # DeepSpeed's BF16_Optimizer
        weights, gradients = width * number, (width + 4) * number
        reducing, updating = 2 * number, gradients
    elif stage == 1:  # gradients move into the bucket, are copied to be reduced, and this rank's are copied once more
        weights, gradients = width * number, 4 * number
        reducing, updating = 4 * filled + 4 * share + 2 * empty, 8 * share
    elif stage == 2:
        weights, gradients = width * number, 4 * share
        reducing = 2 * width * filled + empty + (4 * share if width == 4 else 0)
        updating = 4 * share
    else:  # all weights stay gathered from their first use to their last in a micro-batch, up to a limit
        weights, gradients = width * share, 4 * share
        gathered = width * min(number, zero.get("stage3_max_live_parameters", 10**9))
        kept = width * filled + empty
        reducing, updating = width * filled + (4 * share if width == 2 else 0), 8 * share
    weights += masters
    always = weights + states + kept
    computing = gradients + gathered + logits
    reducing += gradients + gathered
    updating += temporary
    if cpu:  # small tensors go back to the allocator, which keeps their memory: activations, gathered, replaced weights
        replaced = width * number if stage > 1 else 0  # at stage 1 the gradients reuse it
        returned = replaced + gathered + activations
        step = PROCESS + always + returned + max(computing - gathered, reducing - gathered, updating)
    else:
        step = always + max(computing + activations, reducing, updating)
    built = weights + (4 * number if stage == 1 and width == 2 else 4 * share)
    copied = width * (number + (share if stage == 3 else 0))  # flat weights are copies; stage 3 copies a share again
    build = built + copied if cpu else max(built, 2 * width * number)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=states,
        activations=activations,
        logits=logits,
        buffers=kept + max(gathered, reducing - gradients, updating - gradients),
        build=build,
        step=step,
        copies=(4 * number + optimizer_bytes(recipe, config)) / ranks if recipe.checkpoint.background else 0,
    )


def activation_bytes(recipe: Recipe, config: DecoderConfig, cpu: bool) -> float:
    """Bytes of what one micro-batch keeps for its backward pass, in eager mode; compiled layers keep less.

    A layer keeps the inputs of its norms, products, attention and GELU: 8 hidden states and 2 inner ones (Korthikanti
    et al. 2022 count the same). "selective" keeps no results of norms and GELU, "full" only the layer's input.
    """
    width, hidden, inner = BYTES[recipe.train.precision], config.hidden_size, config.intermediate_size
    length = recipe.context_length()
    mask = width if cpu else 1  # bytes of an element of dropout's mask
    dropped = 2 * mask * hidden * (config.hidden_dropout_prob > 0)
    dropped += (width + mask) * inner * (config.activation_dropout > 0)
    draws = config.num_attention_heads * length * (cpu and config.attention_probs_dropout_prob > 0)
    cheap = width * (2 * hidden + inner)
    layer = width * (8 * hidden + 2 * inner) + dropped + draws + 4 * config.num_attention_heads + 16
    kept = {"none": layer, "selective": layer - cheap, "full": width * hidden}[config.gradient_checkpointing]
    ends = width * 3 * hidden + mask * hidden * (config.hidden_dropout_prob > 0)
    token = config.num_hidden_layers * kept + (layer - kept) + ends
    return recipe.train.micro_batch_size * length * token


def logit_bytes(recipe: Recipe, config: DecoderConfig, cpu: bool) -> float:
    """Bytes of a chunk's logits and of their softmax, and of the weight's gradient (`model/loss.py`).

    The logits and the softmax are in fp32; compiled, as is the default on a GPU, in `train.precision`. A CPU has the
    softmax of few logits at a time. The gradient is in fp32 if there are several chunks.
    """
    compiled = recipe.train.compile is not False and not cpu
    chunk_logits = (COMPILED_CHUNK_LOGITS if compiled else CHUNK_LOGITS)["cpu" if cpu else "cuda"]
    rows = recipe.train.micro_batch_size * recipe.context_length()
    chunk = max(min(rows, chunk_logits // config.padded_vocab_size), 1)
    logits, stored = chunk * config.padded_vocab_size, BYTES[recipe.train.precision]
    held = 2 * (stored if compiled else 4) * logits
    if cpu:
        held = stored * logits + (4 if stored == 4 else 8) * min(logits, CACHED_LOGITS)
    return held + (4 if rows > chunk else stored) * config.padded_vocab_size * config.hidden_size


class Choice(NamedTuple):
    """A ZeRO stage and a way of recomputation."""

    recipe: Recipe
    """With both, and the micro-batch that `memory` is given for."""
    memory: Memory
    largest: int
    """The largest micro-batch that fits; 0 if not even one block does."""


def choices(recipe: Recipe, vocabulary: int, ranks: int, gpu: Gpu) -> Iterator[Choice]:
    """Every ZeRO stage and way of recomputation, at the recipe's micro-batch or the next smaller one that divides.

    Raises UserError if a step's blocks do not divide over the ranks.
    """
    sizes = micro_batch_sizes(recipe, ranks)
    shown = max(size for size in sizes if size <= recipe.train.micro_batch_size)
    for stage in range(0 if recipe.train.precision == "fp32" else 1, 4):
        for recomputation in get_args(Recomputation):
            chosen = {size: choose(recipe, stage, recomputation, size) for size in sizes}
            found = {size: memory(each, vocabulary, ranks) for size, each in chosen.items()}
            fitting = [size for size, each in found.items() if each.step <= (1 - MARGIN) * gpu.memory]
            yield Choice(chosen[shown], found[shown], max(fitting, default=0))


def micro_batch_sizes(recipe: Recipe, ranks: int) -> list[int]:
    """The micro-batches that divide a rank's blocks of a step. Raises UserError if the ranks do not divide those."""
    smallest = choose(recipe, recipe.deepspeed.stage, recipe.model.gradient_checkpointing, 1)
    blocks = smallest.gradient_accumulation_steps(ranks)
    return [size for size in range(1, blocks + 1) if blocks % size == 0]


def choose(recipe: Recipe, stage: int, recomputation: str, micro_batch_size: int) -> Recipe:
    """The recipe with these values. A DeepSpeed file of the user's own is for its stage; others do without it."""
    own = recipe.deepspeed.config if stage == recipe.deepspeed.stage else None
    changed = {
        "model": {"gradient_checkpointing": recomputation},
        "train": {"micro_batch_size": micro_batch_size},
        "deepspeed": {"stage": stage, "config": own},
    }
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=values) for name, values in changed.items()}
    )


def operations_per_token(config: DecoderConfig, context_length: int) -> float:
    """Floating point operations of a token with those of recomputation: "full" computes the layers forward twice."""
    operations = config.flops_per_token(context_length)
    if config.gradient_checkpointing != "full":
        return operations
    ends = (config.vocab_size + config.max_position_embeddings + 4) * config.hidden_size
    layers = config.parameter_count() - ends
    return operations + 2 * layers + 4 * config.num_hidden_layers * config.hidden_size * context_length


class Speed(NamedTuple):
    """How fast a rank computes."""

    flops: float
    """Floating point operations a second, those of recomputation included."""
    source: str
    """Where that is from, in words."""

    def tokens_per_second(self, recipe: Recipe, vocabulary: int, ranks: int) -> float:
        """Of all ranks together. Communication and the update are taken to cost what they cost in the source."""
        return ranks * self.flops / operations_per_token(recipe.decoder_config(vocabulary), recipe.context_length())


def assumed_speed(gpu: Gpu) -> Speed:
    """A guess, where no run was measured."""
    return Speed(MFU * gpu.peak_flops, f"assumed: {MFU:.0%} of the peak; --run measures it")


def measured_speed(run: Path, device_name: str = "") -> Speed:
    """The speed of a run: the median of what it reported, without its first report.

    Raises UserError if it reported less than twice, or if its devices are not of this name.
    """
    record, recipe = read_record(run), load_recipe(str(run / "recipe.toml"))
    start = record.newest_start()
    devices = start.get("devices", "devices that it did not record")
    if device_name not in devices:
        raise UserError(f"--run {run}: was measured on {devices}, not on {device_name}")
    _, *speeds = record.curve("train/tokens_per_second").values() or [0.0]
    if not speeds:
        raise UserError(f"--run {run}: has reported its speed less than twice; let it take 20 steps")
    config = recipe.decoder_config(read_json(run / MANIFEST)["model"]["vocab_size"])
    speed = statistics.median(speeds) * operations_per_token(config, recipe.context_length()) / start["ranks"]
    return Speed(speed, f"measured: {run} on {devices}")


def print_plan(recipe: Recipe, name: str, ranks: int, gpu_name: str, run: Path | None) -> None:
    """Print the plan of a recipe, called `name`, for so many GPUs. run: whose speed to take instead of a guess.

    Raises UserError if the GPU is unknown, or what the other functions raise.
    """
    if gpu_name not in GPUS:
        raise UserError(f"--gpu {gpu_name}: choose from {', '.join(GPUS)}")
    if recipe.on_records() or recipe.has_encoder():
        raise UserError(f'objective.kind = "{recipe.objective.kind}": the plan knows only causal decoders on shards')
    if recipe.deepspeed.offload_optimizer or recipe.deepspeed.offload_parameters:
        raise UserError("deepspeed.offload_optimizer, deepspeed.offload_parameters: the plan does not know them")
    gpu = GPUS[gpu_name]
    vocabulary, tokens, source = training_data(recipe)
    config = recipe.decoder_config(vocabulary)
    found = list(choices(recipe, vocabulary, ranks, gpu))
    own = next(each for each in found if _is_choice(each.recipe, recipe))
    size = own.recipe.train.micro_batch_size
    speed = measured_speed(run, gpu.device_name) if run else assumed_speed(gpu)
    console = Console(highlight=False, markup=False)
    wanted = recipe.train.micro_batch_size
    changed = f" ({wanted} does not divide)" if size != wanted else ""
    console.print(
        f"{name}: {config.parameter_count():,} parameters, {parameter_count(config):,} with the vocabulary padded\n"
        f"vocabulary {vocabulary:,}, {source}\n"
        f"{ranks} x {gpu_name}, {recipe.train.precision}, micro-batch {size}{changed} x {recipe.context_length():,}"
        " tokens\n",
        soft_wrap=True,
    )
    console.print(f"Memory of a GPU in GB ({gpu.memory / 1e9:.0f}, of which {MARGIN:.0%} stay free)", style="bold")
    console.print(_memory_table(found, own))
    console.print(
        "* the recipe. largest: the largest micro-batch that fits and divides evenly.\n"
        f"Peak of the GPU: {gigabytes(own.memory.build)} to build, {gigabytes(own.memory.step)} in a step, while saving"
        " and while loading.\n"
        f"Host memory of a rank: {gigabytes(4 * parameter_count(config))} to build, {gigabytes(own.memory.copies)} more"
        " while saving in the background.\n",
        soft_wrap=True,
    )
    console.print("Time", style="bold")
    console.print(_time_table(own.recipe, vocabulary, ranks, speed, tokens))
    console.print(f"\n{CHECKED}")


CHECKED = """\
Checked against measured runs, on CPUs alone: memory and, with --run, time.
docs/planning.md says how far they are off. Not checked on any GPU: memory and
time. Activations are those of eager mode; compiled layers keep less.
Communication between machines is not counted."""


def training_data(recipe: Recipe) -> tuple[int, dict[str, int], str]:
    """The vocabulary, the training tokens of each folder of shards (empty if one does not exist), and where both are
    from, in words.
    """
    folders = recipe.data_folders()
    missing = [folder for folder in folders.values() if not folder.is_dir()]
    if not missing:
        counts = {name: read_manifest(folder, "shards")["counts"] for name, folder in folders.items()}
        tokens = {name: each["train"]["tokens"] for name, each in counts.items()}
        return next(iter(counts.values()))["vocabulary"], tokens, f"from {', '.join(map(str, folders.values()))}"
    if recipe.model.vocab_size:
        return recipe.model.vocab_size, {}, "from model.vocab_size"
    return VOCABULARY, {}, f"assumed as BioGPT's: no folder {missing[0]}"


def _epochs(recipe: Recipe, tokens: dict[str, int]) -> str:
    total = recipe.train.steps * recipe.train.global_batch_tokens
    told = [
        f"{float(weight) * total / tokens[name]:,.1f} of {tokens[name]:,} tokens{f' of {name}' * (len(tokens) > 1)}"
        for name, weight in recipe.data_weights().items()
        if name in tokens
    ]
    return ", ".join(told) or "unknown without shards"


def _is_choice(choice: Recipe, recipe: Recipe) -> bool:
    chosen, wanted = ((each.deepspeed.stage, each.model.gradient_checkpointing) for each in (choice, recipe))
    return chosen == wanted


HEADER = (
    "ZeRO", "recompute", "weights", "grads", "optim.", "acts.", "logits", "buffers", "peak", "largest"
)  # fmt: skip


def _memory_table(found: list[Choice], own: Choice) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for header in HEADER:
        table.add_column(header, justify="left" if header == "recompute" else "right", no_wrap=True)
    for choice in found:
        parts = choice.memory
        sizes = (
            parts.weights, parts.gradients, parts.optimizer, parts.activations, parts.logits, parts.buffers, parts.step
        )  # fmt: skip
        stage = f"{'*' * (choice is own)}{choice.recipe.deepspeed.stage}"
        largest = str(choice.largest) if choice.largest else "none"
        row = [stage, choice.recipe.model.gradient_checkpointing, *(gigabytes(each) for each in sizes), largest]
        table.add_row(*row, style="bold" if choice is own else "")
    return table


def gigabytes(number: float) -> str:
    """Bytes in GB, with three digits or more."""
    return f"{number / 1e9:.{2 if number < 10e9 else 1}f}"


def _time_table(recipe: Recipe, vocabulary: int, ranks: int, speed: Speed, tokens: dict[str, int]) -> Table:
    """The rows of what the run takes."""
    rate = speed.tokens_per_second(recipe, vocabulary, ranks)
    total = recipe.train.steps * recipe.train.global_batch_tokens
    hours = total / rate / 3600
    rows = {
        "steps": f"{recipe.train.steps:,} of {recipe.train.global_batch_tokens:,} tokens",
        "micro-batches of a step": f"{recipe.gradient_accumulation_steps(ranks):,} on each GPU",
        "tokens": f"{total:,}",
        "epochs": _epochs(recipe, tokens),
        "tokens a second": f"{rate:,.0f}, {rate / ranks:,.0f} on each GPU",
        "speed": speed.source,
        "days": f"{hours / 24:,.2f}",
        "GPU hours": f"{hours * ranks:,.0f}",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    return table
