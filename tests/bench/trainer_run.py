"""One rank of `transformers.Trainer` with DeepSpeed: `torchrun -m tests.bench.trainer_run RECIPE [SETTING ...]`.

It takes the arguments of `pretrain.train` and does the same: the same first weights, blocks, optimizer, schedule,
DeepSpeed configuration and checkpoints every few steps. With a checkpoint in the folder it resumes, as Trainer's
documentation advises. Losses and seconds are appended to `metrics.jsonl`, by the names that our runs use.
"""

import builtins
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from model.hf import hf_config, to_hf
from pretrain.deepspeed_config import deepspeed_config
from pretrain.engine import init_distributed
from pretrain.objectives.kinds import make_objective
from pretrain.objectives.objective import Objective
from pretrain.recipe import Recipe, load_recipe
from tests.bench.killed import strike


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """The blocks of a whole run, in our order."""

    def __init__(self, objective: Objective, number: int) -> None:
        self._objective, self._number = objective, number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        inputs, targets = (each[0] for each in self._objective.batch(range(number, number + 1)))
        return {"input_ids": inputs, "labels": targets, "shift_labels": targets}  # ours are shifted already


def build_model(recipe: Recipe, objective: Any) -> Any:
    """transformers' model of the recipe's shape, with the first weights of our run."""
    from transformers import BioGptConfig, BioGptForCausalLM

    config: Any = BioGptConfig(**hf_config(objective.config))
    config.use_cache = False
    config._attn_implementation = "sdpa"
    torch.manual_seed(recipe.train.seed)
    model = BioGptForCausalLM(config)
    model.load_state_dict(to_hf(objective.build_model().state_dict(), config.vocab_size), strict=False)  # no tied head
    return model


def build_arguments(recipe: Recipe, ranks: int) -> Any:
    """Trainer's arguments for the recipe."""
    from transformers import TrainingArguments

    optimizer, schedule = recipe.optimizer, recipe.schedule
    return TrainingArguments(
        output_dir=recipe.train.run,
        max_steps=recipe.train.steps,
        per_device_train_batch_size=recipe.train.micro_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps(ranks),
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        learning_rate=optimizer.learning_rate,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.gradient_clipping,
        lr_scheduler_type=schedule.kind,
        warmup_steps=schedule.warmup_steps,
        save_steps=recipe.checkpoint.every_steps,
        save_total_limit=recipe.checkpoint.keep_last,
        logging_steps=recipe.log.every_steps,
        seed=recipe.train.seed,
        deepspeed=deepspeed_config(recipe, ranks),
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    """Start or resume the run."""
    from transformers import Trainer, TrainerCallback, modeling_utils
    from transformers.trainer_utils import get_last_checkpoint

    recipe = load_recipe(sys.argv[1], sys.argv[2:])
    init_distributed()  # as ours: DeepSpeed compiles nothing
    run, objective, ranks = Path(recipe.train.run), make_objective(recipe), int(os.environ["WORLD_SIZE"])
    run.mkdir(parents=True, exist_ok=True)

    class Record(TrainerCallback):
        """Appends the loss and the speed of each step to metrics.jsonl."""

        began = seconds = 0.0

        def on_step_begin(self, *_: Any, **more: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, *_: Any, **more: Any) -> None:
            self.seconds = time.monotonic() - self.began

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if "loss" in logs:
                speed = recipe.train.global_batch_tokens / self.seconds
                write(state, {"train/loss": logs["loss"], "train/tokens_per_second": speed})

    class Saving(Trainer):
        """Appends the seconds of each save to metrics.jsonl."""

        def _save_checkpoint(self, *arguments: Any, **more: Any) -> None:
            began = time.monotonic()
            super()._save_checkpoint(*arguments, **more)
            write(self.state, {"checkpoint/seconds": time.monotonic() - began})

    def write(state: Any, values: dict[str, float]) -> None:
        if state.is_world_process_zero:
            with (run / "metrics.jsonl").open("a") as stream:
                stream.write(json.dumps({"step": state.global_step} | values) + "\n")

    files = ((builtins, "open"), (os, "makedirs"), (torch, "save"), (modeling_utils, "safe_save_file"))
    strike(save=(Saving, "_save_checkpoint"), files=(*files, (shutil, "rmtree")), step=(Record, "on_step_begin"))
    trainer = Saving(
        model=build_model(recipe, objective),
        args=build_arguments(recipe, ranks),
        train_dataset=Blocks(objective, recipe.train.steps * recipe.global_batch_size()),
        callbacks=[Record()],
    )
    trainer.train(resume_from_checkpoint=bool(get_last_checkpoint(str(run))))


if __name__ == "__main__":
    main()
