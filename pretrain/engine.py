"""DeepSpeed: the environment it needs, the engine of a recipe, and its state as plain tensors.

Nothing else in the project knows DeepSpeed's inside. On a machine without a GPU its CPU accelerator and gloo are used.
"""

import contextlib
import io
import logging
import math
import os
import shutil
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from data.common.files import UserError
from model.decoder import Decoder, DecoderLayer
from pretrain.recipe import Recipe, deepspeed_config

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    set_z3_leaf_modules,
)

logger.setLevel(logging.WARNING)
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls of old names
Engine = Any  # a DeepSpeedEngine, whose annotations do not describe it
MOMENTS = ("exp_avg", "exp_avg_sq")


def init_distributed() -> torch.device:
    """Join the process group that torchrun or deepspeed describes (alone where none does). Returns our device."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        # torchrun sets one thread; share the cores out instead.
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))))
        # DeepSpeed's shared-memory collective would be compiled now, which needs g++ and ninja, and takes a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device, backend = torch.device("cpu"), "gloo"
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts and not dist.is_initialized():
        # torchrun --max-restarts keeps its store: without a prefix ranks meet the addresses of the dead (torch 2.13).
        kept = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = PrefixStore(f"restart-{restarts}", kept)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return device


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def build_engine(recipe: Recipe, decoder: Decoder, ranks: int) -> tuple[Engine, torch.optim.Optimizer]:
    """The decoder and AdamW under DeepSpeed. The learning rate is set by the loop before each step."""
    everything = list(decoder.parameters())
    groups: list[dict[str, Any]] = [{"params": everything}]
    if not recipe.optimizer.decay_biases_and_norms:
        groups = [
            {"params": [parameter for parameter in everything if parameter.dim() > 1]},
            {"params": [parameter for parameter in everything if parameter.dim() < 2], "weight_decay": 0.0},
        ]
    settings: dict[str, Any] = {
        "lr": recipe.optimizer.learning_rate,
        "betas": recipe.optimizer.betas,
        "eps": recipe.optimizer.epsilon,
        "weight_decay": recipe.optimizer.weight_decay,
    }
    if recipe.deepspeed.offload_optimizer:
        require_compiler("deepspeed.offload_optimizer", ("g++", "ninja"), "which compiles DeepSpeed's CPU Adam")
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **settings)
    if recipe.deepspeed.stage == 3:
        # A layer that layerdrop skips must count as run, or ZeRO-3 waits for its hooks (see DecoderLayer.forward).
        set_z3_leaf_modules(decoder, [DecoderLayer])
    accelerator: Any = get_accelerator()
    if recipe.train.precision == "fp16" and not accelerator.is_fp16_supported():
        raise UserError('train.precision = "fp16": this device does not support it; use bf16 or fp32')
    if compiles(recipe):
        decoder.compile_layers()
    config = deepspeed_config(recipe, ranks)
    with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints the memory in use, unasked
        engine, *_ = deepspeed.initialize(model=decoder, optimizer=optimizer, config=config, dist_init_required=False)
    return engine, optimizer


def compiles(recipe: Recipe) -> bool:
    """`train.compile`, or its default. UserError where it is asked for and inductor has no compiler.

    On a CPU inductor writes C++, on a GPU triton's launchers are C.
    """
    gpu = torch.cuda.is_available()
    if recipe.train.compile:
        require_compiler("train.compile", ("cc",) if gpu else ("g++",), "which torch.compile needs")
    return gpu and bool(shutil.which("cc")) if recipe.train.compile is None else recipe.train.compile


def require_compiler(key: str, programs: tuple[str, ...], what_for: str) -> None:
    """UserError where one of the programs that `key = true` needs is missing. pip's ninja lies beside our Python."""
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    missing = [name for name in programs if not shutil.which(name)]
    if missing:
        raise UserError(f"{key} = true: {missing[0]} is missing, {what_for}")


def set_learning_rate(engine: Engine, rate: float) -> None:
    """The rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def finish_step(engine: Engine) -> tuple[float, bool]:
    """`engine.step()` of the last micro-batch: the gradients' norm before clipping, and whether weights moved.

    DeepSpeed leaves a step out at stages 1 to 3 where a gradient is not finite. At stage 0 in fp32 it would apply it,
    so there the reduced gradients, which are the same on every rank, are looked at first.
    """
    if engine.zero_optimization_stage() > 0:
        engine.step()
        norm = engine.get_global_grad_norm()
        return (float("nan") if norm is None else float(norm)), engine.was_step_applied()
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm):
        engine.step()
        return norm, True
    update, engine.optimizer.step = engine.optimizer.step, lambda: None
    engine.step()  # counts the step and clears the gradients
    engine.optimizer.step = update
    return norm, False


def gather_state(engine: Engine, optimizer: torch.optim.Optimizer, kind: str) -> dict[str, Tensor]:
    """The whole fp32 weights ("model") or a moment ("exp_avg", "exp_avg_sq") by our names, on rank 0's CPU.

    Every rank must call it; the others get empty tensors' names only. Works at any stage.
    """
    gathered = {}
    for name, parameter in engine.module.named_parameters():
        if kind != "model" and not optimizer.state:  # every step so far was skipped
            value = torch.zeros(getattr(parameter, "ds_shape", parameter.shape))
        elif engine.zero_optimization_stage() == 0:
            value = parameter.detach() if kind == "model" else optimizer.state[parameter][kind]
        elif kind == "model":
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, kind)
        if dist.get_rank() == 0:
            assert value is not None, name
            gathered[name] = value.detach().to("cpu", torch.float32, copy=True)
    return gathered


def restore_state(
    engine: Engine,
    optimizer: torch.optim.Optimizer,
    state: dict[str, dict[str, Tensor]],
    updates: int,
    device: torch.device,
) -> None:
    """Put fp32 weights, Adam's moments (by kind, then by our names; whole, on every rank) into the engine.

    updates: Adam's count of steps, for its bias correction.

    The weights have to be in the decoder before `build_engine` too: the working weights in bf16 are made there, and
    the fp32 masters from those. DeepSpeed makes the moments at the first step, so one is taken at learning rate 0,
    which changes no weight.
    """
    set_learning_rate(engine, 0.0)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(token, token) * 0.0)
        engine.step()
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage() > 0:
            safe_set_full_fp32_param(parameter, state["model"][name].to(device))
        for kind in MOMENTS:
            value = state[kind][name].to(device)
            if engine.zero_optimization_stage() > 0:
                safe_set_full_optimizer_state(parameter, value, kind)
            else:
                optimizer.state[parameter][kind].copy_(value)
    for moments in optimizer.state.values():
        counted = moments["step"]  # a tensor in torch's AdamW, a number in DeepSpeed's
        moments["step"] = torch.full_like(counted, updates) if isinstance(counted, Tensor) else updates


def loss_scale(engine: Engine) -> dict[str, float]:
    """State of fp16's dynamic loss scaling; empty in other precisions."""
    scaler = vars(getattr(engine.optimizer, "loss_scaler", object)) if engine.fp16_enabled() else {}
    return {name: value for name, value in scaler.items() if type(value) in (int, float)}


def restore_loss_scale(engine: Engine, state: dict[str, float]) -> None:
    """Put back what `loss_scale` gave."""
    for name, value in state.items():
        setattr(engine.optimizer.loss_scaler, name, value)
