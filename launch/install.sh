# Sourced by quickstart.sh and tests/run.sh: makes .venv with this project in it.
#   install EXTRA             the versions of requirements.lock; EXTRA is "" for the plain install
#   install EXTRA --newest    the newest versions within the ranges of pyproject.toml
# PYTHON=/path/to/python3.12 chooses the Python of a new .venv: 3.11 or newer.
install() {
    local extra=$1 newest=${2:-} stamp=.venv/.installed${1:+-$1} python=${PYTHON:-python3}
    local versions=(--constraint requirements.lock)
    if [[ $newest ]]; then
        versions=(--upgrade --upgrade-strategy eager)
    elif [[ -f $stamp && ! pyproject.toml -nt $stamp && ! requirements.lock -nt $stamp ]]; then
        return  # done before
    fi
    if [[ ! -x .venv/bin/python ]]; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "biogpt: error: $python is not Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
            exit 2
        fi
        "$python" -m venv .venv
    fi
    if [[ $newest ]]; then rm -f .venv/.installed*; fi  # the next install without --newest returns to the lock
    .venv/bin/python -m pip install --quiet "${versions[@]}" --editable ".${extra:+[$extra]}"
    if [[ ! $newest ]]; then touch "$stamp"; fi
}
