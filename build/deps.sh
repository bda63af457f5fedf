#!/usr/bin/env bash
# Installs the programs that the build needs and that are missing.
#
#   build/deps.sh [test] [check] [pictures]     no group: test and check
#
# With apt-get and the right to use it, it installs. Otherwise it prints what
# to install and exits 1. When nothing is missing it does nothing, at once.
set -euo pipefail

# The one list of programs from outside Go, with reasons. A program is missing
# if the test in the second column fails: `+x` asks whether x can be run.
#
# group|missing unless|apt|dnf|apk|brew|why
table='
all  |+make          |make           |make           |make            |make      |every command is a target
test |+redis-server  |redis-server   |redis          |redis           |redis     |the tests start real servers
test |+redis-sentinel|redis-sentinel |redis          |redis           |redis     |the failover tests start real sentinels
test |+redis-cli     |redis-tools    |redis          |redis           |redis     |to look into a server that a test left open
test |c_compiler     |gcc libc6-dev  |gcc glibc-devel|gcc musl-dev    |gcc       |the race detector needs cgo
test |+promtool      |prometheus     |prometheus     |prometheus      |prometheus|judges the rules, answers the queries of the dashboards, watches the drill
test |alertmanager   |prometheus-alertmanager|golang-github-prometheus-alertmanager|alertmanager|alertmanager|pages in the drill
test |+amtool        |prometheus-alertmanager|golang-github-prometheus-alertmanager|alertmanager|alertmanager|judges the example of routing and inhibition
pictures|+node       |nodejs         |nodejs         |nodejs          |node      |draws the pictures of the dashboards
pictures|+npm        |npm            |npm            |npm             |node      |installs what draws them
pictures|+chromium   |chromium       |chromium       |chromium        |chromium  |renders them
check|+shellcheck    |shellcheck     |ShellCheck     |shellcheck      |shellcheck|shell scripts are linted like Go
'

# Services that the packages above may start. The tests start servers of their
# own, on ports of their own; one on a default port would only get in the way.
services='redis-server redis-sentinel prometheus prometheus-alertmanager prometheus-node-exporter'

c_compiler() {
	[[ -n ${CC:-} ]] || command -v gcc >/dev/null || command -v clang >/dev/null || return 1
	echo '#include <stdlib.h>' | ${CC:-cc} -E - >/dev/null 2>&1
}

alertmanager() { # Debian has another name for it than upstream
	command -v prometheus-alertmanager >/dev/null || command -v alertmanager >/dev/null
}

present() {
	case $1 in
	+*) command -v "${1#+}" >/dev/null ;;
	*) "$1" ;;
	esac
}

# missing GROUPS COLUMN: the packages that lack, in the words of one package manager.
missing() {
	local line group test wanted
	while IFS= read -r line; do
		[[ -n $line ]] || continue
		group=$(trim "$(cut -d'|' -f1 <<<"$line")")
		test=$(trim "$(cut -d'|' -f2 <<<"$line")")
		wanted=" $1 all "
		[[ $wanted == *" $group "* || $1 == all ]] || continue
		present "$test" || cut -d'|' -f"$2" <<<"$line"
	done <<<"$table" | tr -s ' ' '\n' | sed '/^$/d' | LC_ALL=C sort -u | tr '\n' ' '
}

trim() {
	local s=$1
	s=${s%"${s##*[! ]}"}
	echo "${s#"${s%%[! ]*}"}"
}

running() {
	if [[ -d /run/systemd/system ]]; then
		systemctl is-active --quiet "$1"
	else
		[[ -x /etc/init.d/$1 ]] && "/etc/init.d/$1" status >/dev/null 2>&1
	fi
}

stop() {
	echo "deps: stopping the service $1, which its package has just started"
	if [[ -d /run/systemd/system ]]; then
		as_root systemctl disable --now --quiet "$1"
	else
		as_root "/etc/init.d/$1" stop >/dev/null
	fi
}

as_root() {
	if [[ $(id -u) == 0 ]]; then "$@"; else sudo -n "$@"; fi
}

can_install() {
	command -v apt-get >/dev/null || return 1
	[[ $(id -u) == 0 ]] || { command -v sudo >/dev/null && sudo -n true 2>/dev/null; }
}

apt() {
	# RUNLEVEL=1: without systemd the packages then start no service.
	as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
		apt-get -q -y -o=Dpkg::Use-Pty=0 -o=Acquire::Retries=3 "$@" </dev/null
}

groups=${*:-test check}
if [[ -z $(missing "$groups" 3) ]]; then
	exit 0
fi

if ! can_install; then
	cat >&2 <<EOT
deps: programs are missing, and they cannot be installed from here (that takes
deps: apt-get, and root or sudo without a password). Install one of:
  Debian, Ubuntu:  apt-get install $(missing "$groups" 3)
  Fedora:          dnf install $(missing "$groups" 4)
  Alpine:          apk add $(missing "$groups" 5)
  macOS:           brew install $(missing "$groups" 6)
EOT
	exit 1
fi

read -r -a packages <<<"$(missing "$groups" 3)"
echo "deps: installing ${packages[*]}"
were_running=' '
for s in $services; do
	if running "$s"; then were_running+="$s "; fi
done

compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null || apt update
if ! apt install --no-install-recommends "${packages[@]}"; then
	echo 'deps: once more, with fresh lists'
	apt update
	apt install --no-install-recommends "${packages[@]}"
fi

for s in $services; do
	if [[ $were_running != *" $s "* ]] && running "$s"; then stop "$s"; fi
done

hash -r
left=$(missing "$groups" 3)
if [[ -n $left ]]; then
	echo "deps: installed, yet still missing: $left" >&2
	exit 1
fi
