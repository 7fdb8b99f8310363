#!/usr/bin/env bash
# Pretrain a LLaMA with Grass: set up .venv when it is missing or out of date, check the settings, prepare the data,
# and train with one process per GPU, or with one process on a CPU.
#
#   ./launch.sh [key=value ...]          paths are relative to this folder
#   ./launch.sh -m optim.rank=64,128     a sweep: one run after the other for each combination
#   NPROC=2 ./launch.sh                  two processes
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host MASTER_PORT=29500 ./launch.sh        on each of two nodes, or
#   NNODES=2 RDZV_ENDPOINT=host:29500 RDZV_ID=job MAX_RESTARTS=3 ./launch.sh   with torchrun's rendezvous
#
# On Ctrl-C, SIGTERM and SIGUSR1 the run finishes its step and saves, within GRASS_GRACE_SECONDS (300).
# PYTHON is the interpreter for a new .venv. GRASS_TORCH chooses a torch other than that of requirements.txt:
# GRASS_TORCH=2.11.0 installs that version, GRASS_TORCH=installed uses the one that PYTHON has (docs/setup.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' launch.sh
    if [[ -x $python ]]; then echo && exec "$python" -m pretrain.train --help; fi
    echo "Once there is a $venv, ./launch.sh --help lists the settings; README.md explains them."
    exit
fi

# The number of CUDA GPUs that the processes will see. Asking torch would take seconds.
count_gpus() {
    local gpus visible=0 device devices
    gpus=$(timeout 30 nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true
    if ((gpus > 0)) && [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
        for device in "${devices[@]:-}"; do
            [[ $device =~ ^([0-9]|GPU-|MIG-) ]] || break # where CUDA stops reading
            visible=$((visible + 1))
        done
        # A GPU can be cut into many MIG devices.
        if ((visible < gpus)) || [[ $CUDA_VISIBLE_DEVICES == MIG-* ]]; then gpus=$visible; fi
    fi
    echo "$gpus"
}

gpus=$(count_gpus)
processes=${NPROC:-${NPROC_PER_NODE:-${PET_NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}}}
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "NPROC must be a positive number, not '$processes'"
nodes=${NNODES:-${PET_NNODES:-1}}
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || die "NNODES must be a number or a range like 2:4, not '$nodes'"
flags=(--nproc-per-node "$processes")
forward() { # FLAG...: torchrun's --some-flag from the variable SOME_FLAG, where that is set
    local flag name
    for flag in "$@"; do
        name=$(tr 'a-z-' 'A-Z_' <<<"$flag")
        if [[ -n ${!name:-} ]]; then flags+=("--$flag" "${!name}"); fi
    done
}
if [[ -n ${RDZV_ENDPOINT:-} ]]; then RDZV_BACKEND=${RDZV_BACKEND:-c10d}; fi
forward nnodes rdzv-backend rdzv-endpoint rdzv-id rdzv-conf local-addr max-restarts monitor-interval
# Clusters and containers may set these: on a single node they would only take a port from another run.
if [[ $nodes != 1 ]]; then forward node-rank master-addr master-port; fi

setup_env runtime requirements.txt
for argument; do
    if [[ $argument == -m || $argument == --multirun ]]; then
        if [[ $nodes != 1 ]]; then die "a sweep starts on one node; see conf/hydra/launcher for SLURM"; fi
        PET_NPROC_PER_NODE=$processes exec "$python" -m pretrain.sweep "$@"
    fi
done
for argument; do # --cfg job and the like print something, and train nothing
    if [[ $argument == -* ]]; then exec "$python" -m pretrain.train "$@"; fi
done
status=0
WORLD_SIZE=$((${nodes##*:} * processes)) LOCAL_WORLD_SIZE=$processes attend "$python" -m pretrain.preflight "$@" ||
    status=$?
if ((status == 86)); then exit 0; fi # the run is finished already
if ((status != 0)); then exit "$status"; fi

if ((gpus == 0)); then # divide the cores among the processes
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
    # Threads that spin while they wait are 3 % faster, but 3 times slower when another program uses the cores.
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
fi
exec "$python" -m pretrain.launch "${flags[@]}" -m pretrain.train "$@"
