# Sourced by demo.sh and test.sh: makes the virtual environment and installs a requirements file into it, once.
#
#   VENV         folder of the environment (default .venv); packages that are installed there are kept if they fit
#   PYTHON       interpreter to make it with (default: the first of python3.11 to python3.14 and python3 that fits)
#   TORCH_INDEX  index that PyTorch is installed from, such as https://download.pytorch.org/whl/cpu: 200 MB without GPU
#                libraries in place of 5 GB

VENV="${VENV:-.venv}"

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }

make_environment() { # $1: requirements file
    if [ ! -x "$VENV/bin/python" ]; then
        local python=""
        for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3}; do
            if fits "$candidate"; then python="$candidate" && break; fi
        done
        if [ -z "$python" ]; then
            echo "error: Python 3.11 to 3.14 is needed and was not found; install one, or name it: PYTHON=/path/to/python bash $0" >&2
            exit 1
        fi
        echo "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV"
    fi
    local stamp="$VENV/.installed-$(basename "$1")"
    local requirements
    requirements="$(cat requirements*.txt | sha256sum | cut -d' ' -f1)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$requirements" ]; then
        local pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
        if [ -n "${TORCH_INDEX:-}" ]; then
            echo "installing PyTorch from $TORCH_INDEX"
            # torchvision, which timm requires, must be of the same build. Versions such as 2.11.0+cpu satisfy ==2.11.0 below.
            "${pip[@]}" --index-url "$TORCH_INDEX" $(grep -E '^torch(audio)?==' requirements.txt) torchvision
        elif ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
            echo "PyTorch comes with its GPU libraries (5 GB); for 200 MB without: TORCH_INDEX=https://download.pytorch.org/whl/cpu bash $0"
        fi
        echo "installing $1 (some minutes the first time)"
        "${pip[@]}" -r "$1"
        echo "$requirements" > "$stamp"
    fi
}
