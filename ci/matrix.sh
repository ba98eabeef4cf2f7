#!/bin/sh
# What a user's machine may be: ci/matrix.sh, after make setup.
# Finds versions for every member, alone and with all its extras, on each Python that is supported, installing
# nothing; then tests alone (ci/test-package.sh), side by side, the packages that do without torch. The others' turn
# is in the matrix of .github/workflows/ci.yml: each would fetch torch again.
set -eu
cd "$(dirname "$0")/.."
PIP_PYTHON=.venv/bin/python
. tools/uv-env.sh
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

for python in $(python3 -m tools.workspace pythons); do
    for folder in $(python3 -m tools.workspace folders); do
        .venv/bin/uv pip compile --quiet --python-version "$python" --all-extras -c constraints.txt \
            "$folder/pyproject.toml" >/dev/null || {
            echo "error: $folder: no versions fit together on Python $python" >&2
            exit 1
        }
    done
    echo "Python $python: versions fit together for every member"
done

packages=$(python3 -m tools.workspace without torch)
for package in $packages; do
    (sh ci/test-package.sh "$package" >"$logs/$package" 2>&1 && touch "$logs/$package.passed") &
done
wait
for package in $packages; do
    cat "$logs/$package"
    [ -e "$logs/$package.passed" ] || { echo "error: $package fails alone" >&2; exit 1; }
done
