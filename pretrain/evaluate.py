"""The observer that evaluates a run on its held-out examples."""

import math
from typing import Any

from torch import Tensor

from pretrain.held_out import (
    PROBE_EXAMPLES,
    HeldOut,
    Outcome,
    combined_figures,
    held_out_figures,
    rank,
    run_held_out,
)
from pretrain.metrics import Reporter
from pretrain.run import Observer, Run


def probe_loss(run: Run) -> float:
    """The loss of the first PROBE_EXAMPLES held-out examples of each source, by the run's weights as they are now."""
    sources, figures = run.objective.held_out(), {}
    for name, held_out in sources.items():
        examples = range(min(PROBE_EXAMPLES, held_out.examples))
        figures[name] = held_out_figures(held_out, _outcome(run, held_out, examples), examples)
    return combined_figures(sources, figures)["loss"]


def _outcome(run: Run, held_out: HeldOut, examples: range) -> Outcome:
    run.engine.eval()

    def stamped(*batch: Tensor) -> Any:
        run.stamp(f"the evaluation at step {run.step}", long=True)
        return run.engine(*batch)

    with run.stopwatch.part("evaluation"):
        return run_held_out(stamped, held_out, run.recipe.train.micro_batch_size, run.device, examples)


class Evaluator(Observer):
    """Evaluates at step 0, every `evaluate.every_steps` steps and after the last step.

    `Saver` has it evaluate before each checkpoint too. A run that is stopped early is not evaluated, because a launcher
    may kill it soon and the checkpoint comes first.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._probe: tuple[int, float] = (-1, math.nan)

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
        result = self._evaluate(run)
        sources = run.objective.held_out()
        score = next(iter(sources.values())).score
        chosen_by = {"score": score} if score else {}
        run.held_out = {"step": run.step, "max_examples": run.recipe.evaluate.max_blocks, **chosen_by, **result}
        if rank(run.held_out) < rank(run.best):
            run.best = run.held_out
        several = len(sources) > 1  # then the line has their losses, and the metrics the rest
        told = [name for name in result if (name.endswith("/loss") if several else name not in ("loss", "tokens"))]
        text = "".join(f"  {name.removesuffix('/loss').replace('_', ' ')} {result[name]:.5g}" for name in told)
        values = {f"validation__{name}": value for name, value in result.items()}
        self._reporter.say(run, f"held-out loss {result['loss']:.4f}{text}", **values)

    def _evaluate(self, run: Run) -> dict[str, Any]:
        """The held-out loss of the run's weights as they are now, with other figures."""
        sources, limit = run.objective.held_out(), run.recipe.evaluate.max_blocks
        probed, figures = {}, {}
        for name, held_out in sources.items():
            examples = min(held_out.examples, limit or held_out.examples)
            first, rest = range(min(PROBE_EXAMPLES, examples)), range(PROBE_EXAMPLES, examples)
            outcome = _outcome(run, held_out, first)
            probed[name] = held_out_figures(held_out, outcome, first)
            figures[name] = held_out_figures(held_out, outcome + _outcome(run, held_out, rest), range(examples))
        if not 0 < limit < PROBE_EXAMPLES:
            self._probe = run.step, combined_figures(sources, probed)["loss"]
        return combined_figures(sources, figures)

    def probe(self, run: Run) -> float:
        """The loss of the first examples (`probe_loss`), from this step's evaluation if there was one."""
        step, loss = self._probe
        return loss if step == run.step else probe_loss(run)
