# What the service scripts have in common; they source it. (The tests know the scripts' folder by this file.)
# A script defines `begin` (starts it and waits until it works, or skips) and, if something has to be done before its
# processes are ended, `finish`; then it calls `main start|stop|status [STATE_DIR]`.
# All of a service is in the folder $dir: NAME.pid ("PID STARTTIME") and NAME.log of each process, its settings, and `env`,
# the KEY=VALUE lines that `start` prints. That file is made last: where it is, the service was ready.
set -euo pipefail
umask 022
caller_path=$PATH
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin      # a plain user has no sbin in it
me=${0##*/}
here=$(cd "$(dirname "$0")" && pwd)
dir=${MIRAI_SERVICES:-/tmp/mirai-services-ci}
case ${1:-} in start | stop | status) dir=${2:-$dir} ;; esac
dir=$(realpath -m "$dir")/${me%.sh}

say() { echo "$me: $*" >&2; }
fail() { say "$*"; exit 1; }
skip() { say "skipped: $*"; trap - EXIT; clear_away; exit 77; }
tell() { printf '%s\n' "$@" >>"$dir/env.new"; }
finish() { :; }

wait_for() { # SECONDS COMMAND...: until it succeeds; it has to end by itself
    local end=$((SECONDS + $1))
    until "${@:2}" >/dev/null 2>&1 9>&-; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}

# -- processes: a pid is used again in time, but not together with the kernel's start time of its process

born() { # PID: its start time, if it is there and no zombie
    local stat
    { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
    set -- ${stat##*) }     # what is after the name, which may have blanks and parentheses
    [ "$1" != Z ] && echo "${20}"
}

pid_of() { # NAME: of its process, if that is still there
    local pid start
    { read -r pid start <"$dir/$1.pid"; } 2>/dev/null && [ "$(born "$pid")" = "$start" ] && echo "$pid"
}
gone() { ! pid_of "$1" >/dev/null; }

spawn() { # NAME [VARIABLE=VALUE...] COMMAND...: in a session of its own, with the small environment of a boot
    setsid env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME="${HOME:-/}" LANG=C.UTF-8 \
        "${@:2}" </dev/null >>"$dir/$1.log" 2>&1 9>&- &
    echo "$! $(born $! || echo gone)" >"$dir/$1.pid"
}

end() { # NAME: asks its process to end; then, or after 5 s, kills what is left of it and its descendants
    local pid p next all=()
    if pid=$(pid_of "$1"); then
        next=$pid
        while [ -n "$next" ]; do
            for p in $next; do all+=("$p $(born "$p" || echo gone)"); done
            next=$(ps -o pid= --ppid "$next" | xargs) || :
        done
        kill "$pid" 2>/dev/null || :
        wait_for 5 gone "$1" || :
        for p in "${all[@]}"; do
            [ "$(born "${p% *}")" != "${p#* }" ] || kill -9 "${p% *}" 2>/dev/null || :
        done
        wait_for 5 gone "$1" || say "$1 ($pid) does not end"
    fi
    rm -f "$dir/$1.pid"
}

# -- what a service needs

need_root() { [ "$(id -u)" = 0 ] || skip "needs root"; }

need() { # "COMMAND:PACKAGE..."...: installs the packages of commands that are missing
    local pair said missing=()
    for pair; do [ -n "$(type -P "${pair%%:*}")" ] || missing+=(${pair#*:}); done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || skip "needs the packages ${missing[*]}, and root to install them"
    say "installs ${missing[*]}"
    said=$(install_them "${missing[@]}" </dev/null 2>&1 9>&- 8<"$here/lib.sh") ||
        { tail -n 9 <<<"$said" >&2; skip "apt-get does not install ${missing[*]}"; }
}

install_them() (
    get() { DEBIAN_FRONTEND=noninteractive timeout 600 apt-get -qq -y -o DPkg::Lock::Timeout=120 "$@" 8<&-; }
    flock -w 600 8      # the policy is for one at a time
    if [ ! -e /usr/sbin/policy-rc.d ]; then     # it keeps packages from starting their daemons
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        install -m 755 /dev/stdin /usr/sbin/policy-rc.d <<<$'#!/bin/sh\nexit 101'
    fi
    get install --no-install-recommends "$@" || { get update && get install --no-install-recommends "$@"; }    # no lists yet
)

free_port() { # one where nobody listens, nor at the next; outside the range that is given to connections
    local port
    for _ in {1..100}; do
        port=$((20000 + RANDOM % 12000))
        (: <>"/dev/tcp/127.0.0.1/$port" || : <>"/dev/tcp/127.0.0.1/$((port + 1))") 2>/dev/null || { echo $port; return; }
    done
    fail "no free port"
}

system_python() { # not pyenv's wrapper for it, which needs a home
    [ -x /usr/bin/python3 ] && echo /usr/bin/python3 || python3 -c 'import os, sys; print(os.path.realpath(sys.executable))'
}

# -- start, stop, status

# The script itself is locked, so that no file is left of it; 9 is closed for all that outlives this.
lock() { exec 9<"$0"; flock -w 180 9 || fail "another one has been at work for 180 s"; }

is_up() {
    local file
    [ -e "$dir/env" ] || return 1
    for file in "$dir"/*.pid; do ! gone "$(basename "$file" .pid)" || return 1; done
}

clear_away() { # the latest process first; only in a folder that `start` made
    local file
    [ -e "$dir/.begun" ] || return 0
    finish || :
    for file in $(ls -t "$dir" | grep '\.pid$'); do end "${file%.pid}"; done
    rm -rf "$dir"
    rmdir --ignore-fail-on-non-empty "${dir%/*}"
}

main() {
    lock
    case ${1:-} in
    start)
        [[ $dir != *[!A-Za-z0-9/._+-]* ]] || skip "odd characters in $dir"      # it goes into settings, unquoted
        if ! is_up; then
            clear_away
            mkdir -p "${dir%/*}"
            mkdir "$dir" && touch "$dir/.begun"
            trap 'say "did not start; its logs end with:"; tail -n 15 "$dir"/*.log >&2 || :; clear_away; exit 1' EXIT
            begin
            trap - EXIT
            mv "$dir/env.new" "$dir/env"
        fi
        cat "$dir/env" ;;
    stop) clear_away ;;
    status) is_up && cat "$dir/env" || { say "is not up"; exit 3; } ;;
    *) say "start|stop|status [STATE_DIR]"; exit 2 ;;
    esac
}
