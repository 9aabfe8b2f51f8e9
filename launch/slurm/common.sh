# What the batch scripts beside this file share: one torchrun a node, and what becomes of a signal. Sourced, not run.
# shellcheck shell=bash

SIGNALLED= # the last signal that this shell was sent
STEP=      # process id of the srun that holds all torchruns
STATUS=0   # the exit code of that srun

fail() {
  printf '%s: %s\n' "${SLURM_JOB_NAME:-ebbtide}" "$*" >&2
  exit 1
}

# Sets PYTHON, DEVICES and the threads of a rank.
settle() {
  PYTHON=${EBBTIDE_VENV:-.venv}/bin/python
  [ -x "$PYTHON" ] || fail "no $PYTHON in $PWD: run make setup there, or set EBBTIDE_VENV to an environment with Ebbtide"
  DEVICES=${DEVICES:-${SLURM_GPUS_ON_NODE:-1}}
  [[ $DEVICES =~ ^[1-9][0-9]*$ ]] || fail "DEVICES = $DEVICES: give the number of ranks a node"
  local threads=$((${SLURM_CPUS_ON_NODE:-1} / DEVICES))
  # else a restarted rank finds Gloo addresses of the start before it in the agent's store, and every restart is burned
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
  # a step does not take over the job's cores a task by itself since Slurm 22.05
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
}

# Sets HEAD to the first node's address as Slurm itself uses it: node names need not resolve. Nothing stands in for an
# address that is not found: with localhost every node would be a world of its own.
find_head() {
  local node
  node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) || true
  [ -n "$node" ] || fail "Slurm does not say which nodes this job has (SLURM_JOB_NODELIST = $SLURM_JOB_NODELIST)"
  HEAD=$(scontrol --oneliner show node "$node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p') || true
  [[ -n $HEAD && $HEAD != "(null)" ]] || fail "Slurm knows no address of $node (scontrol show node has no NodeAddr)"
}

# start_step MODULE [FLAGS]: one torchrun a node, in the background. Ranks follow the order of Slurm's nodes, also after
# a requeue, so that a rank goes on with its own part of the data.
start_step() {
  local port=$((10000 + SLURM_JOB_ID % 10000))
  find_head
  echo "start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID: $SLURM_JOB_NODELIST," \
    "ranks a node: $DEVICES, head $HEAD:$port"
  # srun hands a signal to every process of the step. USR1 would kill torchrun: ignored before it starts, it stays
  # ignored in torchrun and is heeded by the workers, which set a handler of their own.
  # shellcheck disable=SC2016
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    bash -c 'trap "" USR1; exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"' "$PYTHON" \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$DEVICES" --master-addr="$HEAD" --master-port="$port" \
    --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" -m "$@" &
  STEP=$!
}

# Waits for the step and sets STATUS. Once this shell is signalled, the trainer is told until it has ended: a worker that
# is still importing ignores the first notice.
# shellcheck disable=SC2034 # STATUS is for the scripts that source this
await_step() {
  STATUS=0
  [ -n "$SIGNALLED" ] || wait "$STEP" || STATUS=$? # a signal may have come while the step was being started
  [ -n "$SIGNALLED" ] || return 0
  while kill -0 "$STEP" 2>/dev/null; do
    kill -s USR1 "$STEP" 2>/dev/null || true
    sleep 1
  done
  STATUS=0
  wait "$STEP" || STATUS=$?
}
