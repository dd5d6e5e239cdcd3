# Sourced by demo.sh and test.sh: makes the virtual environment and installs a requirements file into it, once.
#
#   VENV    folder of the environment (default .venv)
#   PYTHON  interpreter to make it with (default: the first of python3.11, python3.12, python3 that is 3.11 or 3.12)

VENV="${VENV:-.venv}"

fits() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; }

make_environment() { # $1: requirements file
    if [ ! -x "$VENV/bin/python" ]; then
        local python=""
        for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
            if fits "$candidate"; then python="$candidate" && break; fi
        done
        if [ -z "$python" ]; then
            echo "error: Python 3.11 or 3.12 is needed and was not found; install one, or name it: PYTHON=/path/to/python bash $0" >&2
            exit 1
        fi
        echo "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV"
    fi
    local stamp="$VENV/.installed-$(basename "$1")"
    local wanted
    wanted="$(cat requirements*.txt | sha256sum | cut -d' ' -f1)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing $1 (about 5 GB with PyTorch; some minutes the first time)"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$1"
        echo "$wanted" > "$stamp"
    fi
}
