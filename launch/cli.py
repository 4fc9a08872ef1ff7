"""The `biogpt` command. `--help` is fast because each command imports what it needs only when it runs."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from data.common.disk import disk_full, is_full
from data.common.files import ShareDone, TasksFailed, UserError
from launch.data_commands import corpus, download, records, sample, shards, tokenizer
from launch.model_commands import (
    benchmark,
    checkpoints,
    compare,
    evaluate,
    export,
    finetune,
    generate,
    images,
    plan,
    report,
    train,
)
from launch.options import Out

app = typer.Typer(
    help="From PubMed XML to a biomedical language model that transformers loads.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
DATA = (download, sample, corpus, tokenizer, shards, records)
MODELS = (images, plan, train, finetune, checkpoints, report, compare, evaluate, benchmark, export, generate)
for command in (*DATA, *MODELS):
    app.command()(command)


@app.command()
def quickstart(out: Out = Path("quickstart")) -> None:
    """Run the whole path on the embedded sample: corpus, tokenizer, shards, training, export, a generated sentence.

    Example: `biogpt quickstart --out quickstart/`
    """
    from launch.quickstart import run_quickstart

    run_quickstart(out)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"biogpt-pretrain {importlib.metadata.version('biogpt-pretrain')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """From PubMed XML to a biomedical language model that transformers loads."""


def main() -> NoReturn:
    """The console command. A user's mistake ends in one line and exit code 2, failed files in a line each and 1."""
    try:
        app()
    except ShareDone as done:
        print(f"{done}; when all parts are done, run the same command without --part to finish")
        raise SystemExit(0) from None
    except TasksFailed as error:
        for failure in error.failures:
            print(f"biogpt: error: {failure}", file=sys.stderr)
        counts = f"{len(error.failures)} of {error.tasks} files failed, the others are done"
        print(f"biogpt: {counts}: fix them, then run the same command again", file=sys.stderr)
        raise SystemExit(1) from None
    except UserError as error:
        print(f"biogpt: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if not is_full(error):
            raise
        place = Path(error.filename or ".")
        print(f"biogpt: error: {disk_full(place, str(place))}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)


if __name__ == "__main__":
    main()
