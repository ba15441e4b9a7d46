#!/usr/bin/env bash
# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
#
# What dist_train.sh and dist_test.sh share; use those.
#   bash tools/dist_run.sh SCRIPT PROCESSES ARGUMENTS...
set -euo pipefail

script=$1
processes=$2
shift 2

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# What is not set here torchrun takes from variables of its own, such as
# PET_NNODES, or it is one machine that meets itself at 127.0.0.1:29500.
options=(--nproc_per_node="$processes")
[[ -z ${NNODES:-} ]] || options+=(--nnodes="$NNODES")
[[ -z ${MAX_RESTARTS:-} ]] || options+=(--max_restarts="$MAX_RESTARTS")
if [[ -n ${RDZV_ENDPOINT:-} ]]; then
    options+=(--rdzv_backend=c10d --rdzv_endpoint="$RDZV_ENDPOINT")
    # Else torch compares the endpoint with the addresses of this machine's
    # name, which are not all that a machine with several networks has.
    if [[ -n ${NODE_RANK:-} ]]; then
        conf=is_host=$((NODE_RANK == 0))${PET_RDZV_CONF:+,$PET_RDZV_CONF}
        options+=(--rdzv_conf="$conf")
    fi
else
    [[ -z ${NODE_RANK:-} ]] || options+=(--node_rank="$NODE_RANK")
    [[ -z ${MASTER_ADDR:-} ]] || options+=(--master_addr="$MASTER_ADDR")
    [[ -z ${PORT:-} ]] || options+=(--master_port="$PORT")
fi
# With an endpoint a machine that stayed would by default keep the address of
# the first meeting to itself; one that comes back waits for it in vain, and
# after a minute the run is lost (seen with torch 2.11).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec "${PYTHON:-python}" -m torch.distributed.run "${options[@]}" \
    "$root/tools/$script" "$@"
