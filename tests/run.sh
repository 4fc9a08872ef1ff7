#!/usr/bin/env bash
# Installs into .venv, then runs ruff, codespell, pyright and pytest.
# bash tests/run.sh [--slow] [--newest] [ARGUMENTS OF PYTEST]
#   --slow      also the slow tests
#   --newest    the newest versions that pyproject.toml allows, in place of those of requirements.lock
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
markers=(-m "not slow") newest=
while [[ ${1:-} == --slow || ${1:-} == --newest ]]; do
    if [[ $1 == --slow ]]; then markers=(); else newest=$1; fi
    shift
done
run() { echo "== $*"; "$@"; }
run install test $newest
# Megatron's own reader, to open our shards with; without its dependencies.
megatron=megatron-core==0.16.1
.venv/bin/python -m pip show --quiet "${megatron%%==*}" 2>/dev/null ||
    run .venv/bin/python -m pip install --quiet --no-deps --only-binary megatron-core "$megatron"
run .venv/bin/ruff check .
run .venv/bin/ruff format --check .
run .venv/bin/codespell
run .venv/bin/pyright
# Two processes with a thread each, and with whole files: many tests start ranks of their own, so more are not faster.
export OMP_NUM_THREADS=1
run .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "${markers[@]}" "$@"
