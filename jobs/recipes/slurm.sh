#!/usr/bin/env bash
# On a Slurm allocation: Ray on every node, `kalm encode` on the first of them.
#
#     sbatch --nodes=4 jobs/recipes/slurm.sh '/shared/corpus/*.jsonl.zst' --to /shared/passages.lance \
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

head=$(hostname):$((20000 + SLURM_JOB_ID % 10000))    # this script runs on the first node
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0

start_node() {                                        # jobs may share a node
  exec ray start "--num-cpus=$SLURM_CPUS_PER_TASK" --block "$@" \
    "--temp-dir=/tmp/ray-$SLURM_JOB_ID-$SLURMD_NODENAME"
}
export -f start_node

start_node --head "--port=${head#*:}" --include-dashboard=false &
ray=$!
trap 'trap "" USR1 TERM; kill "$ray" 2> /dev/null || true; wait "$ray" || true' EXIT
until ray health-check --address "$head" &> /dev/null; do kill -0 "$ray"; done

others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
  srun "--nodes=$others" "--ntasks=$others" --ntasks-per-node=1 "--exclude=$SLURMD_NODENAME" \
    "--cpus-per-task=$SLURM_CPUS_PER_TASK" bash -c 'start_node "$@"' _ "--address=$head" &
fi

# One worker a GPU, without GPUs one a node: asked for by number, as nodes may still be on their way.
# A --workers among the arguments comes later and wins.
workers=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-1}))
kalm encode --address "$head" --workers "$workers" "$@" &
kalm=$!

stop() { kill -TERM "$kalm" && wait "$kalm" || true; }
trap 'stop; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
trap 'stop; exit 143' TERM
wait "$kalm"                                          # then Slurm ends Ray on the other nodes
