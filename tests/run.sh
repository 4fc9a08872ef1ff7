#!/usr/bin/env bash
# ruff, pyright and pytest in .venv. `--slow` runs the slow tests too; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
install test
# Megatron's own reader, to open our shards with; without its dependencies.
megatron=megatron-core==0.16.1
.venv/bin/python -m pip show --quiet "${megatron%%==*}" 2>/dev/null ||
    .venv/bin/python -m pip install --quiet --no-deps --only-binary megatron-core "$megatron"
markers=(-m "not slow")
if [[ ${1:-} == --slow ]]; then markers=(); shift; fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
.venv/bin/python -m pytest "${markers[@]}" "$@"
