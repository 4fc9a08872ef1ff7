#!/usr/bin/env bash
# From nothing to a trained and exported model, on the embedded sample. Run it again to continue where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
echo "== installing into .venv (some minutes the first time)"
install ""
exec .venv/bin/biogpt quickstart --out "${1:-quickstart}"
