#!/usr/bin/env bash
# A Slurm cluster on this machine alone, for tests: slurmctld and a slurmd a "node", without systemd or cgroups.
#   slurm.sh install              Debian's packages, where they are missing (root)
#   slurm.sh start [NODES] [CPUS] bring the cluster up, NODES (2) of CPUS (1) each; install first if need be (root)
#   slurm.sh env                  what to eval in a shell that shall use it
#   slurm.sh stop                 end its jobs and daemons, and delete its folder
# SLURM_LAB    its folder, which holds everything (default: ebbtide-slurm in the temporary directory); a cluster a folder
# SLURM_LAB_GRACE_S  seconds that a preempted job has to end (default: 0)
# LAB_OWNER    process id: once that process is gone, the cluster is stopped
set -euo pipefail

LAB=${SLURM_LAB:-${TMPDIR:-/tmp}/ebbtide-slurm}
export SLURM_CONF=$LAB/slurm.conf

have_packages() {
  local command
  for command in munged slurmctld slurmd sbatch; do
    command -v "$command" >/dev/null || return 1
  done
}

install_packages() {
  ! have_packages || return 0
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends munge slurm-client slurmctld slurmd \
    >/dev/null
}

taken() { # PORT
  (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# The first port of a free row of HOW_MANY. The search begins where the folder's name says, so that clusters that start
# at the same moment do not take the same row.
free_ports() { # HOW_MANY
  local seed port try offset
  seed=$(printf %s "$LAB" | cksum | cut -d' ' -f1)
  for try in $(seq 0 49); do
    port=$((20000 + (seed + try) % 400 * 25))
    for offset in $(seq 0 $(($1 - 1))); do
      ! taken $((port + offset)) || continue 2
    done
    echo "$port"
    return
  done
  echo "slurm.sh: no row of $1 free ports in 20000 .. 29999" >&2
  return 1
}

configure() { # NODES CPUS
  local host port node
  host=$(hostname -s)
  port=$(free_ports $(($1 + 1)))
  # slurmd opens a cgroup plugin even where nothing uses one, and only this one does without a mounted hierarchy
  echo "CgroupPlugin=cgroup/v1" >"$LAB/cgroup.conf"
  {
    cat <<CONF
ClusterName=ebbtide
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/pid/slurmctld
SlurmdPidFile=$LAB/pid/slurmd.%n
SlurmctldLogFile=$LAB/log/slurmctld
SlurmdLogFile=$LAB/log/slurmd.%n
# a requeued job waits until its old credential has expired: two minutes by default (and below 5)
AuthType=auth/munge
AuthInfo=socket=$LAB/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
# the nodes are one machine: believe this file about their size, and take a node back as soon as it answers
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
SlurmctldTimeout=10
SlurmdTimeout=10
# ports that jobs derive from their number differ between clusters on this machine
FirstJobId=$port
CONF
    for node in $(seq "$1"); do
      echo "NodeName=node$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + node)) CPUs=$2 RealMemory=1000"
    done
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=${SLURM_LAB_GRACE_S:-0}"
    echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2"
  } >"$SLURM_CONF"
}

await_nodes() { # NODES
  local try
  for try in $(seq 150); do
    [ "$(sinfo --noheader --Node --partition=main --states=idle 2>/dev/null | wc -l)" != "$1" ] || return 0
    sleep 0.2
  done
  echo "slurm.sh: after $((try / 5)) s not all of $1 nodes are idle" >&2
  tail -n 5 "$LAB"/log/* >&2
  return 1
}

start() {
  local nodes=${1:-2} cpus=${2:-1} node
  install_packages
  [ ! -e "$SLURM_CONF" ] || { echo "slurm.sh: $LAB holds a cluster already: stop it first" >&2; exit 1; }
  [ -z "$(ls -A "$LAB" 2>/dev/null)" ] || { echo "slurm.sh: $LAB holds something else: set SLURM_LAB" >&2; exit 1; }
  trap '[ $? = 0 ] || stop' EXIT
  mkdir -p "$LAB"/{log,munge,pid,spool,state}
  chmod 755 "$LAB" "$LAB/munge" # munged refuses a socket that others cannot reach
  configure "$nodes" "$cpus"
  (umask 077 && head -c 128 /dev/urandom >"$LAB/munge/key")
  munged --key-file="$LAB/munge/key" --socket="$LAB/munge/socket" --pid-file="$LAB/pid/munged" \
    --seed-file="$LAB/munge/seed" --log-file="$LAB/log/munged"
  slurmctld -c
  for node in $(seq "$nodes"); do
    mkdir -p "$LAB/spool/node$node"
    slurmd -N "node$node"
  done
  await_nodes "$nodes"
  [ -z "${LAB_OWNER:-}" ] || outlive_nobody "$LAB_OWNER"
}

outlive_nobody() { # OWNER
  # shellcheck disable=SC2016
  setsid bash -c 'while kill -0 "$1" 2>/dev/null && [ -e "$2" ]; do sleep 1; done; exec "$0" stop' \
    "$0" "$1" "$SLURM_CONF" </dev/null >/dev/null 2>&1 &
}

daemons() {
  cat "$LAB"/pid/* 2>/dev/null || true
}

# Processes of this cluster's jobs: a job's environment says which cluster it belongs to.
job_processes() {
  local environment
  for environment in /proc/[0-9]*/environ; do
    if { tr '\0' '\n' <"$environment" | grep -qxF "SLURM_CONF=$SLURM_CONF"; } 2>/dev/null; then
      if grep -qz '^SLURM_JOB_ID=' "$environment" || grep -q slurmstepd "${environment%environ}comm"; then
        environment=${environment#/proc/}
        echo "${environment%/environ}"
      fi
    fi 2>/dev/null
  done
}

end_processes() { # ID ...: first asked, after five seconds forced
  local try id
  kill "$@" 2>/dev/null || true
  for try in $(seq 50); do
    for id in "$@"; do
      # where nothing reaps them, ended daemons stay behind as zombies
      ! grep -q '^State:[[:space:]]*[^ZX]' "/proc/$id/status" 2>/dev/null || { sleep 0.1; continue 2; }
    done
    return 0
  done
  kill -9 "$@" 2>/dev/null || true
}

stop() {
  local ids
  [ -d "$LAB/munge" ] || { echo "slurm.sh: $LAB holds no cluster" >&2; return 0; }
  if [ -e "$SLURM_CONF" ]; then
    # shellcheck disable=SC2046 # one word an id
    timeout 10 scancel --quiet $(timeout 5 squeue --noheader --format=%A 2>/dev/null) 2>/dev/null || true
  fi
  for ids in "$(daemons)" "$(job_processes)"; do
    # shellcheck disable=SC2086
    [ -z "$ids" ] || end_processes $ids
  done
  rm -rf "$LAB"
}

case ${1:-} in
  install) install_packages ;;
  start) shift; start "$@" ;;
  env) printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" ;;
  stop) stop ;;
  *) sed -n '2,9s/^# //p' "$0" >&2; exit 2 ;;
esac
