"""DeepSpeed: the environment it needs, the engine of a recipe, and its state as plain tensors.

No other file knows how DeepSpeed works inside. On a machine without a GPU, its CPU accelerator and gloo are used.
"""

import contextlib
import io
import logging
import math
import os
import shutil
import socket
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from data.common.files import UserError
from model.architecture import Architecture
from pretrain.deepspeed_config import deepspeed_config
from pretrain.held_out import Batch, to_device
from pretrain.optimizer import Optimizer
from pretrain.recipe import Recipe
from pretrain.tensor_file import Fragment, Layout

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger, set_z3_leaf_modules

logger.setLevel(logging.WARNING)
warnings.filterwarnings(
    "ignore", category=FutureWarning, module="torch.distributed"
)  # DeepSpeed calls deprecated names
Engine = Any  # a DeepSpeedEngine, whose annotations are wrong


def init_distributed() -> torch.device:
    """Join the process group that torchrun or deepspeed describes, or make one of a single rank. Returns our device."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        # torchrun sets one thread for each rank. Divide the cores among the ranks instead.
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))))
        # DeepSpeed would compile its shared-memory collective now, which needs g++ and ninja and takes a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device, backend = torch.device("cpu"), "gloo"
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts and not dist.is_initialized():
        # torchrun --max-restarts keeps its store. Without a prefix, ranks would find the addresses of the dead ranks
        # there (torch 2.13).
        kept = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = PrefixStore(f"restart-{restarts}", kept)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return device


def free_port() -> int:
    """A TCP port that is free on this machine at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def build_engine(recipe: Recipe, model: Architecture, ranks: int) -> tuple[Engine, Optimizer]:
    """The model and its optimizer under DeepSpeed. The loop sets the learning rate before each step."""
    if recipe.deepspeed.offload_optimizer:
        programs = ("g++", "ninja", "nvcc") if torch.cuda.is_available() else ("g++", "ninja")
        require_compiler("deepspeed.offload_optimizer", programs, "which DeepSpeed needs for its CPU Adam")
    optimizer = Optimizer(recipe, model)
    if recipe.deepspeed.stage == 3 and model.leaf_modules:
        # A layer that layerdrop skips must count as run, or ZeRO-3 waits for its hooks (see DecoderLayer.forward).
        set_z3_leaf_modules(model, list(model.leaf_modules))
    accelerator: Any = get_accelerator()
    if recipe.train.precision == "fp16" and not accelerator.is_fp16_supported():
        raise UserError('train.precision = "fp16": this device does not support it; use bf16 or fp32')
    if compiles(recipe):
        model.compile_layers()
    config = deepspeed_config(recipe, ranks)
    with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints the memory in use
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer.torch, config=config, dist_init_required=False
        )
    optimizer.locate(held_fragments(engine, optimizer, "model"))
    return engine, optimizer


def compiles(recipe: Recipe) -> bool:
    """`train.compile`, or its default. Raises UserError if it is true and inductor finds no compiler.

    On a CPU inductor compiles C++. On a GPU it compiles triton's launchers, which are C and include Python's headers.
    """
    gpu = torch.cuda.is_available()
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if recipe.train.compile:
        require_compiler("train.compile", ("cc",) if gpu else ("g++",), "which torch.compile needs")
        if gpu and not header.is_file():
            raise UserError(f"train.compile = true: {header} is missing, which torch.compile needs on a GPU")
    if recipe.train.compile is None:
        # Padded records have several lengths, and each would be compiled anew.
        return gpu and not recipe.on_records() and bool(shutil.which("cc")) and header.is_file()
    return recipe.train.compile


def require_compiler(key: str, programs: tuple[str, ...], what_for: str) -> None:
    """Raise UserError if a program that `key = true` needs is missing. pip's ninja is found beside our Python."""
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    missing = [name for name in programs if not shutil.which(name)]
    if missing:
        raise UserError(f"{key} = true: {missing[0]} is missing, {what_for}")


def finish_step(engine: Engine) -> tuple[Tensor, bool]:
    """Take the optimizer step after the last micro-batch.

    Returns the norm of the gradients before clipping, a scalar that stays on the device if it is there, and whether
    the weights were updated. At stages 1 to 3 DeepSpeed skips a step if a gradient is not finite. At stage 0 in fp32 it
    would apply the step, so the reduced gradients, which are the same on every rank, are checked here first.
    """
    if engine.zero_optimization_stage() > 0:
        engine.step()
        norm = engine.get_global_grad_norm()
        return torch.as_tensor(math.nan if norm is None else norm, dtype=torch.float64), engine.was_step_applied()
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if torch.isfinite(norm):
        engine.step()
        return norm, True
    update, engine.optimizer.step = engine.optimizer.step, lambda: None
    engine.step()  # counts the step and clears the gradients
    engine.optimizer.step = update
    return norm, False


def held_fragments(engine: Engine, optimizer: Optimizer, kind: str) -> Iterator[Fragment]:
    """What this rank holds of the fp32 weights (kind "model") or of one of the optimizer's states, by our names.

    The kind "gradient" is there between the last backward pass of a step and its update: the gradients of the global
    batch, times `gradient_scale`.

    At stage 0 every rank holds everything; at the others each number is held by one rank. The fragments are views:
    writing into them changes the state. Takes no collective. States are zeros, and no views, before the first update.
    """
    _link_states(engine, optimizer)
    for name, parameter in engine.module.named_parameters():
        if kind not in ("model", "gradient", *optimizer.states[name]):
            continue
        missing = kind not in ("model", "gradient") and not optimizer.torch.state  # every step so far was skipped
        found = _fragment(engine, optimizer, parameter, "model" if missing else kind)
        if found:
            yield name, found[0], torch.zeros_like(found[1]) if missing else found[1]


def _fragment(engine: Engine, optimizer: Optimizer, parameter: Any, kind: str) -> tuple[int, Tensor] | None:
    """Where this rank's part of a parameter starts, and its numbers of a kind."""
    stage, state = engine.zero_optimization_stage(), None if kind == "model" else kind
    if stage == 0:
        whole = {"model": parameter.detach(), "gradient": parameter.grad}
        found = whole[kind] if kind in whole else optimizer.torch.state[parameter][kind]
        return None if found is None else (0, found.view(-1))
    if stage < 3:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        start, numbers = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        if kind != "gradient":
            return start, mapping.get_hp_fragment(state).detach()
        values = mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
        return start, values[start:][:numbers] if len(values) > numbers else values  # in bf16 at stage 1 it is whole
    # Its public functions return copies for an offloaded optimizer.
    if kind == "gradient":
        values, _ = engine.optimizer._get_fp32_grad_state_partition(parameter, True)
    else:
        values, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, True, state)
    start = values.numel() * dist.get_rank()
    return start, values.detach()[: max(0, parameter.ds_numel - start)]  # the last rank's is padded


def own_fragments(engine: Engine, optimizer: Optimizer, kind: str) -> Iterator[Fragment]:
    """The fragments that this rank writes into a checkpoint. At stage 0, where all hold all, each takes a slice."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name, start, values in held_fragments(engine, optimizer, kind):
        if engine.zero_optimization_stage() > 0:
            yield name, start, values
        else:
            first, last = (len(values) * each // ranks for each in (rank, rank + 1))
            yield name, first, values[first:last]


def updated_numbers(engine: Engine, optimizer: Optimizer) -> dict[str, int]:
    """How many numbers of the model have a state of the optimizer, by the rule that updates them, over all ranks.

    The rows that pad the vocabulary are not counted.
    """
    counts, layout = dict.fromkeys(optimizer.rules.values(), 0), Layout(engine.module)
    for state in optimizer.state_names:
        for fragment in own_fragments(engine, optimizer, state):
            name = fragment[0]
            if state == optimizer.states[name][0]:
                counts[optimizer.rules[name]] += sum(values.numel() for _, _, values in layout.ranges(fragment))
    everywhere: list[Any] = [counts] * dist.get_world_size()
    dist.all_gather_object(everywhere, counts)
    return {rule: sum(each[rule] for each in everywhere) for rule in counts}


def restore_state(
    engine: Engine,
    optimizer: Optimizer,
    read: Callable[[str, Iterable[Fragment]], None],
    batch: Batch,
    updates: int,
    device: torch.device,
) -> None:
    """Put the state of a checkpoint into the engine. Every rank must call it, at every stage.

    read: fills fragments of a kind ("model" or a state of the optimizer). batch: any batch of the run's objective.
    updates: the optimizer's updates so far.

    The weights must be in the model before `build_engine` too: DeepSpeed makes the working weights in bf16 there, and
    the fp32 masters from those. It makes the optimizer's states at the first step, so one step is taken here at
    learning rate 0, which changes no weight.
    """
    optimizer.set_learning_rate(0.0)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(*to_device(batch, device)) * 0.0)
        engine.step()
    for kind in ("model", *optimizer.state_names):
        if kind != "model" or engine.zero_optimization_stage() > 0:  # at stage 0 the model holds the fp32 weights
            read(kind, held_fragments(engine, optimizer, kind))
    optimizer.restore_update_count(updates)


def _link_states(engine: Engine, optimizer: Optimizer) -> None:
    """Let DeepSpeed find the states of all parameter groups at stages 1 and 2.

    It links them once, after the first update of the first group, when the other groups have no states yet (0.19).
    """
    wrapper = engine.optimizer
    if optimizer.torch.state and hasattr(wrapper, "_hp_optimizer_states_linked"):
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()


def gradient_scale(engine: Engine) -> float:
    """By what fp16's loss scaling has multiplied the gradients that wait for the update. 1 in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0


def loss_scale(engine: Engine) -> dict[str, float]:
    """The state of fp16's dynamic loss scaling. Empty in other precisions."""
    scaler = vars(getattr(engine.optimizer, "loss_scaler", object)) if engine.fp16_enabled() else {}
    return {name: value for name, value in scaler.items() if type(value) in (int, float)}


def restore_loss_scale(engine: Engine, state: dict[str, float]) -> None:
    """Restore what `loss_scale` returned."""
    for name, value in state.items():
        setattr(engine.optimizer.loss_scaler, name, value)
