#!/bin/sh
# Tests one member as its user gets it: ci/test-package.sh PACKAGE (the folder's name; shared works too).
# Builds wheels of shared-core and the member, installs only those and what they declare into a fresh environment,
# and runs the member's tests from a copy outside the repository, where no source tree can be imported.
# PYTHON names the Python to test with. Wheels with embedded data are taken from .cache/wheels and fetched if absent.
set -eu
if [ $# -ne 1 ]; then
    echo "usage: ci/test-package.sh PACKAGE" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed; name one: PYTHON=python3.11 ci/test-package.sh $1" >&2
    exit 2
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM

# Facts about the member as shell assignments: folder, distribution, import_name.
facts=$("$python" -m tools.workspace facts "$1")
eval "$facts"

"$python" -m venv "$scratch/tools"
"$scratch/tools/bin/python" -m pip install --quiet -c constraints.txt "uv<0.13"
uv=$scratch/tools/bin/uv
PIP_PYTHON=$scratch/tools/bin/python
. tools/uv-env.sh

echo "== wheels of shared-core and $distribution"
"$uv" build --quiet --python "$python" --wheel --out-dir "$scratch/wheels" shared
[ "$folder" = "$root/shared" ] || "$uv" build --quiet --python "$python" --wheel --out-dir "$scratch/wheels" "$folder"
"$scratch/tools/bin/python" -m pip download --quiet --no-deps --ignore-requires-python --only-binary=:all: \
    --require-hashes -d .cache/wheels -r embedded.txt

echo "== $distribution[test] into a fresh environment"
"$uv" venv --quiet --python "$python" "$scratch/env"
"$uv" pip install --quiet --python "$scratch/env/bin/python" --find-links "$scratch/wheels" -c constraints.txt \
    "$distribution[test]"

echo "== tests of $distribution outside the repository"
# The same pytest settings, warnings as errors among them; the member's README too, whose examples a test may run.
mkdir -p "$scratch/copy/member"
cp pyproject.toml "$scratch/copy/"
for part in tests benchmarks README.md pyproject.toml; do
    [ ! -e "$folder/$part" ] || cp -R "$folder/$part" "$scratch/copy/member/"
done
cd "$scratch/copy"
PATH=$scratch/env/bin:$PATH
SHARED_CORE_WHEELS=$root/.cache/wheels
export PATH SHARED_CORE_WHEELS
unset PYTHONPATH VIRTUAL_ENV
"$scratch/env/bin/python" -P -c "import sys, $import_name; f = $import_name.__file__
sys.exit(None if f.startswith(sys.prefix) else f'error: {f} does not come from the wheel')"
"$scratch/env/bin/python" -P -m pytest -c pyproject.toml --rootdir . member/tests
