#!/usr/bin/env bash
# On a Ray cluster that is already there:
#
#     export RAY_API_SERVER_ADDRESS=http://HEAD:8265
#     export RAY_AUTH_TOKEN=…                  # where the cluster asks for one
#     jobs/recipes/ray-job.sh s3://bucket/corpus/*.jsonl.zst --to s3://bucket/passages.lance \
#       --model KaLM-Embedding/KaLM-Reranker-V1-Nano-R2
#
# This checkout travels to the cluster; its dependencies must be installed on every node, and
# corpus, model and table reachable from each. Where the package itself is installed on the nodes,
# leave --working-dir out. The command runs on the head node and needs no GPU there.
#
# `ray job stop ID` stops it; submitted again it resumes. --no-wait, before the two dashes, returns
# at once; the job runs on either way when this terminal goes away.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec ray job submit --working-dir . -- kalm encode "$@"
