#!/bin/sh
# Usage: install.sh VENV REQUIREMENT
# Makes the virtual environment if there is none, and installs the checkout into it (editable).
set -eu
venv=$1
requirement=$2

if [ ! -x "$venv/bin/python" ]; then
    python=
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "Python 3.11 or newer is needed and was not found; name yours with PYTHON=/path/to/python make ..." >&2
        exit 1
    fi
    if ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        echo "$python cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv" >&2
        exit 1
    fi
fi

# PyPI's torch for Linux brings several GB of CUDA libraries. Without an NVIDIA driver take the CPU build instead, where
# its index can be reached; its version (2.x.y+cpu) sorts above PyPI's, so pip prefers it.
index=https://download.pytorch.org/whl/cpu
if [ "$(uname -s)" = Linux ] && ! [ -e /proc/driver/nvidia ] && ! command -v nvidia-smi >/dev/null 2>&1 &&
    "$venv/bin/python" - "$index/torch/" <<'PY' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=5)
PY
then
    "$venv/bin/python" -m pip install --extra-index-url "$index" -e "$requirement"
else
    "$venv/bin/python" -m pip install -e "$requirement"
fi
