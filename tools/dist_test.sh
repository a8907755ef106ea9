#!/usr/bin/env bash
# Tests on several processes, one for each GPU (or CPU processes without one):
#   bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]
# On several machines run it on each, with NNODES, NODE_RANK, MASTER_ADDR and
# PORT in the environment.
set -euo pipefail

if (($# < 3)); then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [arguments of test.py]" >&2
    exit 2
fi
config=$1 checkpoint=$2 gpus=$3
here=$(cd "$(dirname "$0")" && pwd)

PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" \
python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$gpus" \
    "$here/test.py" "$config" "$checkpoint" --launcher pytorch "${@:4}"
