#!/usr/bin/env bash
# Sees every gate of build/check.sh pass on a copy of the repository, breaks
# what the gate guards, and sees it fail. The gates over documents and the
# counting of tests have Go tests that do the same.
set -euo pipefail
cd "$(dirname "$0")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -co --exclude-standard -z | xargs -0 cp --parents -t "$copy"
cd "$copy"
git init -q
git add -A
git -c user.name=selftest -c user.email=selftest@localhost commit -qm selftest

untrusted=0

# sees GATE WORD...: the gate passes as things are; once `break_it` has run it
# fails, and its output has every word.
sees() {
	local gate=$1 word out
	shift
	if ! out=$(build/check.sh "$gate" 2>&1); then
		printf '%s\n' "$out" "selftest: $gate does not pass to begin with"
		untrusted=1
		return
	fi
	break_it
	if out=$(build/check.sh "$gate" 2>&1); then
		printf '%s\n' "$out" "selftest: $gate passes although it should not"
		untrusted=1
	fi
	local missing=
	for word in "$@"; do
		[[ $out == *"$word"* ]] || missing+=" $word"
	done
	if [[ -n $missing ]]; then
		printf '%s\n' "$out" "selftest: $gate fails, but not because of:$missing"
		untrusted=1
	fi
	git clean -fdq -e .cache
	git checkout -q .
	echo "seen to fail: $gate"
}

package() { # package DIR: a Go file there, its body from standard input
	mkdir -p "$1"
	{ printf '// Package x is temporary.\npackage x\n\n'; cat; } >"$1/x.go"
}

break_it() { package internal/x <<<'func   f() {}'; }
sees gofmt internal/x/x.go

break_it() { mkdir extra && printf 'module example.com/extra\n\ngo 1.26\n' >extra/go.mod; }
sees workspace ./extra

break_it() { go mod edit -require=golang.org/x/text@v0.20.0; }
sees tidy golang.org/x/text

break_it() { mkdir extra && printf 'module example.com/extra\n\ngo 1.26\n' >extra/go.mod && package extra <<<'var _ = undefined'; }
sees build undefined ./extra

break_it() { package internal/x <<<$'import "fmt"\n\nfunc init() { fmt.Printf("%d", "x") }'; }
sees vet 'wrong type'

break_it() { package internal/x <<<$'//go:generate touch generated.go'; }
sees generate 'changes files' internal/x/generated.go

break_it() { echo '[x](gone.md)' >>README.md; }
sees docs 'gone.md: no such file'

# shellcheck disable=SC2016
break_it() { printf '#!/bin/sh\ncd $1\n' >build/x.sh; }
sees shell SC2086

# One finding for each linter of .golangci.yml.
break_it() {
	package internal/x <<'EOT'
import (
	"context"
	"io"
	"net/http"
	"os"
	"time"
)

func Exported() {}

// E has its context in the wrong place.
func E(n int, ctx context.Context) error { return ctx.Err() }

func unused() {
	os.Chdir("x")
	time.Sleep(5)
}

// F has an occured word in its comment.
func F(err error, v []int) bool {
	for _, x := range v {
		x := x
		_ = x
	}
	r, err2 := http.Get("http://localhost")
	if err2 != nil {
		return false
	}
	_ = r.Status
	n := 1
	_ = n
	n = 2
	var p *int
	if p == nil {
		_ = *p
	}
	if s := r.Status; string(s) == "" {
		return false //nolint
	}
	return err == io.EOF
}

// G is there to be called.
func G() int { return g(1, true) + g(2, false) }

func g(n int, always bool) int { return n + len(os.Args) }
EOT
	printf 'package x\n\nimport (\n\t"os"\n\t"testing"\n)\n\nfunc TestX(t *testing.T) { os.Setenv("A", "b") }\n' >internal/x/x_test.go
}
linters=$(sed -n '/^  enable:/,/^  [^ ]/s/^    - \([a-z]*\).*/(\1)/p' .golangci.yml | grep -v -e gofmt)
# shellcheck disable=SC2086 # one word for each linter
sees lint $linters context-as-argument nilness

# A database that objects to fmt.Println.
db=$copy/.cache/db
mkdir -p "$db/index" "$db/ID"
echo '{"modified":"2026-01-01T00:00:00Z"}' >"$db/index/db.json"
echo '[{"path":"stdlib","vulns":[{"id":"GO-2026-9999","modified":"2026-01-01T00:00:00Z"}]}]' >"$db/index/modules.json"
echo '[{"id":"GO-2026-9999","modified":"2026-01-01T00:00:00Z"}]' >"$db/index/vulns.json"
cat >"$db/ID/GO-2026-9999.json" <<'EOT'
{"schema_version":"1.3.1","id":"GO-2026-9999","modified":"2026-01-01T00:00:00Z","published":"2026-01-01T00:00:00Z",
"details":"selftest","affected":[{"package":{"name":"stdlib","ecosystem":"Go"},
"ranges":[{"type":"SEMVER","events":[{"introduced":"0"}]}],
"ecosystem_specific":{"imports":[{"path":"container/ring","symbols":["New"]}]}}],
"database_specific":{"url":"https://pkg.go.dev/vuln/GO-2026-9999"}}
EOT
break_it() { package internal/x <<<$'import "container/ring"\n\n// F calls what the database warns of.\nfunc F() int { return ring.New(1).Len() }'; }
export GOVULNDB=file://$db
sees vulnerabilities GO-2026-9999
unset GOVULNDB

# Without a network (only then can this be seen), a release must not go on.
if [[ $(build/check.sh vulnerabilities) == *'NOT CHECKED'* ]]; then
	break_it() { export VULNDB=required; }
	sees vulnerabilities 'fetching vulnerabilities'
fi

[[ $untrusted == 0 ]] || { echo 'selftest: not every gate can be trusted' >&2; exit 1; }
echo 'every gate was seen to pass and to fail'
