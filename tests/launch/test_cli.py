"""The front door as a user meets it: help, one line for each mistake, nothing half-written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from data.archive.sample import write_sample
from data.common.files import UserError
from data.corpus.build import make_corpus
from data.text.ids import SPECIAL_TOKENS
from data.text.tokenizer import Tokenizer
from data.text.train import write_tokenizer_files
from launch.cli import app, main
from tests.shared import SHARED, needs_shared

COMMANDS = (
    "download",
    "sample",
    "corpus",
    "tokenizer",
    "shards",
    "records",
    "plan",
    "images",
    "train",
    "checkpoints",
    "report",
    "compare",
    "evaluate",
    "benchmark",
    "export",
    "generate",
    "quickstart",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and f"Example: biogpt {command}" in " ".join(result.output.split()).replace("`", "")


def test_help_and_data_commands_import_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys; sys.argv = ['biogpt', '--help']\n"
        "import launch.cli, data.corpus.build, data.text.train, data.shards.build, data.archive.sample\n"
        "import data.corpus.benchmarks, data.shards.corpus_records, pretrain.tasks.find\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def mistake(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line on stderr of a command that a user got wrong; its exit code is 2."""
    monkeypatch.setattr(sys, "argv", ["biogpt", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("corpus: checksums")]
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("biogpt: error: "), lines
    return lines[0]


@needs_shared
def test_malformed_files_are_named_and_the_rest_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1; without them the same command ends well and parses nothing again."""
    files = sorted((SHARED / "data" / "nlm" / "malformed").iterdir())
    assert len(files) == 5
    good, out = str(SHARED / "data" / "nlm" / "medsamp2012.xml.gz"), tmp_path / "corpus"
    monkeypatch.setattr(sys, "argv", ["biogpt", "corpus", good, *map(str, files), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("biogpt: error: ")]
    assert ended.value.code == 1 and not out.exists()
    assert [line.split(": ")[2] for line in errors] == [str(path) for path in files]
    (receipt,) = tmp_path.glob("corpus.parts/*/manifest.json")
    before = receipt.stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["biogpt", "corpus", good, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and out.is_dir() and receipt.stat().st_mtime_ns == before


def test_missing_inputs_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent, out = str(tmp_path / "absent"), str(tmp_path / "out")
    for arguments in (
        ["corpus", absent, "--out", out],
        ["tokenizer", absent, "--out", out],
        ["shards", absent, "--tokenizer", absent, "--out", out],
        ["train", "tiny", f"data.shards={absent}"],
        ["train", absent],
        ["export", absent, "--out", out],
        ["evaluate", absent, "--shards", absent],
        ["generate", absent, "The"],
    ):
        assert absent in mistake(arguments, capsys, monkeypatch)
        assert list(tmp_path.iterdir()) == []


def test_a_plan_fits_a_terminal_and_needs_neither_shards_nor_torch() -> None:
    code = (
        "import sys; sys.argv = ['biogpt', 'plan', 'biogpt', '--gpus', '64', '--gpu', 'h100', 'data.shards=absent']\n"
        "from launch.cli import app\n"
        "try: app()\n"
        "finally: assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and "\x1b" not in done.stdout
    assert lines[0].startswith("biogpt: 346,763,264 parameters")
    assert sum(line.split()[1:2] in (["none"], ["selective"], ["full"]) for line in lines) == 9
    assert "tokens                   104,857,600,000" in done.stdout and "Not checked on any GPU" in done.stdout


def test_mistakes_of_a_plan_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, culprit in (
        (["--gpu", "abacus"], "--gpu abacus: choose from a100"),
        (["--gpus", "3"], "do not divide over 3 ranks"),
        (["train.stepz=3"], "did you mean train.steps?"),
        (["deepspeed.offload_optimizer=true"], "deepspeed.offload_optimizer"),
        (["--run", str(tmp_path / "absent")], "has no metrics.jsonl"),
    ):
        assert culprit in mistake(["plan", "biogpt", *arguments], capsys, monkeypatch)


def test_mistakes_before_training_are_named(
    sample_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, run = f"data.shards={sample_folder / 'shards'}", f"train.run={tmp_path / 'run'}"
    for settings, culprit in (
        (["train.stepz=3"], "did you mean train.steps?"),
        (["model.vocab_size=7"], "model.vocab_size = 7"),
        (["train.global_batch_tokens=128"], "train.global_batch_tokens = 128"),
        (["train.context_length=100000"], "train.context_length = 100000"),
        (["deepspeed.config=absent.json"], "absent.json"),
        (["--ranks", "3"], "do not divide over 3 ranks"),
    ):
        assert culprit in mistake(["train", "tiny", shards, run, *settings], capsys, monkeypatch)
        assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_shape_is_named_before_ranks_start(
    sample_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.objectives.kinds import make_objective
    from pretrain.recipe import load_recipe
    from pretrain.run_folder import write_run_manifest
    from tests.pretrain.runs import write_checkpoint

    (tmp_path / "run").mkdir()
    settings = [f"data.shards={sample_folder / 'shards'}", f"train.run={tmp_path / 'run'}"]
    recipe = load_recipe("tiny", settings)
    vocabulary = json.loads((sample_folder / "shards" / "manifest.json").read_text())["counts"]["vocabulary"]
    model = vars(recipe.decoder_config(vocabulary)) | {"num_hidden_layers": 9}
    write_run_manifest(tmp_path / "run", {})
    write_checkpoint(tmp_path / "run", 5, {}, {"step": 5, "model": model, "data": make_objective(recipe).identity()})
    line = mistake(["train", "tiny", *settings], capsys, monkeypatch)
    assert "step-0000005: has model num_hidden_layers = 9, this run 4" in line


def test_damaged_stages_are_named(
    sample_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(sample_folder / "corpus", corpus)
    part = corpus / "train-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    tokenizer, out = str(sample_folder / "tokenizer"), str(tmp_path / "out")
    for arguments in (
        ["shards", str(corpus), "--tokenizer", tokenizer, "--out", out],
        ["tokenizer", str(corpus), "--out", out],
    ):
        assert str(part) in mistake(arguments, capsys, monkeypatch)
    assert not Path(out).exists()


def test_wrong_options_are_named(
    sample_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, out = str(sample_folder / "raw"), str(tmp_path / "out")
    for arguments, culprit in (
        (["corpus", raw, "--out", out, "--test-fraction", "1.5"], "--test-fraction 1.5"),
        (["corpus", raw, "--out", str(sample_folder / "shards")], "is a shards folder; expected a corpus folder"),
        (["corpus", raw, "--out", str(sample_folder / "corpus")], "other inputs or settings"),
        (["corpus", raw, "--out", out, "--part", "3/2"], "--part 3/2: expected K/N"),
        (["corpus", raw, "--out", out, "--part", "1/2", "--workers", "2"], "choose one of --workers"),
        (["corpus", raw, "--out", out, "corpus.minimum_word=3"], "did you mean corpus.minimum_words?"),
        (["corpus", "corpus.minimum_words=3", "--out", out], "name the files or folders to read"),
        (["download", "--out", out, "--files", "1-"], "--files 1-: give one number or a range"),
        (["evaluate", raw], "name either --shards or --corpus"),
        (["evaluate", raw, "--shards", raw, "--split", "dev"], "--split dev"),
        (["evaluate", raw, "--shards", raw], raw),
    ):
        assert culprit in mistake(arguments, capsys, monkeypatch)


def test_a_job_array_of_the_command_and_what_finishes_it(
    sample_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three elements and a finish, for corpus and shards: the bytes of one process."""
    raw, tokenizer = str(sample_folder / "raw"), str(sample_folder / "tokenizer")
    fractions = ["--validation-fraction", "0.05", "--test-fraction", "0.05"]
    corpus, shards = str(tmp_path / "corpus"), str(tmp_path / "shards")
    for command in (["corpus", raw, "--out", corpus, *fractions],
                    ["shards", corpus, "--tokenizer", tokenizer, "--out", shards]):  # fmt: skip
        for more in (["--part", "2/3"], ["--part", "3/3"], ["--part", "1/3"], ["--report"][: command[0] == "corpus"]):
            monkeypatch.setattr(sys, "argv", ["biogpt", *command, *more])
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == 0 and Path(command[command.index("--out") + 1]).exists() == (len(more) < 2)
    printed = capsys.readouterr().out
    assert "part 2 of 3 is done" in printed and "\n- superseded" in printed
    for stage in ("corpus", "shards"):
        files = {path.relative_to(sample_folder): path.read_bytes()
                 for path in (sample_folder / stage).rglob("*") if path.is_file()}  # fmt: skip
        assert files and all((tmp_path / path).read_bytes() == content for path, content in files.items())


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["biogpt", "sample", "--out", "x"])
    monkeypatch.setattr("data.archive.sample.write_sample", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main()
    assert not issubclass(ZeroDivisionError, UserError)


def test_shards_are_verified(
    sample_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit in any file, the manifest's too, is found and named."""
    shards = shutil.copytree(sample_folder / "shards", tmp_path / "shards")
    result = CliRunner().invoke(app, ["shards", "--verify", str(shards)])
    number = sum(path.is_file() for path in shards.rglob("*")) - 2  # without the manifests
    assert result.exit_code == 0 and result.output.startswith(f"{shards}: {number} files"), result.output
    for path in [path for path in shards.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
        assert f"{path}: " in mistake(["shards", "--verify", str(shards)], capsys, monkeypatch)
        path.write_bytes(whole)
    assert "takes no other argument" in mistake(["shards", "corpus", "--verify", str(shards)], capsys, monkeypatch)
    assert "name the CORPUS" in mistake(["shards", "corpus", "--out", "out"], capsys, monkeypatch)


def test_tokens_of_four_bytes_are_announced(tmp_path: Path) -> None:
    tokenizer, corpus = tmp_path / "tokenizer", tmp_path / "corpus"
    tokenizer.mkdir()
    names = [*SPECIAL_TOKENS, *(f"madeupword{index:05d}" for index in range(65_532))]
    write_tokenizer_files(tokenizer, {token: index for index, token in enumerate(names)}, [])
    write_sample(tmp_path / "raw", citations=20)
    make_corpus([tmp_path / "raw"], corpus, 0, 0, workers=1)
    command = ["shards", str(corpus), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "shards")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "vocabulary of 65,536" in result.output and "int32" in result.output


def test_options_of_the_tokenizer_reach_it(tmp_path: Path) -> None:
    """Curly quotes are in no vocabulary that was learned on normalised text, and three paths give the same ids."""
    notes = ["“Curly” words – twice, curly words", "once “only”…"] * 3
    (tmp_path / "notes.txt").write_text("".join(f"{note} {number}\n" for number, note in enumerate(notes)))
    make_corpus([tmp_path / "notes.txt"], tmp_path / "corpus", 0, 0, workers=1)
    arguments = ["tokenizer", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), "--normalize-punctuation"]
    arguments += ["--merges", "20", "--min-count", "2", "--min-word-count", "3", "--reserve", "8"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and ", of which 8 are reserved, from " in result.output
    request = json.loads((tmp_path / "out" / "manifest.json").read_text())["request"]
    chosen = {"merges": 20, "min_count": 2, "min_word_count": 3, "normalize_punctuation": True, "reserve": 8}
    assert {name: request[name] for name in chosen} == chosen
    ours = Tokenizer(tmp_path / "out")
    assert not {"“", "”", "–", "…"} & set("".join(ours.vocabulary))
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(fast(note, add_special_tokens=False)["input_ids"] == ours.encode(note) for note in notes)


@needs_shared
def test_biogpts_own_tokenizer_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["tokenizer", "--from-biogpt", str(SHARED / "tokenizers" / "biogpt"), "--out", str(tmp_path / "out")]
    line = mistake([*arguments, "--merges", "100"], capsys, monkeypatch)
    assert "--from-biogpt learns nothing" in line and not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, [*arguments, "--normalize-punctuation", "--reserve", "16"])
    assert result.exit_code == 0 and "vocabulary 42,400, of which 16 are reserved" in result.output
    assert Tokenizer(tmp_path / "out").normalize_punctuation


def test_the_version_is_printed_and_completion_is_offered() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and re.fullmatch(r"biogpt-pretrain \d+\.\d+\.\d+\n", result.output)
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output
