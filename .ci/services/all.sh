#!/usr/bin/env bash
# All services that tests use: all.sh start|stop. start prints KEY=VALUE lines for the environment of the tests:
#   set -a; eval "$(bash all.sh start)"; set +a         or, on GitHub: bash all.sh start >>"$GITHUB_ENV"
# What cannot be started is skipped, with the reason on stderr; with MIRAI_SERVICES_MUST=1 the exit status is 1 then.
# Environment: MIRAI_SERVICES, the folder of their state (/tmp/mirai-services-ci).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
MIRAI_SERVICES=$(realpath -m "${MIRAI_SERVICES:-/tmp/mirai-services-ci}")
export MIRAI_SERVICES
status=0
case ${1:-} in
start)
    echo "MIRAI_SERVICES=$MIRAI_SERVICES"
    echo "MIRAI_SERVICES_SCRIPTS=$here"
    for name in sshd slurm sge netns; do
        bash "$here/$name.sh" start || { echo "all.sh: without $name" >&2; status=${MIRAI_SERVICES_MUST:-0}; }
    done
    ;;
stop) for name in netns sge slurm sshd; do bash "$here/$name.sh" stop || status=1; done ;;
*) echo "all.sh start|stop" >&2; exit 2 ;;
esac
exit "$status"
