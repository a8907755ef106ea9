#!/usr/bin/env bash
# Trains as a Slurm job, one task for each GPU:
#   [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=...] \
#   bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR \
#       [arguments of train.py]
set -euo pipefail

if (($# < 4)); then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR" \
        "[arguments of train.py]" >&2
    exit 2
fi
partition=$1 job_name=$2 config=$3 work_dir=$4
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
here=$(cd "$(dirname "$0")" && pwd)
read -ra srun_args <<<"${SRUN_ARGS:-}"

PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" \
srun -p "$partition" \
    --job-name="$job_name" \
    --gres="gpu:$gpus_per_node" \
    --ntasks="$gpus" \
    --ntasks-per-node="$gpus_per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    "${srun_args[@]}" \
    python -u "$here/train.py" "$config" --work-dir="$work_dir" \
    --launcher=slurm "${@:5}"
