"""One training run: data and model put together under DeepSpeed.

Importing this package checks that the common names `data`, `model` and `launch` lead to our packages. If the working
folder has a `data/` package of its own, Python would import that one.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The folder of our packages."""
ERROR_FILE = "BIOGPT_ERROR_FILE"
"""Environment variable: where rank 0 writes a mistake for `biogpt train`, which torchrun's exit code would hide."""


def _refuse_foreign_packages() -> None:
    for name in ("data", "model", "launch"):
        spec = importlib.util.find_spec(name)
        found = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
        if found != [ROOT / name]:
            place = found[0] if found else spec.origin if spec else "nothing"
            print(
                f"biogpt: error: {place} would be imported instead of biogpt-pretrain's package `{name}` in {ROOT};"
                " start from another folder, or set PYTHONSAFEPATH=1",
                file=sys.stderr,
            )
            raise SystemExit(2)


_refuse_foreign_packages()
