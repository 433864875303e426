#!/usr/bin/env bash
# Slurm: munged, slurmctld, and one slurmd that takes itself to have 8 CPUs, whatever there are.
#   slurm.sh start|stop|status [STATE_DIR]      start prints SLURM_CONF, which sbatch and the others need
. "$(dirname "$0")/lib.sh"
unset "${!SLURM_@}" "${!SBATCH_@}"      # of a job that this may be run from
export SLURM_CONF=$dir/slurm.conf

controller_answers() { timeout 5 scontrol ping | grep UP; }
node_is_idle() { timeout 5 sinfo -h -N -o %T | grep -x idle; }
no_jobs() { local jobs; jobs=$(timeout 5 squeue -h) && [ -z "$jobs" ]; }

begin() {
    local port host
    need_root
    need munged:munge slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client ps:procps
    port=$(free_port) host=$(hostname -s)
    timeout 10 getent hosts "$host" >/dev/null || skip "this host's own name, $host, does not resolve"
    mkdir "$dir/state" "$dir/spool"
    (umask 077; head -c 1024 /dev/urandom >"$dir/munge.key")
    echo CgroupPlugin=cgroup/v1 >"$dir/cgroup.conf"     # not used, but looked for, in vain where /sys/fs/cgroup is not mounted
    # config_overrides: CPUs that are not there. The scheduler's parameters: no seconds of waiting for the next turn.
    cat >"$SLURM_CONF" <<CONF
ClusterName=mirai
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthInfo=socket=$dir/munge.sock
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/state/slurmctld
SlurmdPidFile=$dir/spool/slurmd
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PropagateResourceLimits=NONE
KillWait=5
NodeName=mirai1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=8
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE
CONF
    spawn munged munged --foreground --force --socket "$dir/munge.sock" --key-file "$dir/munge.key" \
        --pid-file "$dir/state/munged" --seed-file "$dir/state/seed" --log-file "$dir/munged.log"
    wait_for 10 timeout 5 munge -n -S "$dir/munge.sock" || fail "munged does not answer"
    spawn slurmctld slurmctld -D -f "$SLURM_CONF"
    wait_for 20 controller_answers || fail "slurmctld does not answer"
    spawn slurmd slurmd -D -N mirai1 -f "$SLURM_CONF"
    wait_for 30 node_is_idle || fail "the node is not idle"
    timeout 30 srun -Q -t 1 --chdir=/ true 9>&- || fail "a first job failed"
    tell "SLURM_CONF=$SLURM_CONF"
}

finish() { # jobs outlive slurmd: they are ended while there is someone to do it
    gone slurmctld || gone slurmd && return
    timeout 10 squeue -h -o %A | sort -u | xargs -r timeout 10 scancel
    wait_for 15 no_jobs || say "jobs are left"
}

main "$@"
