#!/usr/bin/env bash
# An OpenSSH server on 127.0.0.1 with port, keys and settings of its own, for the user who starts it.
#   sshd.sh start|stop|status [STATE_DIR]       start prints SSH_CONFIG: ssh -F "$SSH_CONFIG" ALIAS COMMAND
# Aliases: node1 node2, with this user's home and the PATH of who starts this; far, the same by way of node1; bare, with
# an empty home, /bin/sh, the system's Python and nothing else; py36 py39 py313, as bare with that Python, if it is found;
# noauth is denied; refused: nobody listens.
# Environment: SSHD_HIDE, a directory that bare and py* are to find empty (root only).
. "$(dirname "$0")/lib.sh"

pythons() { # "ALIAS PATH" lines
    local v py
    echo "bare $(system_python)"
    for v in 3.6 3.9 3.13; do
        for py in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$v".*/bin/python3 /opt/hostedtoolcache/Python/"$v".*/x64/bin/python3 \
            "$HOME"/.local/share/uv/python/cpython-"$v".*/bin/python3 /usr/local/bin/python$v /usr/bin/python$v; do
            [ ! -x "$py" ] || { echo "py${v/./} $py"; break; }
        done
    done
}

answers() { timeout 10 ssh -F "$dir/ssh_config" bare true; }
answers_or_is_gone() { gone sshd || answers; }

begin() {
    local port name py
    need sshd:openssh-server ssh:openssh-client ps:procps
    [ "$(id -u)" != 0 ] || mkdir -p /run/sshd       # a server of root's wants it
    [ -z "${SSHD_HIDE:-}" ] || unshare --mount true || skip "may not hide a directory"
    port=$(free_port)
    for name in host_key key unknown; do ssh-keygen -q -t ed25519 -N '' -f "$dir/$name"; done
    echo "[127.0.0.1]:$port $(<"$dir/host_key.pub")" >"$dir/known_hosts"
    # MaxStartups: by default some of a crowd are dropped. SHLVL: with one, bash does not read ~/.bashrc for each command.
    cat >"$dir/sshd_config" <<CONF
ListenAddress 127.0.0.1:$port
HostKey $dir/host_key
PidFile none
AuthorizedKeysFile $dir/key.pub
StrictModes no
AllowUsers $(id -un)
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxStartups 500
ForceCommand $dir/login
AcceptEnv MIRAI_PROFILE
SetEnv PATH="$caller_path" SHLVL=1
CONF
    # What every session runs. The aliases have one key; they say by a variable what they want to find.
    install -m 755 /dev/stdin "$dir/login" <<SH
#!/bin/sh
[ -n "\$MIRAI_PROFILE" ] || exec "\$SHELL" -c "\$SSH_ORIGINAL_COMMAND"
if [ -n "${SSHD_HIDE:-}" ]; then
    [ -n "\$HIDDEN" ] || HIDDEN=1 exec unshare --mount "\$0"
    mount --bind $dir/empty "${SSHD_HIDE:-}" || exit 254
fi
cd "$dir/home/\$MIRAI_PROFILE" || exit 254
exec env -i HOME="\$PWD" USER="\$USER" LOGNAME="\$USER" SHELL=/bin/sh PATH="$dir/bin/\$MIRAI_PROFILE:/usr/bin:/bin" \\
    /bin/sh -c "\$SSH_ORIGINAL_COMMAND"
SH
    mkdir "$dir/empty"
    {   # ssh takes the first value it finds, but every IdentityFile
        printf '%s\n' "Host far" "ProxyJump node1" "Host refused" "Port 1" "Host noauth" "IdentityFile $dir/unknown" \
            "Host node1 node2 far refused bare py*" "IdentityFile $dir/key" \
            "Host node1 node2 far refused bare py* noauth" "HostName 127.0.0.1" "Port $port" "IdentitiesOnly yes" \
            "IdentityAgent none" "UserKnownHostsFile $dir/known_hosts" "StrictHostKeyChecking yes" "BatchMode yes" \
            "ConnectTimeout 10" "LogLevel ERROR"
        pythons | while read -r name py; do
            mkdir -p "$dir/home/$name" "$dir/bin/$name"
            ln -s "$py" "$dir/bin/$name/python3"
            printf '%s\n' "Host $name" "SetEnv MIRAI_PROFILE=$name"
        done
    } >"$dir/ssh_config"
    spawn sshd "$(type -P sshd)" -D -e -f "$dir/sshd_config"
    wait_for 15 answers_or_is_gone && answers || fail "sshd does not answer"
    tell "SSH_CONFIG=$dir/ssh_config"
}

main "$@"
