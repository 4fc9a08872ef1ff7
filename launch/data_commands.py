"""The commands that turn PubMed into shards. `--help` is fast because each imports what it needs when it runs."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data.common.files import UserError, read_manifest, verify_files
from launch.options import Address, Element, Out, Processes, workers_of

if TYPE_CHECKING:
    from data.corpus.benchmarks import BenchmarkItem

MERGES = 40_000  # BioGPT's


def download(
    out: Annotated[Path, typer.Option("--out", help="Folder for NLM's files. Files already there are kept.")],
    updates: Annotated[bool, typer.Option("--updates", help="Also download the daily update files.")] = False,
    baseline: Annotated[
        int | None, typer.Option(metavar="YEAR", help="Stop if the server holds the files of another year.")
    ] = None,
    files: Annotated[str, typer.Option(metavar="FIRST-LAST", help="Numbers of the wanted files; default: all.")] = "",
    connections: Annotated[int, typer.Option(min=1, max=16, help="Number of files to download at once.")] = 4,
    base_url: Annotated[str, typer.Option(help="NLM's PubMed folder, or a mirror of it.")] = "",
) -> None:
    """Download PubMed from NLM. Every file is checked against NLM's md5; a broken download is resumed.

    Example: `biogpt download --out raw/ --files 1-20`
    """
    from data.archive.download import BASE_URL
    from data.archive.download import download as download_archive

    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", files)
    if files and not numbers:
        raise UserError(f"--files {files}: give one number or a range, as in 1-20")
    wanted = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else None
    url = f"{(base_url or BASE_URL).rstrip('/')}/"
    counts = download_archive(out, updates, baseline, wanted, connections, url)["counts"]
    others = f"; {counts['others']:,} other files in the folder were not checked" if counts["others"] else ""
    print(f"{out}: {counts['files']:,} files, {counts['bytes'] / 1e9:.1f} GB, all match NLM's md5{others}")


def sample(out: Out) -> None:
    """Write the embedded sample: about 2,000 invented citations in NLM's XML.

    Example: `biogpt sample --out raw/`
    """
    from data.archive.sample import write_sample

    paths = write_sample(out)
    print(f"{out}: {', '.join(path.name for path in paths)}")


def corpus(
    raw: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT... [corpus.key=value]...",
            help="NLM's files, folders of them, other text files, `hf://datasets/OWNER/NAME`; then settings.",
        ),
    ],
    out: Out,
    settings: Annotated[Path | None, typer.Option(help="TOML file with a [corpus] section.")] = None,
    validation_fraction: Annotated[float, typer.Option(help="Share of the citations held out for validation.")] = 0.002,
    test_fraction: Annotated[float, typer.Option(help="Share of the citations held out for the final test.")] = 0.002,
    benchmarks: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Leave out the records that hold items of the benchmarks in DIR.")
    ] = None,
    keep_benchmarks: Annotated[
        bool, typer.Option("--keep-benchmarks", help="Only report the items of --benchmarks, and leave nothing out.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Print how many records each step removed.")] = False,
    workers: Processes = 1,
    cluster: Address = "",
    part: Element = "",
) -> None:
    """Turn PubMed XML into a clean, deduplicated corpus in Parquet, split into train, validation and test.

    Example: `biogpt corpus raw/ corpus.minimum_words=20 --out corpus/ --workers 8 --report`
    """
    from data.corpus.benchmarks import Benchmarks
    from data.corpus.build import make_corpus
    from data.corpus.other_text import HUB, fetch_hub_files
    from data.corpus.selection import funnel
    from data.corpus.settings import load_corpus_settings

    inputs = [given for given in raw if not given.startswith("corpus.") or Path(given).exists()]
    loaded = load_corpus_settings(settings, [given for given in raw if given not in inputs])
    if keep_benchmarks and not benchmarks:
        raise UserError("--keep-benchmarks: name the folder of the benchmarks with --benchmarks")
    if not inputs:
        raise UserError("corpus: name the files or folders to read")
    paths = [path for given in inputs for path in (fetch_hub_files(given) if given.startswith(HUB) else [Path(given)])]
    workers_chosen = workers_of(workers, cluster, part)
    kept_out = Benchmarks(benchmark_items(benchmarks), keep_benchmarks) if benchmarks else None
    counts = make_corpus(paths, out, validation_fraction, test_fraction, workers_chosen, loaded, kept_out)["counts"]
    for name, of_split in counts.get("benchmarks", {}).items():
        for split, items in of_split.items():
            print(
                f"{name} {split}: of {items['items']:,} items {items['in_input']:,} are in the input,"
                f" {items['in_training']:,} in the training split; {items['not_searched']:,} are too short to be found"
            )
    if report:
        width = max(len(name) for name, _ in funnel(counts))
        for name, count in funnel(counts):
            print(f"{name:{width}} {count:>14,}")
    if not counts["validation"]:
        print("biogpt: warning: the validation split is empty; raise --validation-fraction", file=sys.stderr)
    print(
        f"{out}: of {counts['records']:,} records kept {counts['train']:,} train, {counts['validation']:,} validation,"
        f" {counts['test']:,} test; {counts['words']:,} words"
    )


def benchmark_items(folder: Path) -> list["BenchmarkItem"]:
    """The items of all benchmarks in a folder, as the corpus looks for them. Raises UserError as `find_benchmarks`."""
    from data.corpus.benchmarks import BenchmarkItem
    from pretrain.tasks.find import find_benchmarks

    return [
        BenchmarkItem(name, split, item.id, int(item.pmid) if item.pmid.isdecimal() else None, item.text)
        for (name, split), items in find_benchmarks(folder).items()
        for item in items
    ]


def records(
    corpus: Annotated[Path, typer.Argument(help="Folder written by `biogpt corpus`.")],
    task: Annotated[str, typer.Argument(help="What is to be written of a citation: title, conclusion or infilling.")],
    out: Out,
    instruction: Annotated[
        str, typer.Option(help="What every source begins with, so that one model can learn several tasks.")
    ] = "",
) -> None:
    """Make records to learn from of a corpus: the title from the abstract, the conclusion from the rest, masked words.

    Example: `biogpt records corpus/ title --out title-records/`
    """
    from data.shards.corpus_records import make_records

    counts = make_records(corpus, task, out, instruction.strip())["counts"]
    left_out = "".join(f", {count:,} {reason}" for reason, count in counts.pop("left_out").items())
    written = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    print(f"{out}: {written} records{f'; left out:{left_out[1:]}' if left_out else ''}")


def tokenizer(
    out: Out,
    corpus: Annotated[Path | None, typer.Argument(help="Folder written by `biogpt corpus`.")] = None,
    from_biogpt: Annotated[
        Path | None, typer.Option(help="Convert BioGPT's bpecodes and dict.txt in this folder instead of learning.")
    ] = None,
    merges: Annotated[int, typer.Option(min=0, help="Number of BPE merges to learn.")] = MERGES,
    min_count: Annotated[int, typer.Option(min=1, help="Tokens seen fewer times than this become `<unk>`.")] = 1,
    min_word_count: Annotated[
        int, typer.Option(min=1, help="Learn merges only from words seen at least this often.")
    ] = 1,
    normalize_punctuation: Annotated[
        bool,
        typer.Option("--normalize-punctuation", help="Normalize curly quotes, dashes and so on, as Moses does."),
    ] = False,
    reserve: Annotated[
        int, typer.Option(min=0, max=2**20, help="Append this many ids that no text becomes: `<reserved_0>` and so on.")
    ] = 0,
    workers: Processes = 1,
    cluster: Address = "",
) -> None:
    """Learn BPE merges and a vocabulary from the training split. transformers' AutoTokenizer loads the folder.

    Example: `biogpt tokenizer corpus/ --out tokenizer/ --merges 40000`
    """
    from data.text.train import tokenizer_from_biogpt, train_tokenizer

    if from_biogpt and not corpus:
        if (merges, min_count, min_word_count) != (MERGES, 1, 1):
            raise UserError("--from-biogpt learns nothing; use --merges, --min-count, --min-word-count with a corpus")
        counts = tokenizer_from_biogpt(from_biogpt, out, normalize_punctuation, reserve)["counts"]
        source = str(from_biogpt)
    elif corpus and not from_biogpt:
        counts = train_tokenizer(
            corpus, out, merges, min_count, workers_of(workers, cluster), min_word_count, normalize_punctuation, reserve
        )["counts"]
        source = f"{counts['words']:,} words"
    else:
        raise UserError("tokenizer: name either a corpus or --from-biogpt")
    reserved = f", of which {reserve:,} are reserved" if reserve else ""
    print(f"{out}: {counts['merges']:,} merges, vocabulary {counts['vocabulary']:,}{reserved}, from {source}")


def shards(
    corpus: Annotated[Path | None, typer.Argument(help="Folder written by `biogpt corpus`.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder written by `biogpt tokenizer`.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. It appears only when it is complete.")] = None,
    verify: Annotated[Path | None, typer.Option(help="Check every file of existing shards against its sha256.")] = None,
    workers: Processes = 1,
    cluster: Address = "",
    part: Element = "",
) -> None:
    """Tokenize a corpus into Megatron's .bin and .idx files, or verify existing shards.

    Example: `biogpt shards corpus/ --tokenizer tokenizer/ --out shards/`

    To verify: `biogpt shards --verify shards/`
    """
    from data.shards.build import make_shards
    from data.text.ids import token_dtype

    if verify:
        if corpus or tokenizer or out:
            raise UserError("--verify DIR takes no other argument: it only reads shards")
        manifest = read_manifest(verify, "shards")
        verify_files(verify, manifest)
        if (verify / "corpus").is_dir():  # shards of earlier versions hold no manifest of their corpus
            read_manifest(verify / "corpus", "corpus")
        print(f"{verify}: {len(manifest['files'])} files, each with the sha256 of its manifest")
        return
    if not (corpus and tokenizer and out):
        raise UserError("shards: name the CORPUS, --tokenizer and --out; or --verify DIR")
    counts = make_shards(corpus, tokenizer, out, workers_of(workers, cluster, part))["counts"]
    train = counts["train"]
    if (dtype := token_dtype(counts["vocabulary"])).itemsize > 2:
        print(f"a vocabulary of {counts['vocabulary']:,} does not fit 2 bytes; each token takes 4 ({dtype})")
    print(f"{out}: {train['documents']:,} training documents, {train['tokens']:,} tokens, {train['shards']} shards")
