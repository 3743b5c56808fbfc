#!/bin/bash
# Plain torchrun: run this on every node, with the same arguments and in any order.
#
#   HEAD=node0 NNODES=2 bash examples/launch/torchrun.sh ppo configs/instructgpt/1.3b/ppo_ptx.yaml
#
# HEAD is the name or address of one of the nodes, NNODES their number. More: docs/multi_node.md

set -eu
: "${HEAD:?the name of the first node}" "${NNODES:?the number of nodes}"

export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# With restarts, the torchrun of a node that was replaced can join the others only if they do not
# share one store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --nnodes "$NNODES" --nproc-per-node "${GPUS:-8}" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${RUN_ID:-fastrlhf}" \
    --shutdown-timeout 540 -m fastrlhf "$@"
