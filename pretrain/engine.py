"""DeepSpeed: the environment it needs, the engine of a recipe, and its state as plain tensors.

Nothing else in the project knows DeepSpeed's inside. On a machine without a GPU its CPU accelerator and gloo are used.
"""

import contextlib
import io
import logging
import os
import socket
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.decoder import Decoder, DecoderLayer
from pretrain.recipe import Recipe, deepspeed_config

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
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
Engine = Any  # Engine, whose annotations do not describe it
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
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return device


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def build_engine(recipe: Recipe, decoder: Decoder, ranks: int) -> tuple[Engine, torch.optim.Optimizer]:
    """The decoder and AdamW under DeepSpeed. The learning rate is set by the loop before each step."""
    optimizer = torch.optim.AdamW(
        decoder.parameters(),
        lr=recipe.optimizer.learning_rate,
        betas=recipe.optimizer.betas,
        eps=recipe.optimizer.epsilon,
        weight_decay=recipe.optimizer.weight_decay,
        fused=torch.cuda.is_available(),
    )
    if recipe.deepspeed.stage == 3:
        # A layer that layerdrop skips must count as run, or ZeRO-3 waits for its hooks (see DecoderLayer.forward).
        set_z3_leaf_modules(decoder, [DecoderLayer])
    config = deepspeed_config(recipe, ranks)
    with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints the memory in use, unasked
        engine, *_ = deepspeed.initialize(model=decoder, optimizer=optimizer, config=config, dist_init_required=False)
    return engine, optimizer


def set_learning_rate(engine: Engine, rate: float) -> None:
    """The rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def gradient_norm(engine: Engine) -> float:
    """Norm of the global batch's gradients before clipping, after `engine.step()`; nan where DeepSpeed has none."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def gather_state(engine: Engine, optimizer: torch.optim.Optimizer, kind: str) -> dict[str, Tensor]:
    """The whole fp32 weights ("model") or a moment ("exp_avg", "exp_avg_sq") by our names, on rank 0's CPU.

    Every rank must call it; the others get empty tensors' names only. Works at any stage.
    """
    gathered = {}
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage() == 0:
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
    step: int,
    device: torch.device,
) -> None:
    """Put fp32 weights, Adam's moments (by kind, then by our names; whole, on every rank) and step into the engine.

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
        moments["step"].fill_(float(step))
