#!/bin/sh
# What `make dist` does: dist.sh PYTHON [PACKAGE|all]. Builds the wheels of all members into dist/, then installs one
# package (the first by name, or PACKAGE; each with `all`) by its name in a fresh environment and looks at the result.
set -eu
python=$1
package=${2:-}
cd "$(dirname "$0")/.."

rm -rf dist
PIP_PYTHON=$python
. tools/uv-env.sh
"$python" -m tools.workspace folders | while IFS= read -r folder; do
    if [ "${UV:-1}" = 0 ]; then
        "$python" -m build --wheel --outdir dist "$folder" </dev/null >/dev/null
    else
        uv build --quiet --python "$python" --wheel --out-dir dist "$folder" </dev/null
    fi
done
ls dist/*.whl
exec "$python" -m tools.dist "${package:-first}"
