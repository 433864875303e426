#!/usr/bin/env bash
# Son of Grid Engine: a qmaster, and one execd with 8 slots in the queue all.q.
#   sge.sh start|stop|status [STATE_DIR]        start prints SGE_ROOT, SGE_CELL and two ports, which qsub and the others need
. "$(dirname "$0")/lib.sh"
unset "${!SGE_@}"       # of a job that this may be run from
variables() { export SGE_ROOT=$dir/root SGE_CELL=default $(cat "$dir/ports" 2>/dev/null); }
variables

spool() { LD_LIBRARY_PATH=/usr/lib/gridengine timeout 20 "/usr/lib/gridengine/$1" "${@:2}"; }
qconf() { timeout 10 qconf "$@"; }
queue_is_up() { # its line says the kind of the machine, and no state behind it
    timeout 5 qstat -f | awk '/^all\.q@/ { up = /lx-/ && NF == 5 } END { exit !up }'
}
no_jobs() { local jobs; jobs=$(timeout 5 qstat -u '*') && [ -z "$jobs" ]; }

configure() { # the qmaster's first database
    local name common=$SGE_ROOT/default/common
    mkdir -p "$common" "$dir/spool/job_scripts" "$dir/execd"
    for name in bin lib util utilbin; do ln -s "/var/lib/gridengine/$name" "$SGE_ROOT/$name"; done
    echo "$1" >"$common/act_qmaster"
    echo "$1 localhost" >"$common/host_aliases"      # 127.0.0.1 may be called either
    printf '%s\n' "admin_user root" "default_domain none" "ignore_fqdn true" "spooling_method classic" \
        "spooling_lib libspoolc" "spooling_params $common;$dir/spool" "binary_path /usr/sbin" \
        "qmaster_spool_dir $dir/spool" "security_mode none" "listener_threads 2" "worker_threads 2" \
        "scheduler_threads 1" >"$common/bootstrap"
    # gid_range: the groups by which execd knows a job's processes must not be those of another one on this machine
    sed -E -e "s|^(execd_spool_dir) .*|\1 $dir/execd|; s|^(mailer) .*|\1 /bin/true|; s|^(min_[ug]id) .*|\1 0|" \
        -e "s|^(load_report_time) .*|\1 00:00:05|; s|^(gid_range) .*|\1 21000-21099|" \
        -e "s|^(execd_params) .*|\1 INHERIT_ENV=false|" /usr/share/gridengine/default-configuration >"$dir/global"
    spool spoolinit classic libspoolc "$common;$dir/spool" init
    spool spooldefaults configuration "$dir/global"
    spool spooldefaults complexes /usr/share/gridengine/util/resources/centry
    spool spooldefaults usersets /usr/share/gridengine/util/resources/usersets
    spool spooldefaults managers root
}

populate() { # what can be said to it only when it runs
    qconf -as "$1"
    qconf -ah "$1"
    # at once, not every 15 s; and a job is not load before there is any
    qconf -ssconf | sed -E -e 's/^(schedule_interval) .*/\1 0:0:1/; s/^(flush_(submit|finish)_sec) .*/\1 1/' \
        -e 's/^(job_load_adjustments) .*/\1 NONE/' >"$dir/scheduler"
    qconf -Msconf "$dir/scheduler"
    # the built-in template; without load_thresholds, as a machine for tests is always loaded
    qconf -sq | sed -E -e "s/^(qname) .*/\1 all.q/; s/^(hostlist) .*/\1 $1/; s/^(slots) .*/\1 8/" \
        -e 's/^(load_thresholds|pe_list) .*/\1 NONE/; s/^(shell_start_mode) .*/\1 unix_behavior/' >"$dir/queue"
    qconf -Aq "$dir/queue"
}

begin() {
    local port given host
    need_root
    # msmtp-mta: its dependency on a mailer would bring a whole mail server
    [ -n "$(type -P sge_qmaster)" ] || debconf-set-selections <<<"gridengine-master shared/gridengineconfig boolean false"
    need "sge_qmaster:gridengine-master msmtp-mta bsd-mailx" sge_execd:gridengine-exec qsub:gridengine-client ps:procps
    port=$(free_port) host=$(hostname)
    timeout 10 getent hosts "$host" >/dev/null || skip "this host's own name, $host, does not resolve"
    printf '%s\n' "SGE_QMASTER_PORT=$port" "SGE_EXECD_PORT=$((port + 1))" >"$dir/ports"
    variables
    given=(SGE_ND=1 SGE_ROOT="$SGE_ROOT" SGE_CELL=default $(<"$dir/ports"))
    configure "$host" >>"$dir/setup.log" 2>&1
    spawn qmaster "${given[@]}" sge_qmaster
    wait_for 30 qconf -sh || fail "the qmaster does not answer"
    populate "$host" >>"$dir/setup.log" 2>&1
    spawn execd "${given[@]}" sge_execd
    wait_for 60 queue_is_up || fail "the queue does not come up"
    timeout 60 qsub -sync y -b y -o /dev/null -e /dev/null /bin/true >>"$dir/setup.log" 2>&1 9>&- || fail "a first job failed"
    tell "SGE_ROOT=$SGE_ROOT" "SGE_CELL=default" "$(<"$dir/ports")"
}

finish() { # jobs outlive execd: they are ended while there is someone to do it
    gone qmaster || gone execd && return
    timeout 10 qdel -u '*' >/dev/null 2>&1 || :     # it fails where there are none
    wait_for 15 no_jobs || say "jobs are left"
}

main "$@"
