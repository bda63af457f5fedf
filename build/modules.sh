#!/usr/bin/env bash
# Prints the directory of every Go module of the repository, the root first.
# It looks at the files, not at go.work: a module nobody listed there is found.
set -euo pipefail
cd "$(dirname "$0")/.."
find . \( -name .git -o -name .cache -o -name testdata -o -name node_modules \) -prune \
	-o -name go.mod -print | sed 's|/go.mod$||' | LC_ALL=C sort
