"""What a benchmark needs beyond the plain install. Where that is absent, the benchmark ends with one line."""

import importlib
import sys

from tests.paths import NLM


def need_extra(extra: str, module: str) -> None:
    """Exit with code 2 and the command to type if the module of an extra cannot be imported."""
    try:
        importlib.import_module(module)
    except ImportError:
        command = f"pip install --constraint requirements.lock --editable '.[{extra}]'"
        print(f"error: {module} is not installed. It is in the extra `{extra}`: {command}", file=sys.stderr)
        sys.exit(2)


def need_shared() -> None:
    """Exit with code 2 if the real data is absent."""
    if not NLM.is_dir():
        print(f"error: this benchmark reads real data, and there is no folder {NLM}", file=sys.stderr)
        sys.exit(2)
