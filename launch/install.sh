# Sourced by quickstart.sh and tests/run.sh: makes .venv with this project in it. install EXTRA ("" for none).
install() {
    local extra=$1 stamp=.venv/.installed${1:+-$1}
    if [[ -f $stamp && ! pyproject.toml -nt $stamp ]]; then return; fi  # done before
    local python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "biogpt: error: $python is not Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
        exit 2
    fi
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --editable ".${extra:+[$extra]}"
    touch "$stamp"
}
