"""The observer that evaluates a run on its held-out examples."""

import math
from typing import Any

from torch import Tensor

from pretrain.held_out import held_out_loss
from pretrain.metrics import Reporter
from pretrain.run import Observer, Run


def evaluate_run(run: Run, max_examples: int) -> dict[str, Any]:
    """The held-out loss of a run's weights as they are now. Changes no state of the run."""
    run.engine.eval()

    def stamped(*batch: Tensor) -> Tensor:
        run.stamp(f"the evaluation at step {run.step}", long=True)
        return run.engine(*batch)

    return held_out_loss(stamped, run.objective.held_out(), run.recipe.train.micro_batch_size, run.device, max_examples)


class Evaluator(Observer):
    """Evaluates at step 0, every `evaluate.every_steps` steps and after the last step.

    `Saver` has it evaluate before each checkpoint too. A run that is stopped early is not evaluated, because a launcher
    may kill it soon and the checkpoint comes first.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def begin(self, run: Run) -> None:
        """Evaluate at the start, which gives the curve its point at step 0."""
        self.evaluate(run)

    def after_step(self, run: Run, report: dict[str, Any]) -> None:
        """Evaluate if it is due."""
        due = run.step % run.recipe.evaluate.every_steps == 0 and not run.stop_reason
        if due or run.step == run.recipe.train.steps:
            self.evaluate(run)

    def evaluate(self, run: Run) -> None:
        """Evaluate and report, unless this step has been evaluated already."""
        if run.held_out.get("step") == run.step:
            return
        result = evaluate_run(run, run.recipe.evaluate.max_blocks)
        run.held_out = {"step": run.step, "max_examples": run.recipe.evaluate.max_blocks, **result}
        best = run.best.get("loss", math.inf)
        if math.isfinite(result["loss"]) and not best <= result["loss"]:  # an old record's best may be NaN
            run.best = run.held_out
        figures = {name: value for name, value in result.items() if name not in ("loss", "tokens")}
        text = "".join(f"  {name.replace('_', ' ')} {value:.5g}" for name, value in figures.items())
        values = {f"validation__{name}": value for name, value in result.items()}
        self._reporter.say(run, f"held-out loss {result['loss']:.4f}{text}", **values)
