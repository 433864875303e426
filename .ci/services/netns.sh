#!/usr/bin/env bash
# Hosts head, n1, n2 and n3 on one machine: a network namespace each, on a bridge that leads nowhere else.
#   netns.sh start|stop|status [STATE_DIR]      start prints NETNS_EXEC, this script
#   netns.sh exec HOST COMMAND...               on that host
#   netns.sh cut HOST                           pulls its cable out
#   netns.sh drop HOST [in|out]                 loses all to it, all from it, or both, without a word
#   netns.sh loss HOST PERCENT                  loses so many of its packets either way
#   netns.sh delay HOST MS                      delays its packets either way
#   netns.sh heal HOST                          undoes all of these
# A process of its own holds each host's network, name and /etc/hosts: no namespace has a name, so several may be up.
. "$(dirname "$0")/lib.sh"
net=10.78.0

on() { nsenter --net="/proc/$(pid_of "$1")/ns/net" "${@:2}"; }      # HOST COMMAND...: with its network only
holds() { [ "$(<"/proc/$(pid_of "$1")/comm")" = sleep ]; }          # it has done what comes before
reaches() { { on head timeout 5 bash -c ": </dev/tcp/$1/9" || :; } |& grep refused; }

begin() {
    local i name
    need_root
    need ip:iproute2 nft:nftables ps:procps
    unshare --net --uts --mount true || skip "may not make namespaces"
    printf '%s\n' "127.0.0.1 localhost" "$net.1 head" "$net.11 n1" "$net.12 n2" "$net.13 n3" >"$dir/hosts"
    for name in head n1 n2 n3; do # without IPv6, whose addresses could be used only seconds later
        spawn "$name" unshare --net --uts --mount --propagation slave sh -ec 'hostname "$1"
            mount --bind "$2" /etc/hosts
            echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6 || :
            ip link set lo up
            exec sleep infinity' sh "$name" "$dir/hosts"
        wait_for 5 holds "$name" || fail "no host $name"
    done
    on head ip link add br0 type bridge
    on head ip addr add $net.1/24 dev br0
    on head ip link set br0 up
    on head nft 'table bridge mirai { chain in { type filter hook prerouting priority -300; }
        chain out { type filter hook postrouting priority 300; }; }'
    for i in 1 2 3; do
        on head ip link add "v$i" type veth peer name eth0 netns "$(pid_of "n$i")"
        on head ip link set "v$i" master br0 up
        on "n$i" ip addr add "$net.1$i/24" dev eth0
        on "n$i" ip link set eth0 up
        # a chain for each direction of its cable, empty as long as that is sound
        on head nft "table bridge mirai { chain from$i { }; chain to$i { }
            chain in { iifname v$i jump from$i; }; chain out { oifname v$i jump to$i; }; }"
        wait_for 5 reaches "$net.1$i" || fail "head does not reach n$i"
    done
    tell "NETNS_EXEC=$here/$me"
}

finish() { # what runs in the namespaces was started by `exec`
    local name pid ns p
    for name in head n1 n2 n3; do
        pid=$(pid_of "$name") && ns=$(readlink "/proc/$pid/ns/net") || continue
        for p in $(find /proc/[0-9]*/ns/net -lname "${ns//[][]/?}" 2>/dev/null | cut -d/ -f3); do
            [ "$p" = "$pid" ] || kill -9 "$p" 2>/dev/null || :
        done
    done
}

case ${1:-} in
exec)
    pid=$(pid_of "$2") || fail "$2 is not up"
    # To enter a mount namespace is to be at its root: back to where this was called.
    exec nsenter --target "$pid" --net --uts --mount sh -c 'cd "$0" 2>/dev/null; exec "$@"' "$PWD" "${@:3}" ;;
cut | drop | loss | delay | heal)
    lock
    i=${2#n}
    ! gone "n$i" || fail "no host $2"
    rule() { on head nft add rule bridge mirai "$@"; }
    case $1 in
    cut) on head ip link set "v$i" down ;;
    drop)
        [ "${3:-in}" != in ] || rule "to$i" drop
        [ "${3:-out}" != out ] || rule "from$i" drop ;;
    loss) for way in to from; do rule "$way$i" "numgen random mod 1000 < $(($3 * 10)) drop"; done ;;
    delay) # a program in the cable, as not every kernel has tc's netem: v - w - ta ... tb - br0
        spawn "delay$i" nsenter --net="/proc/$(pid_of head)/ns/net" "$(system_python)" "$here/netdelay.py" "ta$i" "tb$i" "$3"
        wait_for 10 on head ip link show "tb$i" || fail "no delay: $(<"$dir/delay$i.log")"
        on head ip link add "w$i" type bridge
        on head ip link set "w$i" up
        on head ip link set "ta$i" master "w$i" up
        on head ip link set "tb$i" master br0 up
        on head ip link set "v$i" master "w$i" ;;
    heal)
        for way in to from; do on head nft flush chain bridge mirai "$way$i"; done
        end "delay$i"
        on head ip link set "v$i" master br0 up
        on head ip link del "w$i" 2>/dev/null || : ;;
    esac ;;
*) main "$@" ;;
esac
