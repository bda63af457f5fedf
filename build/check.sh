#!/usr/bin/env bash
# The cheap gates. All of them run, also after one has failed.
#
#   build/check.sh [gate...]     no gate: all of them
#
# The names of the gates that failed are left in .cache/failed-gates.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
export GOWORK=off
export GOFLAGS="${GOFLAGS:-} -buildvcs=false"
bin=$root/.cache/bin
mkdir -p "$bin"

# in_modules COMMAND...: runs it in every module that has packages.
in_modules() {
	local dir status=0
	while IFS= read -r dir; do
		cd "$root/$dir"
		if [[ -n $(go list ./... 2>/dev/null || echo broken) ]]; then
			"$@" || { echo "(in module $dir)"; status=1; }
		fi
	done < <("$root/build/modules.sh")
	cd "$root"
	return $status
}

sources() { # sources NAME-PATTERN: files of the repository, NUL between them
	find . \( -name .git -o -name .cache -o -name testdata -o -name node_modules \) -prune \
		-o -name "$1" -type f -print0
}

# tool NAME: builds a tool at the version that tools/go.mod pins.
tool() {
	(cd tools && go build -o "$bin/" "$(go list tool | grep "/$1\$")")
}

gate_gofmt() {
	local bad
	bad=$(sources '*.go' | xargs -0 gofmt -l)
	[[ -z $bad ]] || { echo "not formatted:"; echo "$bad"; return 1; }
}

# go.work names every module but tools: the dependencies of a linter must not
# choose the versions that the library is built with.
gate_workspace() {
	diff <(go work edit -json go.work | sed -n 's/.*"DiskPath": "\(.*\)".*/\1/p' | LC_ALL=C sort) \
		<(build/modules.sh | grep -vx ./tools) ||
		{ echo "go.work (<) and the modules (>) differ"; return 1; }
}

gate_tidy() {
	local dir status=0
	while IFS= read -r dir; do
		(cd "$dir" && go mod tidy -diff) || { echo "(in module $dir)"; status=1; }
	done < <(build/modules.sh)
	return $status
}

gate_build() { in_modules go build ./...; }

gate_vet() { in_modules go vet ./...; }

gate_generate() {
	if ! sources '*.go' | xargs -0 grep -q '^//go:generate '; then
		echo 'nothing is generated'
		return
	fi
	local before after
	before=$(checksums)
	in_modules go generate ./... || return 1
	after=$(checksums)
	[[ $before == "$after" ]] || { echo 'go generate changes files:'; diff <(echo "$before") <(echo "$after"); return 1; }
}

# Of every file that is, or could be, committed: so that the gate holds in a
# work tree with changes too.
checksums() { git ls-files -co --exclude-standard -z | xargs -0 cksum 2>/dev/null || true; }

gate_lint() {
	tool golangci-lint && in_modules "$bin/golangci-lint" run --config "$root/.golangci.yml" ./...
}

gate_docs() { go test -count=1 ./internal/docscheck; }

gate_shell() {
	if ! command -v shellcheck >/dev/null; then
		echo 'shellcheck is not installed (make deps)'
		return 1
	fi
	sources '*.sh' | xargs -0 shellcheck .ci/run
}

vulncheck() {
	local out status=0
	out=$("$bin/govulncheck" ${GOVULNDB:+-db "$GOVULNDB"} ./... 2>&1) || status=$?
	echo "$out"
	# 3: something was found. 0: nothing was. Else it could not do its work;
	# if that is for want of the database, we say so and go on, unless told
	# that this must not be (VULNDB=required, for a release). GOVULNDB names
	# another database than the public one.
	if [[ $status != 0 && $status != 3 && $out == *'fetching vulnerabilities'* && ${VULNDB:-} != required ]]; then
		echo '!!! VULNERABILITIES NOT CHECKED: database unreachable !!!'
		return 0
	fi
	return $status
}

gate_vulnerabilities() { tool govulncheck && in_modules vulncheck; }

gates=("$@")
all='gofmt workspace tidy build vet generate lint docs shell vulnerabilities'
[[ $# -gt 0 ]] || read -r -a gates <<<"$all"
failed=
for gate in "${gates[@]}"; do
	[[ " $all " == *" $gate "* ]] || { echo "check: no gate $gate; there are: $all" >&2; exit 2; }
	start=$SECONDS
	# In a process of its own, so that `set -e` holds inside it.
	set +e
	(set -e; "gate_$gate") >.cache/gate.out 2>&1 </dev/null
	status=$?
	set -e
	if [[ $status == 0 ]]; then
		word=ok
		if grep -q '!!!' .cache/gate.out; then word=warn; fi # it ran, but could not look
		printf '%-4s  %-16s %3ds\n' "$word" "$gate" $((SECONDS - start))
		grep -e '!!!' -e '^nothing is generated' .cache/gate.out | LC_ALL=C sort -u | sed 's/^/      /' || true
	else
		printf 'FAIL  %-16s %3ds\n' "$gate" $((SECONDS - start))
		cat .cache/gate.out
		failed+=" $gate"
	fi
done
echo "$failed" >.cache/failed-gates
[[ -z $failed ]] || { echo "check: failed:$failed" >&2; exit 1; }
