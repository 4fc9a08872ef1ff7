#!/usr/bin/env bash
# ruff, pyright and pytest in .venv. `--slow` runs the slow tests too; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
install test
markers=(-m "not slow")
if [[ ${1:-} == --slow ]]; then markers=(); shift; fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
.venv/bin/python -m pytest "${markers[@]}" "$@"
