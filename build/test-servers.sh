#!/usr/bin/env bash
# Runs the tests that start real servers on other servers than the one in PATH.
#
#   build/test-servers.sh [server...]     no server: all of the table below
#
#   PKG   packages, default: the root package and internal/redistest
#   RUN   tests, as in go test -run
#
# The servers are Debian's packages. They and the libraries they need are unpacked
# under .cache/servers and run with those libraries: nothing is installed, and the
# release of the machine does not matter. Where the packages come from is what the
# machine's own apt is configured with; DEBIAN_MIRROR overrides that. It takes apt-get
# and dpkg, but no root.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=$PWD/.cache/servers

# name|package|binary|releases to take it and its libraries from
table='
valkey|valkey-server|valkey-server|bookworm-backports bookworm
redis8|redis-server|redis-server|trixie
'

# mirror prints the URI of the Debian archive that this machine uses.
mirror() {
	if [[ -n ${DEBIAN_MIRROR:-} ]]; then
		echo "$DEBIAN_MIRROR"
		return
	fi
	local uri
	# "Debian|Debian" is the archive itself; security updates lie elsewhere.
	# shellcheck disable=SC2016 # apt replaces these
	uri=$(apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' 'Created-By: Packages' |
		sed -n 's/^Debian|Debian|//p' | sort -u | head -n 1)
	if [[ -z $uri ]]; then
		echo 'test-servers: apt knows no Debian archive here (apt-get update, or set DEBIAN_MIRROR)' >&2
		return 1
	fi
	echo "$uri"
}

# fetch NAME PACKAGE BINARY RELEASES: unpacks the server into $cache/NAME, once. The
# file "run" there is made last, so a fetch that was cut short is begun again.
fetch() {
	local name=$1 package=$2 binary=$3 releases=$4
	local dir=$cache/$name apt=$cache/$name/apt uri release deb loader libs
	[[ ! -x $dir/run ]] || return 0
	echo "test-servers: fetching $package of ${releases%% *}"
	rm -rf "$dir"
	mkdir -p "$apt"/lists/partial "$apt"/archives/partial "$dir"/root
	uri=$(mirror)
	local keyring=/usr/share/keyrings/debian-archive-keyring.gpg signed=
	[[ ! -r $keyring ]] || signed="[signed-by=$keyring] "
	for release in $releases; do
		echo "deb $signed$uri $release main"
	done >"$apt/sources.list"
	# An apt of its own: lists, downloads and an empty record of what is installed, so
	# that every library is fetched, the C library too.
	: >"$apt/status"
	local options=(
		-q -y
		-o "Dir::State=$apt" -o "Dir::State::status=$apt/status" -o "Dir::Cache=$apt"
		-o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=-
		-o Dir::Etc::preferences=- -o Dir::Etc::preferencesparts=-
		-o "APT::Sandbox::User=$(id -un)" -o Acquire::Retries=3 -o Acquire::Languages=none
		-o APT::Update::Post-Invoke-Success=true -o Debug::NoLocking=1
	)
	{
		apt-get "${options[@]}" update
		apt-get "${options[@]}" --no-install-recommends --download-only install "$package"
	} >"$dir/log" 2>&1 </dev/null || {
		cat "$dir/log" >&2
		return 1
	}
	for deb in "$apt"/archives/*.deb; do
		dpkg -x "$deb" "$dir/root"
	done
	loader=$(find "$dir/root" -type f -name 'ld-linux*.so.*' | head -n 1)
	libs=$(find "$dir/root" -type d -path '*/lib/*-linux-gnu' | paste -sd:)
	cat >"$dir/run.new" <<END
#!/bin/sh
exec '$loader' --library-path '$libs' '$dir/root/usr/bin/$binary' "\$@"
END
	chmod +x "$dir/run.new"
	"$dir/run.new" --version >/dev/null
	rm -rf "$apt"
	mv "$dir/run.new" "$dir/run"
}

row() { grep "^$1|" <<<"$table" || { echo "test-servers: no server $1" >&2; return 1; }; }

names=("$@")
[[ $# -gt 0 ]] || mapfile -t names < <(sed -n 's/^\([a-z0-9]*\)|.*/\1/p' <<<"$table")
read -r -a packages <<<"${PKG:-. ./internal/redistest}"

export GOWORK=off CGO_ENABLED=1 # the race detector needs cgo
failed=
for name in "${names[@]}"; do
	IFS='|' read -r _ package binary releases < <(row "$name")
	if ! (set -e; fetch "$name" "$package" "$binary" "$releases"); then
		failed+=" $name(unavailable)"
		continue
	fi
	echo "== $("$cache/$name/run" --version)"
	RINGFENCE_REDIS_SERVER=$cache/$name/run \
		go test -race -count=1 -shuffle=on -timeout=20m -run "${RUN:-.}" "${packages[@]}" || failed+=" $name"
done
[[ -z $failed ]] || { echo "test-servers: failed:$failed" >&2; exit 1; }
