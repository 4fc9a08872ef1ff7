"""The commands that train, evaluate, export and use a model. Each imports what it needs when it runs."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from data.common.files import UserError
from launch.options import Out

Step = Annotated[str, typer.Option(metavar="N|best", help="Checkpoint of a run to use; default: the newest.")]
Average = Annotated[int, typer.Option(min=1, help="Use the mean of the weights of a run's last so many checkpoints.")]


def train(
    recipe: Annotated[
        str, typer.Argument(help="A TOML file, or a bundled recipe: tiny, biogpt, biogpt-fast, biogpt-large.")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Settings that override the recipe.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=0, help="Number of processes; 0 means one per GPU, or one on a CPU.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, take two short steps, and leave nothing behind.")
    ] = False,
) -> None:
    """Train on this machine, or resume a run. Starts torchrun with one process per rank.

    Example: `biogpt train tiny data.shards=shards train.run=run train.steps=500 --ranks 2`
    """
    from data.common.lease import hold
    from pretrain import ERROR_FILE
    from pretrain.checkpoint import check_state, newest_checkpoint, read_state, step_of
    from pretrain.deepspeed_config import deepspeed_config
    from pretrain.objectives.kinds import make_objective
    from pretrain.objectives.next_token import VERIFIED
    from pretrain.recipe import load_recipe
    from pretrain.run_folder import check_run_folder

    # Mistakes are found here, where they are one line, and not in the ranks, where torchrun reports a failure.
    ranks = ranks or default_ranks()
    loaded = load_recipe(recipe, settings or [])
    deepspeed_config(loaded, ranks)
    check_run_folder(Path(loaded.train.run))
    objective = make_objective(loaded)
    objective.check()
    objective.verify()
    checkpoint, _ = newest_checkpoint(Path(loaded.train.run))
    check_state(checkpoint, read_state(checkpoint) if checkpoint else {}, loaded, objective)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"PYTHONSAFEPATH": "1", VERIFIED: str(objective.identity().get("shards"))}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    command = [*launcher, "-m", "pretrain.dry_run" if dry_run else "pretrain.train", recipe, *(settings or [])]
    if dry_run:
        with hold(Path(loaded.train.run)):  # the folder can be written, and nobody trains in it
            pass
    with tempfile.TemporaryDirectory() as temporary:
        error = Path(temporary) / "error"
        environment[ERROR_FILE] = str(error)
        # A dry run has nothing to save, so a stop file that has no folder makes the first Ctrl-C end it.
        stop_file = (Path(temporary) / "none" if dry_run else Path(loaded.train.run)) / "stop"
        status = run_interruptible(command, environment, stop_file)
        if (
            error.is_file()
        ):  # a mistake that only the ranks could find: the last line says it, after the launcher's report
            raise UserError(error.read_text(encoding="utf-8"))
    if status:
        raise SystemExit(status)
    if dry_run:
        would = f"resume from {checkpoint.name}" if checkpoint else "begin a new run"
        print(f"{loaded.train.run}: the dry run passed and wrote nothing; without --dry-run this would {would}")
        return
    checkpoint, _ = newest_checkpoint(Path(loaded.train.run), verify=False)
    step = step_of(checkpoint) if checkpoint else 0
    run = loaded.train.run
    following = f"biogpt export {run} --out hf/" if step >= loaded.train.steps else "run the same command to resume"
    past = " (the run is past it; raise train.steps to go on)" if step > loaded.train.steps else ""
    print(f"{run}: step {step} of {loaded.train.steps}{past}; next: {following}")


def finetune(
    task: Annotated[str, typer.Argument(help="A benchmark: pubmedqa, hoc, bc5cdr-relations, bc5cdr-entities.")],
    model: Annotated[Path, typer.Option("--model", help="The model to start from: an exported folder or a run.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of the benchmark's files, as they were published.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Settings that override the recipe.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=0, help="Number of processes; 0 means one per GPU, or one on a CPU.")] = 0,
) -> None:
    """Fine-tune a model on a benchmark: write its records beside the run, and train by the recipe finetune-TASK.

    Example: `biogpt finetune pubmedqa --model hf/ --data pubmedqa/ train.run=pubmedqa-run`
    """
    from pretrain.recipe import bundled_recipes, load_recipe
    from pretrain.tasks.records import write_records

    recipe = f"finetune-{task}"
    if recipe not in bundled_recipes():
        names = [name.removeprefix("finetune-") for name in bundled_recipes() if name.startswith("finetune-")]
        raise UserError(f"{task}: there is no recipe to fine-tune on it; choose from {', '.join(names)}")
    own = [f"model.weights={json.dumps(str(model))}", *(settings or [])]
    loaded = load_recipe(recipe, ["data.records=records", *own])
    records = Path(loaded.train.run).resolve()
    records = records.with_name(f"{records.name}.records")
    counts = write_records(task, loaded.objective.kind, data, records)["counts"]
    print(f"{records}: {', '.join(f'{count:,} {split}' for split, count in counts.items())} records")
    train(recipe, [f"data.records={json.dumps(str(records))}", *own], ranks)


def run_interruptible(command: list[str], environment: dict[str, str], stop_file: Path) -> int:
    """Run a launcher in a process group of its own and return its exit code.

    The first Ctrl-C or SIGTERM writes the stop file, so that the run saves a checkpoint and ends. The second one kills
    the launcher and its ranks, and so does the first if the stop file's folder does not exist.
    """
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def stop(number: int, _: object) -> None:
        if stop_file.exists() or not stop_file.parent.exists():
            import psutil  # comes with DeepSpeed

            # torchrun starts its ranks in sessions of their own, so a signal to its group would leave them running.
            for each in (*psutil.Process(process.pid).children(recursive=True), process):
                each.kill()
            raise SystemExit(128 + number)
        stop_file.touch()
        print("biogpt: stopping after this step; press again to stop at once", file=sys.stderr, flush=True)

    before = [(number, signal.signal(number, stop)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        return process.wait()
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def default_ranks() -> int:
    """One rank per GPU, or one on a CPU."""
    import torch

    return max(1, torch.cuda.device_count())


def images(
    out: Out,
    count: Annotated[int, typer.Option(min=64, help="Number of training pictures; each gives five records.")] = 8_192,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the pictures and of the quantiser.")] = 0,
) -> None:
    """Draw pictures of coloured shapes, train their quantiser, and write instruction records about them.

    Example: `biogpt images --out images/`
    """
    from data.text.reserved import RESERVED_NUMBERS
    from pretrain.images import make_images

    counts = make_images(out, count, seed)["counts"]
    error, of_mean = counts["squared_error"], counts["squared_error_of_mean_picture"]
    print(f"{out}: squared error of held-out pictures {error:,.1f}; the mean picture's is {of_mean:,.1f}")
    print(f"{out}: {counts['pictures']['train']:,} training pictures; biogpt tokenizer --reserve {RESERVED_NUMBERS}")


def plan(
    recipe: Annotated[
        str, typer.Argument(help="A TOML file, or a bundled recipe: tiny, biogpt, biogpt-fast, biogpt-large.")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Settings that override the recipe.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: a100-40gb, a100, h100, h200, l40s, rtx4090.")] = "h100",
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A run on such GPUs whose speed is taken; 20 steps are enough.")
    ] = None,
) -> None:
    """Say what a run will need: parameters, memory of a GPU, the largest micro-batch, tokens, days and GPU hours.

    Example: `biogpt plan biogpt --gpus 64 --gpu h100`
    """
    from pretrain.plan import print_plan
    from pretrain.recipe import load_recipe

    print_plan(load_recipe(recipe, settings or []), recipe, gpus, gpu, run)


def checkpoints(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every file against its sha256.")] = False,
    return_to: Annotated[
        str, typer.Option(metavar="STEP", help="Resume from this step next time; later checkpoints are set aside.")
    ] = "",
) -> None:
    """List the checkpoints of a run with their step, held-out loss and size, and whether they are whole.

    Example: `biogpt checkpoints run/ --verify`
    """
    from pretrain.checkpoint import describe_checkpoints
    from pretrain.checkpoint import return_to as return_run_to

    if return_to:
        for path in return_run_to(run, return_to):
            print(f"set aside: {path}")
    damaged = describe_checkpoints(run, verify)
    if damaged:
        raise UserError(f"{run}: {damaged} damaged; training resumes from the newest whole checkpoint")


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the report; an earlier report is replaced.")] = Path(
        "report"
    ),
) -> None:
    """Draw the curves of one or several runs (curves.png), and summarise them in Markdown (report.md).

    Example: `biogpt report run/ other-run/ --out report/`
    """
    from pretrain.report import report as write_report

    print(f"{write_report(runs, out)}\n\n{out}: curves.png, report.md")


def compare(
    a: Annotated[Path, typer.Argument(help="Run folder.")], b: Annotated[Path, typer.Argument(help="Another.")]
) -> None:
    """Say at which step two runs first differ, and which settings, data, versions and devices could explain it.

    The exit code is 0 whether they differ or not.

    Example: `biogpt compare run/ other-run/`
    """
    from pretrain.compare import compare as compare_runs

    print(compare_runs(a, b))


def evaluate(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", help="Runs, exported folders or, with --corpus, other HF folders."),
    ],
    shards: Annotated[Path | None, typer.Option(help="Shards to evaluate on; default: the run's own.")] = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(help="Corpus to evaluate on, with each model's own tokenizer. May be given several times."),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    step: Step = "",
    average: Average = 1,
) -> None:
    """Report the held-out loss and the bits per byte of models.

    With shards, as in training: text in blocks, one document after another. With --corpus, one document at a time, for
    any causal language model that transformers loads; several models give one table.

    Example: `biogpt evaluate hf/ gpt2/ --corpus corpus/ --split test`
    """
    if shards and corpus:
        raise UserError("evaluate: name either --shards or --corpus")
    from data.common.parquet import SPLITS

    if split not in SPLITS:
        raise UserError(f"--split {split}: choose from {', '.join(SPLITS)}")
    if corpus:
        evaluate_on_corpora(models, corpus, split, step, average)
        return
    from pretrain.inference import evaluate_folder

    for model in models:
        result = evaluate_folder(model, shards, split, step, average)
        sources = [name.removesuffix("loss") for name in result if name.endswith("loss")]
        for source in sources:  # "" is the whole
            figures = {name.removeprefix(source): value for name, value in result.items() if name.startswith(source)}
            text = f"{model}: {split} {source.replace('/', ' ')}loss {figures['loss']:.4f} nats a token"
            if "perplexity" in figures:
                text += f", perplexity {figures['perplexity']:.2f}"
            if "bits_per_byte" in figures:
                text += f", {figures['bits_per_byte']:.4f} bits per byte"
            for name in sorted(figures.keys() & {"accuracy", "micro_f1", "macro_f1"}):
                text += f", {name.replace('_', ' ')} {figures[name]:.2f} %"
            print(f"{text}, {figures['tokens']:,} tokens")


def evaluate_on_corpora(models: list[Path], corpora: list[Path], split: str, step: str, average: int) -> None:
    """Print a table of bits per byte: a row for each model and source."""
    from pretrain.bits_per_byte import evaluate_corpora

    rows = [["model", "source", "documents", "tokens", "nats a token", "bits per byte", "unknown characters"]]
    for model, sources in evaluate_corpora(models, corpora, split, step, average).items():
        for source, score in sources.items():
            counts = [f"{score.documents:,}", f"{score.tokens:,}", f"{score.loss:.4f}", f"{score.bits_per_byte:.4f}"]
            rows.append([model, source, *counts, f"{score.unknown_characters:,}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        names = (cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True))
        figures = (cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))
        print("  ".join((*names, *figures)))
    print(f"{split} split, one document at a time; with --shards, text in blocks as in training gives other figures")


def benchmark(
    task: Annotated[str, typer.Argument(help="pubmedqa, hoc, bc5cdr-relations or bc5cdr-entities.")],
    model: Annotated[Path, typer.Argument(help="An HF folder, or a file that --out wrote.")],
    data: Annotated[Path, typer.Option(help="Folder of the benchmark's files, as they are published.")],
    score: Annotated[
        str, typer.Option(metavar="sum|mean", help="Score a label by the sum or the mean of its log-likelihoods.")
    ] = "sum",
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="A second one, to report the paired difference.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON lines to write: the model's answer to each item.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the figures into the folder's model card too.")] = False,
) -> None:
    """Score a model on the test split of a benchmark, with 95 % bootstrap intervals.

    Example: `biogpt benchmark pubmedqa hf/ --data pubmedqa/ --out answers.jsonl`
    """
    from pretrain.benchmark import benchmark as run_benchmark

    print(run_benchmark(task, model, data, score, against, out, card))


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Out,
    shards: Annotated[
        Path | None, typer.Option(help="Where the run's shards or records are now, if they have moved.")
    ] = None,
    step: Step = "",
    average: Average = 1,
    dtype: Annotated[str, typer.Option(help="Number format of the weights: fp32 or bf16.")] = "fp32",
    license: Annotated[
        str, typer.Option(metavar="ID", help="Licence of the weights for the model card, as the Hub names it: mit.")
    ] = "unknown",
) -> None:
    """Write a run's newest checkpoint as a folder for transformers, once transformers gives the same loss and logits.

    Example: `biogpt export run/ --out hf/`
    """
    from data.common.files import check_places
    from pretrain.export.folder import DTYPES
    from pretrain.export.folder import export as export_run

    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise UserError(f"--license {license!r}: expected an identifier such as apache-2.0, cc-by-4.0, mit or other")
    check_places(out, [run, *([shards] if shards else [])])
    counts = export_run(run, out, shards, step, average, dtype, license)["counts"]
    steps = ", ".join(map(str, counts.get("averaged_steps", ()))) or counts["step"]
    whose = "recorded" if "recorded_loss" in counts else "by our model"
    expected = counts.get("recorded_loss", counts.get("computed_loss"))
    print(
        f"{out}: {'mean of steps' if average > 1 else 'step'} {steps}, {counts['parameters']:,} parameters; held-out"
        f" loss {counts['held_out']['loss']:.6f} by transformers, {expected:.6f} {whose};"
        f" logits equal to {counts['largest_logit_difference']:.1e}"
    )


def generate(
    model: Annotated[Path, typer.Argument(help="A run, or an exported HF folder.")],
    prompt: Annotated[str, typer.Argument(help='Text to continue; "-" reads standard input, a prompt a line.')] = "",
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Continue every line of this file.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JSON lines with prompt and text.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Generate at most this many tokens.")] = 60,
    min_new_tokens: Annotated[int, typer.Option(min=0, help="Generate at least this many tokens.")] = 0,
    beams: Annotated[int, typer.Option(min=1, help="Search with this many beams; 1 takes the likeliest token.")] = 1,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens at random.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --sample: below 1 prefers likely tokens.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="With --sample: draw from so many likeliest tokens; 0: all.")] = 50,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="With --sample: draw from the likeliest that sum to this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed for --sample.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are continued together.")] = 8,
    step: Step = "",
) -> None:
    """Continue a prompt, or every line of a file, with transformers' own generation. One text is shown as it grows.

    Example: `biogpt generate hf/ "The role of"`

    Beam search as in BioGPT's example: `biogpt generate hf/ "COVID-19 is" --beams 5 --min-new-tokens 95
    --max-new-tokens 1019`

    Many prompts: `biogpt generate run/ --prompts prompts.txt --sample --top-p 0.9 --out texts.jsonl`
    """
    from data.common.files import check_places, make_output_folder, whole_file
    from pretrain.generate import STANDARD_INPUT, Decoding, Prompt, read_prompts
    from pretrain.generate import generate as continue_prompts

    decoding = Decoding(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        beams=beams,
        sample=sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if bool(prompt) == bool(prompts):
        raise UserError("generate: name either a prompt or --prompts FILE")
    if out:
        check_places(out, [model, *([prompts] if prompts else [])])
        if out.is_dir():
            raise UserError(f"--out {out}: is a folder; name a file")
        make_output_folder(out.parent)
    if prompts or prompt == STANDARD_INPUT:
        given = read_prompts(str(prompts or STANDARD_INPUT))
    else:
        given = [Prompt(prompt, "the prompt")]
    if not out:
        continue_prompts(model, given, decoding, batch_size, step, lambda text: print(text, end="", flush=True))
        return
    with whole_file(out) as stream:
        for each, text in zip(given, continue_prompts(model, given, decoding, batch_size, step), strict=True):
            stream.write(json.dumps({"prompt": each.text, "text": text}, ensure_ascii=False).encode() + b"\n")
    print(f"{out}: {len(given)} prompts continued")
