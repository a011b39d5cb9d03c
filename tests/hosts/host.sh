#!/usr/bin/env bash
# Becomes one host: its own name, home, processes and Ray folder; its network is the namespace that
# it is started in. Usage: host.sh NAME FOLDER, with FOLDER/{home,ray,passwd,hosts,sshd_config}.
set -euo pipefail
name=$1 folder=$2
hostname "$name"
mkdir -p /tmp/ray /run/sshd
mount --make-rprivate /
mount --bind "$folder/ray" /tmp/ray
mount --bind "$folder/passwd" /etc/passwd
mount --bind "$folder/hosts" /etc/hosts
mount -t tmpfs -o size=1g tmpfs /dev/shm
exec /usr/sbin/sshd -D -e -f "$folder/sshd_config"
