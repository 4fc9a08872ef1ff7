"""The front door: `biogpt`. Each command imports what it needs when it runs, so that `--help` answers at once."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from data.files import ShareDone, TasksFailed, UserError, verify_files

MERGES = 40_000  # BioGPT's
app = typer.Typer(
    help="From PubMed XML to a biomedical language model that transformers loads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
Processes = Annotated[int, typer.Option("--workers", min=1, help="Local processes.")]
Address = Annotated[str, typer.Option("--cluster", metavar="ADDRESS", help="A Ray cluster, or auto, instead.")]
Element = Annotated[str, typer.Option("--part", metavar="K/N", help="Do the share of element K of a job array of N.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write; it appears whole or not at all.")]


@app.command()
def download(
    out: Annotated[Path, typer.Option("--out", help="Folder for NLM's files; what is there is kept.")],
    updates: Annotated[bool, typer.Option("--updates", help="The daily update files too.")] = False,
    baseline: Annotated[int | None, typer.Option(help="Year that the files must be of.")] = None,
    files: Annotated[str, typer.Option(metavar="FIRST-LAST", help="Numbers of the files wanted; default: all.")] = "",
    connections: Annotated[int, typer.Option(min=1, max=16, help="Files at once.")] = 4,
    base_url: Annotated[str, typer.Option(help="NLM's PubMed folder, or a mirror of it.")] = "",
) -> None:
    """Download PubMed from NLM, compare every file with its md5, go on where a download broke off.

    Example: `biogpt download --out raw/ --files 1-20`
    """
    from data.nlm import BASE_URL
    from data.nlm import download as download_archive

    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", files)
    if files and not numbers:
        raise UserError(f"--files {files}: give a number or two, as in 1-20")
    wanted = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else None
    url = f"{(base_url or BASE_URL).rstrip('/')}/"
    counts = download_archive(out, updates, baseline, wanted, connections, url)["counts"]
    others = f"; {counts['others']:,} others beside them were not compared this time" if counts["others"] else ""
    print(f"{out}: {counts['files']:,} files, {counts['bytes'] / 1e9:.1f} GB, all with NLM's md5{others}")


@app.command()
def sample(out: Out) -> None:
    """Write the embedded sample: about 2,000 invented citations in NLM's XML.

    Example: `biogpt sample --out raw/`
    """
    from data.sample import write_sample

    paths = write_sample(out)
    print(f"{out}: {', '.join(path.name for path in paths)}")


@app.command()
def corpus(
    raw: Annotated[
        list[str],
        typer.Argument(
            metavar="RAW... [corpus.key=value]...",
            help="NLM's files, folders of them, other texts, hf://datasets/OWNER/NAME.",
        ),
    ],
    out: Out,
    settings: Annotated[Path | None, typer.Option(help="TOML file with a section [corpus].")] = None,
    validation_fraction: Annotated[float, typer.Option(help="Share of the citations held out for evaluation.")] = 0.002,
    test_fraction: Annotated[float, typer.Option(help="Share held out for the end.")] = 0.002,
    report: Annotated[bool, typer.Option("--report", help="Print what became of the records, as a table.")] = False,
    workers: Processes = 1,
    cluster: Address = "",
    part: Element = "",
) -> None:
    """PubMed XML to Parquet: newest version of each PMID, deletions, filters, cleaning, split by a hash of the PMID.

    Example: `biogpt corpus raw/ corpus.minimum_words=20 --out corpus/ --workers 8 --report`
    """
    from data.choice import funnel
    from data.cleaning import load_corpus_settings
    from data.corpus import make_corpus
    from data.texts import HUB, fetch_hub_files

    inputs = [given for given in raw if not given.startswith("corpus.") or Path(given).exists()]
    loaded = load_corpus_settings(settings, [given for given in raw if given not in inputs])
    if not inputs:
        raise UserError("corpus: name the files or folders to read")
    paths = [path for given in inputs for path in (fetch_hub_files(given) if given.startswith(HUB) else [Path(given)])]
    counts = make_corpus(paths, out, validation_fraction, test_fraction, where(workers, cluster, part), loaded)[
        "counts"
    ]
    if report:
        width = max(len(name) for name, _ in funnel(counts))
        for name, count in funnel(counts):
            print(f"{name:{width}} {count:>14,}")
    if not counts["validation"]:
        print("biogpt: warning: no citation fell to validation; raise --validation-fraction", file=sys.stderr)
    print(
        f"{out}: of {counts['records']:,} records kept {counts['train']:,} train, {counts['validation']:,} validation,"
        f" {counts['test']:,} test; {counts['words']:,} words"
    )


@app.command()
def tokenizer(
    out: Out,
    corpus: Annotated[Path | None, typer.Argument(help="Folder written by `biogpt corpus`.")] = None,
    from_biogpt: Annotated[Path | None, typer.Option(help="Folder of BioGPT's bpecodes and dict.txt, instead.")] = None,
    merges: Annotated[int, typer.Option(min=0, help="BPE merges to learn.")] = MERGES,
    min_count: Annotated[int, typer.Option(min=1, help="Rarer types become <unk>.")] = 1,
    min_word_count: Annotated[int, typer.Option(min=1, help="Rarer words have no say in the merges.")] = 1,
    normalize_punctuation: Annotated[
        bool, typer.Option("--normalize-punctuation", help="Curly quotes, dashes ... as Moses normalises them.")
    ] = False,
    workers: Processes = 1,
    cluster: Address = "",
) -> None:
    """Learn BPE merges and the vocabulary on the training split. The folder loads by transformers' AutoTokenizer.

    Example: `biogpt tokenizer corpus/ --out tokenizer/ --merges 40000`
    """
    from data.tokenizer import tokenizer_from_biogpt, train_tokenizer

    if from_biogpt and not corpus:
        if (merges, min_count, min_word_count) != (MERGES, 1, 1):
            raise UserError("--from-biogpt learns nothing: --merges, --min-count and --min-word-count go with a corpus")
        counts = tokenizer_from_biogpt(from_biogpt, out, normalize_punctuation)["counts"]
        source = str(from_biogpt)
    elif corpus and not from_biogpt:
        counts = train_tokenizer(
            corpus, out, merges, min_count, where(workers, cluster), min_word_count, normalize_punctuation
        )["counts"]
        source = f"{counts['words']:,} words"
    else:
        raise UserError("tokenizer: name either a corpus or --from-biogpt")
    print(f"{out}: {counts['merges']:,} merges, vocabulary {counts['vocabulary']:,}, from {source}")


@app.command()
def shards(
    corpus: Annotated[Path | None, typer.Argument(help="Folder written by `biogpt corpus`.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder written by `biogpt tokenizer`.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; it appears whole or not at all.")] = None,
    verify: Annotated[Path | None, typer.Option(help="Compare every file of these shards with its sha256.")] = None,
    workers: Processes = 1,
    cluster: Address = "",
    part: Element = "",
) -> None:
    """Tokenize a corpus into Megatron's .bin and .idx files; or verify shards that are there.

    Example: `biogpt shards corpus/ --tokenizer tokenizer/ --out shards/`, `biogpt shards --verify shards/`
    """
    from data.files import read_manifest
    from data.indexed import token_dtype
    from data.shards import make_shards

    if verify:
        if corpus or tokenizer or out:
            raise UserError("--verify DIR goes alone: it reads shards and writes nothing")
        manifest = read_manifest(verify, "shards")
        verify_files(verify, manifest)
        print(f"{verify}: {len(manifest['files'])} files, each with the sha256 of its manifest")
        return
    if not (corpus and tokenizer and out):
        raise UserError("shards: name the CORPUS, --tokenizer and --out; or --verify DIR")
    counts = make_shards(corpus, tokenizer, out, where(workers, cluster, part))["counts"]
    train = counts["train"]
    if (dtype := token_dtype(counts["vocabulary"])).itemsize > 2:
        print(f"vocabulary of {counts['vocabulary']:,}: too large for 2 bytes, a token takes 4 ({dtype})")
    print(f"{out}: {train['documents']:,} training documents, {train['tokens']:,} tokens, {train['shards']} shards")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or a bundled recipe: tiny, biogpt, biogpt-large.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    ranks: Annotated[int, typer.Option(min=0, help="Processes; 0: one for each GPU, or one on a CPU.")] = 0,
) -> None:
    """Train on this machine, or go on where the run was: torchrun --nproc-per-node RANKS -m pretrain.train RECIPE ...

    Example: `biogpt train tiny data.shards=shards train.run=run train.steps=500 --ranks 2`
    """
    from pretrain.checkpoint import check_state, newest_checkpoint, read_state, step_of
    from pretrain.recipe import check_inputs, data_identity, load_recipe

    ranks = ranks or default_ranks()
    loaded = load_recipe(recipe, settings or [])
    manifest = check_inputs(loaded, ranks)
    config = loaded.decoder_config(manifest["counts"]["vocabulary"])
    # The ranks verify again; here a mistake is still one line, not torchrun's report of a failure.
    verify_files(Path(loaded.data.shards), manifest)
    checkpoint, _ = newest_checkpoint(Path(loaded.train.run))
    check_state(checkpoint, read_state(checkpoint) if checkpoint else {}, loaded, config, data_identity(loaded))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    command = [*launcher, "-m", "pretrain.train", recipe, *(settings or [])]
    status = run_interruptible(command, environment, Path(loaded.train.run) / "stop")
    if status:
        raise SystemExit(status)
    checkpoint, _ = newest_checkpoint(Path(loaded.train.run), verify=False)
    step = step_of(checkpoint) if checkpoint else 0
    run = loaded.train.run
    following = f"biogpt export {run} --out hf/" if step >= loaded.train.steps else "the same command goes on"
    print(f"{run}: step {step} of {loaded.train.steps}; next: {following}")


def run_interruptible(command: list[str], environment: dict[str, str], stop_file: Path) -> int:
    """Run a launcher in a process group of its own. The first Ctrl-C or SIGTERM writes the stop file, so that the run
    saves and ends; the second kills the group. Returns the exit code."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def stop(number: int, _: object) -> None:
        if stop_file.exists() or not stop_file.parent.exists():
            os.killpg(process.pid, signal.SIGKILL)
            raise SystemExit(128 + number)
        stop_file.touch()
        print("biogpt: stopping after this step; again to stop at once", file=sys.stderr, flush=True)

    before = [(number, signal.signal(number, stop)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        return process.wait()
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@app.command()
def checkpoints(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its sha256.")] = False,
) -> None:
    """List the checkpoints of a run: step, held-out loss, size, whether it is whole.

    Example: `biogpt checkpoints run/ --verify`
    """
    from pretrain.checkpoint import describe_checkpoints

    damaged = describe_checkpoints(run, verify)
    if damaged:
        raise UserError(f"{run}: {damaged} damaged; a run goes on from the newest whole one")


def default_ranks() -> int:
    """One rank for each GPU, or one on a CPU."""
    import torch

    return max(1, torch.cuda.device_count())


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run, or an exported HF folder.")],
    shards: Annotated[Path | None, typer.Option(help="Shards to evaluate on.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Corpus to evaluate on, with the model's own tokenizer.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
) -> None:
    """Held-out loss, perplexity and bits per byte of a run's newest checkpoint or of an exported folder.

    Example: `biogpt evaluate hf/ --shards shards/ --split test`
    """
    if (shards is None) == (corpus is None):
        raise UserError("evaluate: name either --shards or --corpus")
    from data.corpus import SPLITS
    from pretrain.export import evaluate_folder

    if split not in SPLITS:
        raise UserError(f"--split {split}: choose from {', '.join(SPLITS)}")
    result = evaluate_folder(model, shards, corpus, split)
    print(
        f"{model}: {split} loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f},"
        f" {result['bits_per_byte']:.4f} bits per byte, {result['tokens']:,} tokens"
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Out,
    shards: Annotated[Path | None, typer.Option(help="The run's shards, if they have moved.")] = None,
) -> None:
    """Write a run's newest checkpoint as a folder that transformers loads, and prove it equal before it appears.

    Example: `biogpt export run/ --out hf/`
    """
    from pretrain.export import export as export_run

    counts = export_run(run, out, shards)["counts"]
    print(
        f"{out}: step {counts['step']}, {counts['parameters']:,} parameters; held-out loss"
        f" {counts['held_out']['loss']:.6f} by transformers, {counts['recorded_loss']:.6f} recorded;"
        f" logits equal to {counts['largest_logit_difference']:.1e}"
    )


@app.command()
def generate(
    hf: Annotated[Path, typer.Argument(help="Exported folder.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 60,
    sample: Annotated[bool, typer.Option(help="Draw tokens instead of taking the likeliest.")] = False,
    seed: Annotated[int, typer.Option(help="For --sample.")] = 1,
) -> None:
    """Continue a prompt, by transformers' own generation.

    Example: `biogpt generate hf/ "The role of"`
    """
    from pretrain.export import generate as continue_prompt

    print(continue_prompt(hf, prompt, max_new_tokens, sample, seed))


@app.command()
def quickstart(out: Out = Path("quickstart")) -> None:
    """The whole path on the embedded sample: citations, corpus, tokenizer, shards, training, export, a sentence.

    Example: `biogpt quickstart --out quickstart/`
    """
    from launch.quickstart import run_quickstart

    run_quickstart(out)


def where(processes: int, cluster: str, part: str = "") -> Any:
    """Where the tasks of a data command run; UserError where the options contradict each other."""
    from data.workers import Cluster, JobArray

    if (processes > 1) + bool(cluster) + bool(part) > 1:
        raise UserError("choose one of --workers, --cluster and --part")
    if not part:
        return Cluster(cluster) if cluster else processes
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--part {part}: expected K/N with K from 1 to N, as in 2/16")
    return JobArray(int(found[1]), int(found[2]))


def main() -> NoReturn:
    """The console command: a user's mistake is one line and exit code 2; files that failed, one each and 1."""
    try:
        app()
    except ShareDone as done:
        print(f"{done}; when all are, the same command without --part finishes")
        raise SystemExit(0) from None
    except TasksFailed as error:
        for failure in error.failures:
            print(f"biogpt: error: {failure}", file=sys.stderr)
        rest = f"{len(error.failures)} of {error.tasks} files failed, the others are done"
        print(f"biogpt: {rest}: when that is mended, run the same command again", file=sys.stderr)
        raise SystemExit(1) from None
    except UserError as error:
        print(f"biogpt: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)


if __name__ == "__main__":
    main()
