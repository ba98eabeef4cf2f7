#!/bin/sh
# Runs the README's block for using one package alone, as it stands there, in a copy of what git tracks.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM
cd "$root"
awk '/^<!-- ci\/readme.sh runs the next block -->/ { found = 1; next }
     found && /^```sh/ { inside = 1; next }
     inside && /^```/ { exit }
     inside { print }' README.md >"$scratch/block.sh"
if [ ! -s "$scratch/block.sh" ]; then
    echo "error: README.md has no block marked for ci/readme.sh" >&2
    exit 2
fi
mkdir "$scratch/checkout"
git ls-files -z | tar --null -T - -cf - | (cd "$scratch/checkout" && tar xf -)
. tools/uv-env.sh
cd "$scratch/checkout"
echo "== README, one package alone:"
cat "$scratch/block.sh"
sh -eu "$scratch/block.sh"
