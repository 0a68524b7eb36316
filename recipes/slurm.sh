#!/usr/bin/env bash
# On a Slurm allocation: Ray on every node, `kalm encode` on the first of them.
#
#     sbatch --nodes=4 recipes/slurm.sh '/shared/corpus/*.jsonl.zst' --to /shared/passages.lance \
#       --model KaLM-Embedding/KaLM-Reranker-V1-Nano-R2
#
# `kalm` and `ray` must be on PATH on every node (activate your environment before sbatch), corpus,
# model and table reachable from each. Options of sbatch override the lines below.
#
# Two minutes before the time is up the command is stopped, what it has finished is committed, and
# the job is requeued: it goes on where it was. So it does after a preemption or a lost node, and
# when it is submitted again by hand.
#SBATCH --job-name=kalm-encode
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

host=$(hostname)                               # this script runs on the first node
port=$((20000 + SLURM_JOB_ID % 10000))         # jobs may share a node, /tmp too
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0

wait_for_ray() {                               # $1: host, $2: port, $3: gives up when it has ended
  until (exec 3<> "/dev/tcp/$1/$2") 2> /dev/null; do
    kill -0 "$3"
    sleep 1
  done
}

start_node() {                                 # on each node
  if [ "$SLURM_NODEID" = 0 ]; then
    where=(--head "--port=$2" --include-dashboard=false)
  else
    wait_for_ray "$1" "$2" $$
    where=("--address=$1:$2")
  fi
  exec ray start "${where[@]}" "--num-cpus=$SLURM_CPUS_PER_TASK" --block \
    "--temp-dir=/tmp/ray-$SLURM_JOB_ID-$SLURM_NODEID"
}
export -f wait_for_ray start_node

srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  bash -euo pipefail -c 'start_node "$@"' _ "$host" "$port" &
ray=$!
trap 'trap "" USR1 TERM; kill "$ray" || true; wait "$ray" || true' EXIT
wait_for_ray "$host" "$port" "$ray"

# One worker a GPU, without GPUs one a node: asked for by number, as nodes may still be on their way.
# A --workers among the arguments comes later and wins.
workers=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-1}))
kalm encode --address "$host:$port" --workers "$workers" "$@" &
kalm=$!

stop() { kill -TERM "$kalm" && wait "$kalm" || true; }
trap 'stop; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
trap 'stop; exit 143' TERM
wait "$kalm"
