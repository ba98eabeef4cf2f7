#!/bin/sh
# What `make docs` does: docs.sh PYTHON VENV. Installs mkdocs into VENV where its requirements changed, then builds the
# site into runs/docs with every warning an error. The build itself needs no network and imports no package.
set -eu
python=$1
venv=$2
cd "$(dirname "$0")/.."

stamp=$venv/.docs-requirements.txt
if ! cmp -s tools/docs-requirements.txt "$stamp"; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    if [ "${UV:-1}" = 0 ]; then
        "$venv/bin/python" -m pip install --quiet -r tools/docs-requirements.txt
    else
        "$venv/bin/python" -m pip install --quiet -c constraints.txt "uv<0.13"
        PIP_PYTHON=$venv/bin/python
        . tools/uv-env.sh
        "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" -r tools/docs-requirements.txt
    fi
    cp tools/docs-requirements.txt "$stamp"
fi
NO_MKDOCS_2_WARNING=1 "$venv/bin/python" -m mkdocs build --strict
echo "docs: open runs/docs/index.html; with search: $python -m http.server --bind 127.0.0.1 --directory runs/docs"
