#!/bin/sh
# What a user's machine may be: ci/matrix.sh, after make setup.
# Finds, on each Python that is supported, versions that fit all members with all their extras, and so each alone;
# nothing is installed. Then tests alone (ci/test-package.sh), side by side, the packages that do without torch.
# The others' turn is in the matrix of .github/workflows/ci.yml: each would fetch torch again.
set -eu
cd "$(dirname "$0")/.."
PIP_PYTHON=.venv/bin/python
. tools/uv-env.sh
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

for python in $(python3 -m tools.workspace pythons); do
    .venv/bin/uv pip compile --quiet --python-version "$python" --all-extras -c constraints.txt \
        shared/pyproject.toml packages/*/pyproject.toml >/dev/null || {
        echo "error: no versions fit together on Python $python" >&2
        exit 1
    }
    echo "Python $python: versions fit together"
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
