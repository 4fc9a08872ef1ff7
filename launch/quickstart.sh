#!/usr/bin/env bash
# From nothing to a trained and exported model, on the embedded sample. Run it again to continue where it stopped.
# bash launch/quickstart.sh [--newest] [FOLDER]: --newest ignores requirements.lock, see launch/install.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
newest=
if [[ ${1:-} == --newest ]]; then newest=$1; shift; fi
echo "== installing into .venv (some minutes the first time)"
install "" $newest
exec .venv/bin/biogpt quickstart --out "${1:-quickstart}"
