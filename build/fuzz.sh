#!/usr/bin/env bash
# Runs every fuzz target of every module, one after the other, each for the
# given time. No target at all is a failure: nothing would have been tried.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
fuzztime=${1:-30s}
export GOWORK=off
ran=0
while IFS= read -r dir; do
	cd "$root/$dir"
	while read -r pkg target; do
		echo "== $pkg $target"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$fuzztime" "$pkg" </dev/null
		ran=$((ran + 1))
	done < <(go list -f '{{.ImportPath}} {{.Dir}}' ./... | while read -r pkg src; do
		sed -n "s|^func \(Fuzz[A-Za-z0-9_]*\)(f \*testing\.F).*|$pkg \1|p" "$src"/*_test.go 2>/dev/null || true
	done)
done < <("$root/build/modules.sh")
[[ $ran -gt 0 ]] || { echo 'there is no fuzz target' >&2; exit 1; }
