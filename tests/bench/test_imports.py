"""The benchmarks run after a plain install: `pip install .`, with no extra."""

import subprocess
import sys

from tests.paths import ROOT

OF_EXTRAS = (
    "pytest",
    "hypothesis",
    "megatron",
    "megatron.core",
    "ray",
    "pubmed_parser",
    "pubmedparser",
    "accelerate",
    "rouge_score",
)
WITHOUT_EXTRAS = f"import sys; sys.modules.update(dict.fromkeys({OF_EXTRAS!r}));"
BENCHMARKS = sorted(
    path.stem for path in (ROOT / "tests/bench").glob("*.py") if not path.stem.startswith(("test_", "_"))
)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_EXTRAS + code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_every_benchmark_is_imported_without_extras() -> None:
    assert {"corpus", "model", "peers", "text", "trust"} <= set(BENCHMARKS)
    code = f"import importlib; [importlib.import_module(f'tests.bench.{{name}}') for name in {BENCHMARKS!r}]"
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_the_extra_that_the_corpus_benchmark_needs_is_named() -> None:
    result = python("from tests.bench.corpus import main; main()")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "pubmed_parser" in result.stderr and "'.[bench]'" in result.stderr
