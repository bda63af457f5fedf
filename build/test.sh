#!/usr/bin/env bash
# Runs every test of every module with the race detector on, and ends by saying
# how many of each kind ran. See build/testsum for what counts as a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
build/deps.sh test

# Each module is tested as its users get it: by its own go.mod alone.
export GOWORK=off
export CGO_ENABLED=1 # the race detector needs it
export GOFLAGS="${GOFLAGS:-} -buildvcs=false"

mkdir -p .cache
go build -o .cache/testsum ./build/testsum
# shellcheck disable=SC2046 # the directories have no spaces
exec .cache/testsum \
	-need-real \
	-skips build/skips.txt \
	-tail .cache/tests.txt \
	-failed-gates "${FAILED_GATES:-}" \
	-flags '-race -count=1 -shuffle=on -timeout=10m' \
	$(build/modules.sh)
