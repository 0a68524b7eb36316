#!/usr/bin/env bash
# One machine, with one GPU, several or none:
#
#     jobs/recipes/one-machine.sh corpus.jsonl --to passages.lance \
#       --model KaLM-Embedding/KaLM-Reranker-V1-Nano-R2
#
# The plain command starts Ray on this machine for as long as it runs: one worker a GPU, without a
# GPU one for up to 4 CPUs. CUDA_VISIBLE_DEVICES=0,1 leaves the other GPUs alone, --workers 1 takes
# one of them, --workers 0 encodes in this process without Ray. Ctrl-C or SIGTERM stops it; the same
# command again resumes, also with another number of workers.
set -euo pipefail
unset RAY_ADDRESS                              # a cluster it names would be joined instead
exec kalm encode "$@"
